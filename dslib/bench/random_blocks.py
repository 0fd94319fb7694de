"""Random blocks for trying the merge: every kind of layer that it knows, in every shape, with random statistics."""

from __future__ import annotations

from random import Random

import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, DropPath
from torch import Tensor, nn

ACTIVATIONS = ("module", "function", "in place", "method", "shared")


class RandomBlock(nn.Module):
    """A block drawn at random: a chain of layers, then joined with a residual, a downsample branch or a second chain.

    Args:
        rng: what it is drawn with.
        c_in: channels of its input.
        joined: whether its chain keeps the map's size (or divides it by its stride), so that it can be joined.
    """

    def __init__(self, rng: Random, c_in: int, joined: bool) -> None:
        super().__init__()
        self.rng, self.off = rng, False  # off: without the activations that merging removes
        self.act = rng.choice([nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Hardswish])()
        self.stride = rng.choice([(1, 1), (1, 1), (2, 2), (1, 2), (3, 1)])
        self.body = nn.ModuleList()
        self.kinds: list[str] = []
        self.join = rng.choice(["residual", "downsample", "branches", "cat", "slice"]) if joined else ""
        c_out = self._chain(c_in, joined)
        self.other = self._other_branch(c_in, c_out)
        if self.join == "residual" and (c_out != c_in or self.stride != (1, 1)):
            self.join = "downsample"
        self.alpha = rng.choice([1, 1, 0.5, -2])
        self.ends = rng.random() < 0.5
        self.scale = nn.Parameter(torch.randn(c_out, 1, 1)) if rng.random() < 0.2 else None
        self.c_out = c_out * (2 if self.join == "cat" else 1)
        self.drop = DropPath(0.5)

    def forward(self, x: Tensor) -> Tensor:
        """The block; with `off` set, without its inner activations."""
        y = x
        for layer, kind in zip(self.body, self.kinds, strict=True):
            y = layer(y)
            y = y if self.off else self._activate(y, kind)
        if self.scale is not None:
            y = y * self.scale
        if self.join == "residual":
            y = torch.add(x, self.drop(y), alpha=self.alpha)
        elif self.join in ("downsample", "branches"):
            y = y - self.other(x) if self.alpha < 0 else self.other(x) + y
        elif self.join == "cat":
            y = torch.cat([self.other(x), y], 1)
        elif self.join == "slice" and self.c_out > 1:
            first, second = y.chunk(2, 1)
            y = torch.cat([second, 2 * first], 1)
        return F.relu(y) if self.ends and not self.off else y

    def _activate(self, y: Tensor, kind: str) -> Tensor:
        if kind == "function":
            return F.silu(y)
        if kind == "in place":
            return F.relu(y, inplace=True)
        if kind == "method":
            return y.relu()
        return self.act(y) if kind else y

    def _chain(self, c_in: int, joined: bool) -> int:
        rng, strides = self.rng, [self.stride]
        depth = rng.randint(1, 4)
        strides += [(1, 1)] * (depth - 1)
        rng.shuffle(strides)
        c = c_in
        for i in range(depth):
            layers, c = self._layer(c, strides[i], joined)
            self.body.append(layers)
            self.kinds.append(rng.choice(["", *ACTIVATIONS]) if i + 1 < depth else "")
        if rng.random() < 0.2:
            self.body.append(nn.AvgPool2d(3, 1, 1))
            self.kinds.append("")
        return c

    def _layer(self, c_in: int, stride: tuple[int, int], joined: bool) -> tuple[nn.Sequential, int]:
        """A convolution with what may stand around it."""
        rng = self.rng
        kernel = rng.choice(
            [(1, 1), (1, 1), (3, 3), (3, 3), (5, 5), (1, 3), (5, 1)]
            if joined
            else [(1, 1), (2, 2), (3, 3), (4, 2), (5, 5), (1, 3)]
        )
        dilation = rng.choice([(1, 1), (1, 1), (2, 2), (1, 2)])
        groups = rng.choice([g for g in (1, 1, 2, 3, c_in) if c_in % g == 0])
        c_out = groups * rng.randint(1, 3)
        bias = rng.random() < 0.5
        layers: list[nn.Module] = []
        if rng.random() < 0.2:
            layers.append(nn.BatchNorm2d(c_in))
        half = tuple(d * (k - 1) // 2 for d, k in zip(dilation, kernel, strict=True))
        how = rng.choice(["symmetric", "explicit", "same"] if joined else ["symmetric", "explicit", "none", "dynamic"])
        padding: str | tuple[int, int] = (0, 0)
        if how == "symmetric":
            padding = (half[0], half[1]) if joined else (rng.randint(0, 2), rng.randint(0, 2))
        elif how == "same" and stride == (1, 1):
            padding = "same"
        elif how in ("same", "explicit"):
            v, h = half if joined else (rng.randint(0, 2), rng.randint(0, 2))
            sides = (h, h, v, v) if joined else (h, rng.randint(0, 2), v, rng.randint(0, 2))
            layers.append(nn.ZeroPad2d(sides))
        if how == "dynamic":
            conv: nn.Conv2d = Conv2dSame(c_in, c_out, kernel, stride, 0, dilation, groups, bias)
        else:
            conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, dilation, groups, bias)
        layers.append(conv)
        if rng.random() < 0.8:
            layers.append(nn.BatchNorm2d(c_out, eps=rng.choice([1e-5, 1e-3, 0.1])))
        if rng.random() < 0.2:
            layers.append(nn.Dropout(0.3))
        return nn.Sequential(*layers), c_out

    def _other_branch(self, c_in: int, c_out: int) -> nn.Module:
        """A second way from the block's input to a map of the same size."""
        conv = nn.Conv2d(c_in, c_out, 1, self.stride, bias=False)
        branch = nn.Sequential(conv, nn.BatchNorm2d(c_out))
        if self.join in ("branches", "cat"):
            branch = nn.Sequential(nn.Conv2d(c_in, c_out, 3, self.stride, 1), nn.BatchNorm2d(c_out))
        if self.rng.random() < 0.3:
            branch.insert(0, nn.AvgPool2d(3, 1, 1))
        return branch


def random_block(rng: Random, c_in: int) -> RandomBlock:
    """A block in float64 and eval, with random weights, BatchNorm statistics and affine parameters."""
    block = RandomBlock(rng, c_in, joined=rng.random() < 0.6)
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(0, 0.5, generator=generator)
        for bn in block.modules():
            if isinstance(bn, nn.BatchNorm2d) and bn.running_mean is not None and bn.running_var is not None:
                bn.running_mean.normal_(0, 0.5, generator=generator)
                bn.running_var.uniform_(0.3, 3, generator=generator)
    return block.double().eval()
