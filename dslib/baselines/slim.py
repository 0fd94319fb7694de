"""A network of any width: one set of weights, and generators that change them for each choice of channels."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from .coupling import STEP, Group, blank_image, find_groups


class Slim(nn.Module):
    """The network with as many channels of each group as are chosen: the first ones.

    The weight of each convolution is its own, plus what a generator (two linear layers) makes of the shares of its
    inputs and outputs that are chosen; at first that is nothing. BatchNorm normalises by the batch at hand, always.

    Args:
        model: the network; left as it is.
        image_size: side in pixels.
        hidden: units between the two linear layers.
        ordered: whether each group's channels are put in the order of their L1 norms, the largest first, for a network
            that is trained.
        seed: of the generators' weights.
    Raises:
        BadModel: if layers share channels in other ways than one for one (concatenation, grouped convolutions).
    Source: Liu et al., MetaPruning, ICCV 2019. Departs: a generator sees its own layer's widths, not its
        neighbours', and adds to weights that are there, so that a trained network can be the start.
    """

    def __init__(
        self, model: nn.Module, image_size: int, hidden: int = 8, ordered: bool = False, seed: int = 0
    ) -> None:
        super().__init__()
        self._plain, self.groups = copy.deepcopy(model).eval(), find_groups(model, image_size)
        if ordered:
            for group in self.groups:
                _put_in_order(self._plain, group)
        self._plain.requires_grad_(False)
        self.network = copy.deepcopy(self._plain).requires_grad_(True)
        self.widths = [group.width for group in self.groups]
        self._image = blank_image(model, image_size)
        outside = {name: i for i, group in enumerate(self.groups) for name in group.makers}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for name in dict.fromkeys(name for group in self.groups for name in (*group.makers, *group.takers)):
                layer = self.network.get_submodule(name)
                if isinstance(layer, nn.Conv2d):
                    self.network.set_submodule(name, _Conv(layer, self.widths, outside.get(name), hidden))
                elif isinstance(layer, nn.BatchNorm2d):
                    self.network.set_submodule(name, _Norm(layer))
                elif isinstance(layer, nn.Linear):
                    self.network.set_submodule(name, _Linear(layer))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, classes), with the channels that are chosen."""
        return self.network(x)

    def choose(self, widths: Sequence[int]) -> None:
        """Take so many channels of each group from now on."""
        self.widths[:] = widths

    def rounded(self, shares: Sequence[float]) -> list[int]:
        """Channels of each group, for a share of each: multiples of `STEP`, and one of them at least."""
        widths = [group.width for group in self.groups]
        return [min(w, max(STEP, STEP * round(share * w / STEP))) for share, w in zip(shares, widths, strict=True)]

    @torch.no_grad()
    def extract(self, widths: Sequence[int]) -> nn.Module:
        """The network of these widths by itself, in eval; its BatchNorms' statistics are to be gathered anew."""
        self.choose(widths)
        self(self._image)  # each layer sees how many channels it is given
        small = copy.deepcopy(self._plain).requires_grad_(True)
        for name, layer in self.network.named_modules():
            if isinstance(layer, _Conv | _Norm | _Linear):
                small.set_submodule(name, layer.alone())
        return small.eval()


class _Conv(nn.Module):
    """A convolution of as many channels as come in and are chosen."""

    def __init__(self, conv: nn.Conv2d, widths: list[int], group: int | None, hidden: int) -> None:
        super().__init__()
        self.conv, self._widths, self._group = conv, widths, group  # widths are all layers'
        self.depthwise = conv.groups > 1
        like: dict[str, Any] = {"device": conv.weight.device, "dtype": conv.weight.dtype}
        self.first = nn.Linear(2, hidden, **like)
        self.second = nn.Linear(hidden, conv.weight.numel(), bias=False, **like)  # the bias is the weight that is there
        nn.init.zeros_(self.second.weight)
        self.seen = conv.in_channels, conv.out_channels

    def forward(self, x: Tensor) -> Tensor:
        inside, conv = x.shape[1], self.conv
        outside = conv.out_channels if self._group is None else self._widths[self._group]
        self.seen = inside, inside if self.depthwise else outside
        bias = None if conv.bias is None else conv.bias[: self.seen[1]]
        groups = inside if self.depthwise else 1
        return F.conv2d(x, self.weight(), bias, conv.stride, conv.padding, conv.dilation, groups)

    def weight(self) -> Tensor:
        """Made for the channels that were seen."""
        inside, outside = self.seen
        whole = self.conv.weight
        shares = whole.new_tensor([inside / self.conv.in_channels, outside / self.conv.out_channels])
        made = self.second(F.relu(self.first(shares))).view_as(whole)
        return (whole + made)[:outside, : whole.shape[1] if self.depthwise else inside]

    def alone(self) -> nn.Conv2d:
        """A plain convolution with these weights."""
        conv, (inside, outside) = copy.deepcopy(self.conv), self.seen
        conv.in_channels, conv.out_channels, conv.groups = inside, outside, inside if self.depthwise else 1
        conv.weight = nn.Parameter(self.weight().clone())
        if conv.bias is not None:
            conv.bias = nn.Parameter(conv.bias[:outside].clone())
        return conv


class _Norm(nn.Module):
    """A BatchNorm of as many channels as come in, by the statistics of the batch; timm's applies its activation."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.norm, self.seen = norm, norm.num_features

    def forward(self, x: Tensor) -> Tensor:
        norm, self.seen = self.norm, x.shape[1]
        y = F.batch_norm(x, None, None, norm.weight[: self.seen], norm.bias[: self.seen], True, 0.0, norm.eps)
        return norm.act(norm.drop(y)) if isinstance(norm, BatchNormAct2d) else y

    def alone(self) -> nn.Module:
        """A plain BatchNorm of these channels."""
        norm = copy.deepcopy(self.norm)
        norm.num_features = self.seen
        for name in ("weight", "bias"):
            norm.register_parameter(name, nn.Parameter(norm.get_parameter(name)[: self.seen].clone()))
        for name in ("running_mean", "running_var"):
            norm.register_buffer(name, norm.get_buffer(name)[: self.seen].clone())
        return norm


class _Linear(nn.Module):
    """A linear layer of as many inputs as come in."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear, self.seen = linear, linear.in_features

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x.shape[-1]
        return F.linear(x, self.linear.weight[:, : self.seen], self.linear.bias)

    def alone(self) -> nn.Linear:
        """A plain linear layer of these inputs."""
        linear = copy.deepcopy(self.linear)
        linear.in_features = self.seen
        linear.weight = nn.Parameter(linear.weight[:, : self.seen].clone())
        return linear


def _put_in_order(model: nn.Module, group: Group) -> None:
    """Sort the channels of a group by the L1 norms of the convolutions that make them, in place."""
    convs = [layer for name in group.makers if isinstance(layer := model.get_submodule(name), nn.Conv2d)]
    with torch.no_grad():
        norms = torch.stack([conv.weight.abs().flatten(1).sum(1) for conv in convs]).sum(0)
        order = norms.argsort(descending=True)
        for name in group.makers:
            layer = model.get_submodule(name)
            for tensor in (*layer.parameters(recurse=False), *layer.buffers(recurse=False)):
                if tensor.ndim and len(tensor) == group.width:
                    tensor.copy_(tensor[order])
        for name in group.takers:
            weight = model.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            weight.copy_(weight[:, order])
