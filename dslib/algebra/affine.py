"""Affine maps on feature maps, and their algebra: compose, add, pad.

A block without activations is affine and translation-invariant (away from its border), so the whole of
it is one convolution. `Affine` is that convolution as a value: interpreting a block's operations on an
`Affine` in place of a tensor yields the block's merged kernel. Everything here also works on the `meta`
device, where only shapes exist.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import gcd

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import NotMergeable

Pair = tuple[int, ...]  # (vertical, horizontal)
Sides = tuple[int, ...]  # (left, right, top, bottom), as in `F.pad`
NO_PADDING: Sides = (0, 0, 0, 0)


@dataclass(frozen=True)
class Affine:
    """The map x -> conv2d(pad(x), weight) + bias on feature maps of shape (N, C_in, H, W).

    Args:
        weight: (C_out, C_in / groups, k_h, k_w).
        bias: (C_out,), or None for exactly zero (known without looking at values, so also on `meta`).
        stride: output step in input pixels, (vertical, horizontal).
        dilation: step between kernel taps in input pixels, (vertical, horizontal).
        padding: zeros put around the input, (left, right, top, bottom); negative crops.
        groups: number of blocks on the diagonal of the channel map.
    """

    weight: Tensor
    bias: Tensor | None = None
    stride: Pair = (1, 1)
    dilation: Pair = (1, 1)
    padding: Sides = NO_PADDING
    groups: int = 1

    @property
    def kernel(self) -> Pair:
        """Kernel size in taps, (vertical, horizontal)."""
        return tuple(self.weight.shape[2:])

    @property
    def pointwise(self) -> bool:
        """Whether each output pixel reads exactly one input pixel, the one at its own place."""
        return self.kernel == (1, 1) and self.stride == (1, 1)

    def __call__(self, x: Tensor) -> Tensor:
        """The map applied to x, (N, C_in, H, W) -> (N, C_out, H', W')."""
        return F.conv2d(F.pad(x, self.padding), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


def identity(channels: int, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Affine:
    """The map that changes nothing: a Dirac kernel, (channels, 1, 1, 1) in `channels` groups."""
    return Affine(torch.ones(channels, 1, 1, 1, dtype=dtype, device=device), groups=channels)


def compose(first: Affine, second: Affine) -> Affine:
    """The map that applies `first`, then `second`.

    Two convolutions in a row are one whose kernel is the full convolution of the two,
    k = k1 + (k2 - 1) * stride1 at dilation 1, because both are linear and translation-invariant.

    Args:
        first: weight (C_mid, C_in / g1, k1, k1).
        second: weight (C_out, C_mid / g2, k2, k2).
    Returns:
        weight (C_out, C_in / g, k, k) with g = gcd(g1, g2).
    Raises:
        NotMergeable: if `second` pads what is not zero there; hoist its padding first, or the border
            would be wrong.
    Source: Fu et al., ICML 2022, stage 3.
    """
    if first.weight.shape[0] != second.weight.shape[1] * second.groups:
        raise NotMergeable(
            f"cannot compose: the first map has {first.weight.shape[0]} output channels, "
            f"the second expects {second.weight.shape[1] * second.groups}"
        )
    first = pad_output(first, second.padding)
    groups = gcd(first.groups, second.groups)
    kernel, dilation, step = _common_dilation(regroup(first, groups), second)
    weight = _full_convolution(kernel, second.weight, second.groups, step)
    stride = tuple(a * b for a, b in zip(first.stride, second.stride, strict=True))
    return Affine(weight, _composed_bias(first, second), stride, dilation, first.padding, groups)


def add(a: Affine, b: Affine) -> Affine:
    """The map x -> a(x) + b(x): kernels aligned on their taps' positions, then summed.

    Raises:
        NotMergeable: if the two differ in channels or stride, or give maps of different size.
    """
    if len(a.weight) != len(b.weight):
        raise NotMergeable(f"cannot add maps of {len(a.weight)} and of {len(b.weight)} channels")
    _check_same_input(a, b)
    a, b = _aligned((a, b), gcd(a.groups, b.groups))
    bias = b.bias if a.bias is None else a.bias if b.bias is None else a.bias + b.bias
    return replace(a, weight=a.weight + b.weight, bias=bias)


def concat(maps: Sequence[Affine]) -> Affine:
    """The map whose output channels are those of all `maps`, one after another.

    Raises:
        NotMergeable: if they differ in stride, or give maps of different size.
    """
    for other in maps[1:]:
        _check_same_input(maps[0], other)
    maps = _aligned(maps, 1)
    biases = [m.weight.new_zeros(len(m.weight)) if m.bias is None else m.bias for m in maps]
    bias = None if all(m.bias is None for m in maps) else torch.cat(biases)
    return replace(maps[0], weight=torch.cat([m.weight for m in maps]), bias=bias)


def stack_inputs(a: Affine, b: Affine) -> Affine:
    """The map (x, y) -> a(x) + b(y) of the input channels of both, those of `a` first; without a bias."""
    a, b = _aligned((a, b), 1)
    return replace(a, weight=torch.cat([a.weight, b.weight], 1), bias=None)


def select(affine: Affine, channels: Sequence[int]) -> Affine:
    """The map that gives only these output channels, in this order."""
    whole, index = regroup(affine, 1), torch.tensor(channels, device=affine.weight.device)
    return replace(whole, weight=whole.weight[index], bias=None if whole.bias is None else whole.bias[index])


def scale(affine: Affine, factor: Tensor) -> Affine:
    """The map times `factor`, (C_out,)."""
    bias = None if affine.bias is None else affine.bias * factor
    return replace(affine, weight=affine.weight * factor.reshape(-1, 1, 1, 1), bias=bias)


def shift(affine: Affine, constant: Tensor) -> Affine:
    """The map plus `constant`, (C_out,), at every position."""
    return replace(affine, bias=constant if affine.bias is None else affine.bias + constant)


def shift_by_ones(affine: Affine, constant: Tensor) -> Affine:
    """As `shift`, of a map that reads an image of ones: the constant becomes a tap on the pixel at its own place.

    Zero padding that follows then treats it rightly, where it would cut a bias off at the border.

    Raises:
        NotMergeable: if the output is larger than the input, so that some pixel has no place of its own.
    """
    below, right = _slack(affine)
    if max(below, right) > 0:
        raise NotMergeable("gives a map larger than its input: its border cannot be kept exactly, hoist it")
    return add(affine, Affine(constant.reshape(-1, 1, 1, 1), None, affine.stride, padding=(0, right, 0, below)))


def pad_output(affine: Affine, sides: Sides) -> Affine:
    """The map that applies `affine`, then puts zeros around (negative sides: crops).

    Cropping moves to the input at any stride. Zeros move there only through a bias-free pointwise map.

    Raises:
        NotMergeable: if zeros are put around a map that is not zero there.
    """
    if sides == NO_PADDING:
        return affine
    crossed = any(old < 0 < new for old, new in zip(affine.padding, sides, strict=True))  # what was cropped is not zero
    if max(sides) > 0 and not (affine.pointwise and affine.bias is None and not crossed):
        raise NotMergeable(
            f"padding {sides} follows a map with kernel {affine.kernel} and "
            f"{'no bias' if affine.bias is None else 'a bias'}: the border is not one convolution; "
            "hoist the padding to the block's input (dslib.shrink does, unless told not to)"
        )
    return pad_input(affine, sides)


def pad_input(affine: Affine, sides: Sides) -> Affine:
    """The map whose output is `affine`'s, extended by `sides` as if the input went on with zeros."""
    return replace(affine, padding=add_sides(affine.padding, scale_sides(sides, affine.stride)))


