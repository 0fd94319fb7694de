"""What a merged block is as a module: one convolution, and what its border and its end may need besides."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import BadConfig, NotMergeable
from .affine import Affine


class MergedBlock(nn.Module):
    """One dense convolution, then the activations that ended the block: (N, C_in, H, W) -> (N, C_out, H', W').

    Args:
        conv: the merged convolution, the residual folded in.
        act: what follows it, or None.
        pad: what a Conv2d cannot express: asymmetric zero padding, a channel of ones; or None.
        border: the bias where it differs from place to place; or None.
    """

    def __init__(
        self,
        conv: nn.Conv2d,
        act: nn.Module | None = None,
        pad: nn.Module | None = None,
        border: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.pad, self.conv = pad or nn.Identity(), conv
        self.border, self.act = border or nn.Identity(), act or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """The block's output."""
        return self.act(self.border(self.conv(self.pad(x))))


class BorderBias(nn.Module):
    """Adds a bias of one value a channel and position: exact at the border, for maps of one size.

    Args:
        bias: (1, C, H, W), the block's answer to zeros.
    """

    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """The sum, of the shape of x: (N, C, H, W)."""
        bias = self.get_buffer("bias")
        if not torch.compiler.is_compiling() and x.shape[2:] != bias.shape[2:]:
            raise BadConfig(
                f"merged for maps of {tuple(bias.shape[2:])}, found {tuple(x.shape[2:])}: "
                "merge for this image_size, or without one"
            )
        return x + bias


class OnesChannel(nn.Module):
    """Appends a channel of ones, so that zero padding shows where the image ends: (N, C, H, W) -> (N, C + 1, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        """The map and its ones."""
        return F.pad(x, (0, 0, 0, 0, 0, 1), value=1.0)


def merged_block(
    whole: Affine,
    like: nn.Conv2d,
    act: nn.Module | None = None,
    before: nn.Module | None = None,
    border: nn.Module | None = None,
) -> MergedBlock:
    """A map as a module, in the place, dtype and `requires_grad` of the convolution `like`.

    Args:
        whole: the map.
        like: any convolution of the block that it stands for.
        act: the activation at the block's end.
        before: what comes before everything else.
        border: what comes after the convolution, which then has no bias of its own.
    Raises:
        NotMergeable: if the weights are too large for the dtype.
    """
    left, right, top, bottom = whole.padding
    even = left == right and top == bottom and min(whole.padding) >= 0
    c_out, c_in, k_v, k_h = whole.weight.shape
    place: Any = {"device": like.weight.device, "dtype": like.weight.dtype}
    geometry: Any = {"stride": whole.stride, "dilation": whole.dilation, "groups": whole.groups}
    padding, bias = (top, left) if even else 0, before is None and border is None
    conv = nn.Conv2d(c_in * whole.groups, c_out, (k_v, k_h), padding=padding, bias=bias, **geometry, **place)
    with torch.no_grad():
        conv.weight.copy_(whole.weight)
        if conv.bias is not None:
            conv.bias.copy_(torch.zeros(c_out) if whole.bias is None else whole.bias)
    if not all(bool(p.isfinite().all()) for p in conv.parameters()):
        raise NotMergeable(f"the merged weights do not fit {like.weight.dtype}: merge in float32, then convert")
    pads = [
        module for module in (before, None if even else nn.ZeroPad2d((left, right, top, bottom))) if module is not None
    ]
    pad = nn.Sequential(*pads) if len(pads) > 1 else pads[0] if pads else None
    border = None if border is None else border.to(**place)
    return MergedBlock(conv.requires_grad_(like.weight.requires_grad), act, pad, border)
