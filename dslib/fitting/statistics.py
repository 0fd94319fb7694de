"""Feature statistics matching: a channel gets the mean and spread that it has in the original."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .layers import FittedLayer, conv_at, outputs_at, values_at
from .replaying import Rest


class Moments:
    """Mean and standard deviation of each channel, from sums over batches."""

    def __init__(self) -> None:
        self.count = 0
        self.total, self.squares = torch.zeros(()), torch.zeros(())

    def add(self, maps: Tensor) -> None:
        """A batch, (N, C, H, W)."""
        values = maps.to(torch.promote_types(maps.dtype, torch.float32)).transpose(0, 1).flatten(1)
        self.count += values.shape[1]
        self.total = self.total + values.sum(1).cpu().double()
        self.squares = self.squares + values.square().sum(1).cpu().double()

    @property
    def mean(self) -> Tensor:
        """(C,)."""
        return self.total / self.count

    @property
    def spread(self) -> Tensor:
        """The standard deviation, (C,)."""
        return (self.squares / self.count - self.mean.square()).clamp_min(0).sqrt()


def moments_at(original: nn.Module, layers: list[FittedLayer], batches: Iterable[Tensor]) -> dict[str, Moments]:
    """What the original's channels have where the layers' are to be changed: name -> moments."""
    found = {layer.name: Moments() for layer in layers}
    outputs_at(original, layers, batches, lambda name, output: found[name].add(output))
    return found


def match_statistics(
    layer: FittedLayer, wanted: Moments, rest: Rest, small: nn.Module, batches: Iterable[Tensor]
) -> None:
    """Give each channel of a convolution the wanted mean and spread; the spread is at most doubled or halved.

    In the network that runs, its BatchNorms folded, and in the `small` one, which has them.
    """
    found = Moments()
    for i, images in enumerate(batches):
        found.add(values_at(rest.at(i), images, layer)[0])
    conv = conv_at(rest.network, layer.conv)
    assert conv.bias is not None
    like = conv.bias.new_zeros((), dtype=torch.promote_types(conv.bias.dtype, torch.float32))
    factor = (wanted.spread / found.spread.clamp_min(1e-12)).clamp(0.5, 2)
    factor, shift = factor.to(like), (wanted.mean - factor * found.mean).to(like)
    bias = conv.bias * (factor - 1) + shift
    layer.change(rest.network, small, conv.weight * (factor - 1)[:, None, None, None], bias)