def add_sides(a: Sides, b: Sides) -> Sides:
    """Padding by `a`, then by `b`."""
    return tuple(one + other for one, other in zip(a, b, strict=True))


def scale_sides(sides: Sides, stride: Pair) -> Sides:
    """How far a map's input goes on so that its output goes on by `sides`."""
    (left, right, top, bottom), (v, h) = sides, stride
    return (left * h, right * h, top * v, bottom * v)


def regroup(affine: Affine, groups: int) -> Affine:
    """The same map written with fewer groups (`groups` divides `affine.groups`); zeros fill the rest."""
    ratio = affine.groups // groups
    if ratio == 1:
        return affine
    c_out, c_in, *kernel = affine.weight.shape
    blocks = affine.weight.reshape(groups, ratio, c_out // affine.groups, 1, c_in, *kernel)
    diagonal = torch.eye(ratio, dtype=affine.weight.dtype, device=affine.weight.device)
    weight = (blocks * diagonal.reshape(1, ratio, 1, ratio, 1, 1, 1)).reshape(c_out, ratio * c_in, *kernel)
    return replace(affine, weight=weight, groups=groups)


def _slack(affine: Affine) -> Pair:
    """What the output gains over ceil(size / stride), in input pixels, (vertical, horizontal)."""
    (k_v, k_h), (d_v, d_h), (left, right, top, bottom) = affine.kernel, affine.dilation, affine.padding
    return top + bottom - d_v * (k_v - 1), left + right - d_h * (k_h - 1)


def _spread(weight: Tensor, step_v: int, step_h: int) -> Tensor:
    """The kernel with `step - 1` zeros put between its taps."""
    if (step_v, step_h) == (1, 1):
        return weight
    k_v, k_h = weight.shape[2:]
    wide = weight.new_zeros(*weight.shape[:2], (k_v - 1) * step_v + 1, (k_h - 1) * step_h + 1)
    wide[:, :, ::step_v, ::step_h] = weight
    return wide


def _undilated(affine: Affine) -> Affine:
    return replace(affine, weight=_spread(affine.weight, *affine.dilation), dilation=(1, 1))


def _common_dilation(first: Affine, second: Affine) -> tuple[Tensor, Pair, Pair]:
    """The first kernel spread, the result's dilation, and the second kernel's step, all in one distance of taps."""
    dilation, spread, step = [], [], []
    for axis in (0, 1):
        own = first.dilation[axis] if first.kernel[axis] > 1 else 0
        other = second.dilation[axis] * first.stride[axis] if second.kernel[axis] > 1 else 0
        unit = gcd(own, other) or 1
        dilation.append(unit)
        spread.append(max(own // unit, 1))
        step.append(max(other // unit, 1))
    return _spread(first.weight, *spread), tuple(dilation), tuple(step)


def _full_convolution(first: Tensor, second: Tensor, groups: int, step: Pair) -> Tensor:
    """W[o, i, p] = sum over m, q of second[o, m, q] * first[m, i, p - q * step].

    One matrix product per tap of `second`: in float64 on a CPU much faster than `conv2d`.
    """
    c_mid, c_in, k_v, k_h = first.shape
    c_out, _, taps_v, taps_h = second.shape
    rows = first.reshape(groups, c_mid // groups, c_in * k_v * k_h)
    taps = second.reshape(groups, c_out // groups, c_mid // groups, taps_v, taps_h)
    whole = first.new_zeros(c_out, c_in, k_v + (taps_v - 1) * step[0], k_h + (taps_h - 1) * step[1])
    for v in range(taps_v):
        for h in range(taps_h):
            window = whole[:, :, v * step[0] : v * step[0] + k_v, h * step[1] : h * step[1] + k_h]
            window += (taps[..., v, h] @ rows).reshape(c_out, c_in, k_v, k_h)
    return whole


def _composed_bias(first: Affine, second: Affine) -> Tensor | None:
    if first.bias is None:
        return second.bias
    sums = second.weight.sum((2, 3))
    per_group = first.bias.reshape(second.groups, -1)
    reached = per_group.repeat_interleave(second.weight.shape[0] // second.groups, dim=0)
    carried = (sums * reached).sum(1)
    return carried if second.bias is None else carried + second.bias


def _check_same_input(a: Affine, b: Affine) -> None:
    channels = [m.weight.shape[1] * m.groups for m in (a, b)]
    if channels[0] != channels[1]:
        raise NotMergeable(f"cannot join branches that read {channels[0]} and {channels[1]} channels")


def _aligned(maps: Sequence[Affine], groups: int) -> list[Affine]:
    """The maps with kernels of one size at one place, framed by zeros, in `groups` and without dilation."""
    first = maps[0]
    for other in maps[1:]:
        if first.stride != other.stride:
            raise NotMergeable(f"cannot join two branches of stride {first.stride} and {other.stride}")
        if _slack(first) != _slack(other):
            raise NotMergeable(
                f"cannot join two branches whose outputs differ in size: kernel {first.kernel} padding "
                f"{first.padding}, and kernel {other.kernel} padding {other.padding}"
            )
    plain = [_undilated(regroup(m, groups)) for m in maps]
    reaches = [_reach(m) for m in plain]
    frame = [max(sides) for sides in zip(*reaches, strict=True)]
    return [
        _framed(m, tuple(f - r for f, r in zip(frame, reach, strict=True)))
        for m, reach in zip(plain, reaches, strict=True)
    ]


def _reach(affine: Affine) -> Sides:
    """How many taps of an undilated kernel lie (left, from there right, above, from there down) of its first pixel."""
    (k_v, k_h), (left, _, top, _) = affine.kernel, affine.padding
    return (left, k_h - left, top, k_v - top)


def _framed(affine: Affine, zeros: Sides) -> Affine:
    """The same map, its kernel larger by zeros around it, and its padding by as much."""
    return replace(affine, weight=F.pad(affine.weight, zeros), padding=add_sides(affine.padding, zeros))
