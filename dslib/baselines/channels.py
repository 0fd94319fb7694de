"""Pruning of channels, by the library Torch-Pruning: uniform widths, by magnitude, by Taylor expansion."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import Split
from .coupling import Score, Scorer, cut
from .trial import Pruned, Trial


def uniform(trial: Trial) -> Pruned:
    """The same share of every layer's channels goes; where weights are inherited, those with the smallest L1 norm.

    Source: the width multiplier of Howard et al., MobileNets, 2017; by norm Li et al., ICLR 2017. Departs from the
    paper's baseline, whose narrow networks are trained from nothing: here so only where the original is not trained.
    """
    small, strength = narrowed(trial)  # an original without weights has none to give: this takes all the time
    return trial.finish(trial.with_new_statistics(small), strength=strength)


def narrowed(trial: Trial) -> tuple[nn.Module, float]:
    """The network with so small a share of every layer's channels gone that it meets the budget; and the share."""
    return _pruned("uniform", trial, trial.original, magnitudes, compete=False)


def magnitude(trial: Trial) -> Pruned:
    """Channels with the smallest L1 norm of all layers go, each layer's norms divided by their mean.

    Source: Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017; over coupled layers Fang et al., DepGraph,
    CVPR 2023. At once, and then finetuned.
    """
    small, strength = _pruned("magnitude", trial, trial.trained(), magnitudes, compete=True)
    return trial.finish(trial.with_new_statistics(small), strength=strength)


def taylor(trial: Trial) -> Pruned:
    """Channels go whose weights times gradients are smallest: about the loss that they cost.

    Source: Molchanov et al., Importance Estimation for Neural Network Pruning, CVPR 2019: of a channel's weights times
    gradients the sum, squared, batch by batch; over coupled layers as for `magnitude`. At once, and then finetuned.
    """
    model, effort = trial.trained(), trial.effort
    with trial.clock.part("importance"):
        images = trial.data.train.first(effort.images, effort.seed)
        gradients = list(_gradients(model, images, effort.batch_size))
    small, strength = _pruned("taylor", trial, model, partial(taylors, gradients), compete=True)
    return trial.finish(trial.with_new_statistics(small), strength=strength)


def _pruned(name: str, trial: Trial, model: nn.Module, scorer: Scorer, compete: bool) -> tuple[nn.Module, float]:
    """Pruned as far as the budget asks; and how far."""

    def make(strength: float) -> tuple[nn.Module, tuple[nn.Module, float]]:
        small = cut(model, strength, trial.data.image_size, scorer, compete)
        return small, (small, strength)

    return trial.least(make, name)


def magnitudes(_: nn.Module) -> Score:
    """The L1 norms of channels, their mean over the layers that share them, each group's divided by their mean."""
    import torch_pruning

    score: Score = torch_pruning.importance.GroupMagnitudeImportance(p=1, normalizer="mean")
    return score


def taylors(gradients: Sequence[Sequence[Tensor]], network: nn.Module) -> Score:
    """Sums of weights times gradients, of each channel and batch over the layers that share it, squared and added up.

    Args:
        gradients: of each batch, for each of the network's parameters.
    """
    import torch_pruning

    own = torch_pruning.importance.GroupTaylorImportance(group_reduction="sum", normalizer=None, multivariable=True)

    def score(group: Any) -> Tensor:
        found = []
        for batch in gradients:
            for parameter, gradient in zip(network.parameters(), batch, strict=True):
                parameter.grad = gradient
            found.append(own(group).square())
        return torch.stack(found).sum(0)

    return score


def _gradients(model: nn.Module, images: Split, batch_size: int) -> Iterator[tuple[Tensor, ...]]:
    """Of the cross-entropy of each batch of some images, for each parameter."""
    network, device = copy.deepcopy(model).eval().requires_grad_(True), next(model.parameters()).device
    for x, y in images.batches(batch_size):
        network.zero_grad()
        F.cross_entropy(network(x.to(device)), y.to(device)).backward()
        yield tuple(torch.zeros_like(p) if p.grad is None else p.grad for p in network.parameters())
