"""Pruning of channels, by the library Torch-Pruning: uniform widths, by magnitude, by Taylor expansion."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import Data, Split
from ..errors import BadModel, first_line
from ..models import find_head
from .budget import Budget, least
from .result import Pruned, ready
from .slim import STEP, UNKNOWN, blank_image, coupled
from .tuning import Clock, Effort, start, tune, with_new_statistics

Score = Callable[[Any], Tensor]
Importance = Callable[[nn.Module], Score]


def uniform(model: nn.Module, data: Data, budget: Budget, effort: Effort) -> Pruned:
    """The same share of every layer's channels goes; where weights are inherited, those with the smallest L1 norm.

    Source: the width multiplier of Howard et al., MobileNets, 2017; by norm Li et al., ICLR 2017. Departs from the
    paper's baseline, whose narrow networks are trained from nothing: here so only where the original is not trained.
    """
    clock = start(model, effort)  # an original without weights has none to give: the narrow one takes all the time
    small, strength = narrowed(model, data, budget, effort, clock)
    return _finetuned(small, strength, model, data, effort, clock)


def narrowed(model: nn.Module, data: Data, budget: Budget, effort: Effort, clock: Clock) -> tuple[nn.Module, float]:
    """The network with so small a share of every layer's channels gone that it meets the budget; and the share."""
    return _pruned("uniform", model, data, budget, clock, magnitudes, compete=False)


def magnitude(model: nn.Module, data: Data, budget: Budget, effort: Effort) -> Pruned:
    """Channels with the smallest L1 norm of all layers go, each layer's norms divided by their mean.

    Source: Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017; over coupled layers Fang et al., DepGraph,
    CVPR 2023. At once, and then finetuned.
    """
    clock = start(model, effort)
    model = ready(model, data, effort, clock)
    small, strength = _pruned("magnitude", model, data, budget, clock, magnitudes, compete=True)
    return _finetuned(small, strength, model, data, effort, clock)


def taylor(model: nn.Module, data: Data, budget: Budget, effort: Effort) -> Pruned:
    """Channels go whose weights times gradients are smallest: about the loss that they cost.

    Source: Molchanov et al., Importance Estimation for Neural Network Pruning, CVPR 2019: of a channel's weights times
    gradients the sum, squared, batch by batch; over coupled layers as for `magnitude`. At once, and then finetuned.
    """
    clock = start(model, effort)
    model = ready(model, data, effort, clock)
    with clock.part("importance"):
        gradients = list(_gradients(model, data.train.first(effort.images, effort.seed), effort.batch_size))
    small, strength = _pruned("taylor", model, data, budget, clock, partial(taylors, gradients), compete=True)
    return _finetuned(small, strength, model, data, effort, clock)


def cut(model: nn.Module, strength: float, image_size: int, importance: Importance, compete: bool) -> nn.Module:
    """A copy without a share of its channels; of each group of coupled ones a multiple of `STEP` stays.

    Args:
        model: the network.
        strength: share of the channels that go, 0 to 1.
        image_size: side in pixels.
        importance: a copy of the network -> scores of the channels of a group of Torch-Pruning.
        compete: whether groups' channels compete with each other; else the same share of each goes.
    Raises:
        BadModel: if Torch-Pruning cannot prune the network.
    """
    small = copy.deepcopy(model).eval()
    try:
        graph, groups = coupled(small, image_size)
        measure = importance(small)
        scores = [measure(group) for group in groups]
        for group, score, going in zip(groups, scores, _how_many(scores, strength, compete), strict=True):
            if going:
                first, lowest = group[0].dep, score.argsort()[:going].tolist()
                graph.get_pruning_group(first.target.module, first.handler, lowest).prune()
        with torch.no_grad():
            classes = small(blank_image(model, image_size)).shape[1]
    except UNKNOWN as error:
        raise BadModel(f"Torch-Pruning cannot prune this network: {first_line(error)}") from error
    if classes != find_head(model)[1].out_features:
        raise BadModel("Torch-Pruning took classes away")
    small.zero_grad()
    return small


def _how_many(scores: Sequence[Tensor], strength: float, compete: bool) -> list[int]:
    """Channels of each group that go, so that multiples of `STEP` stay."""
    shares = [strength] * len(scores)
    if compete and strength < 1:
        order = torch.cat(list(scores)).sort()[0]
        bound = order[min(int(strength * len(order)), len(order) - 1)]
        shares = [(score < bound).double().mean().item() for score in scores]
    going = []
    for share, score in zip(shares, scores, strict=True):
        staying = max(STEP, STEP * math.ceil((1 - share) * len(score) / STEP))
        going.append(max(0, len(score) - staying))
    return going


def _pruned(
    name: str, model: nn.Module, data: Data, budget: Budget, clock: Clock, importance: Importance, compete: bool
) -> tuple[nn.Module, float]:
    """Pruned as far as the budget asks; and how far."""

    def make(strength: float) -> tuple[nn.Module, tuple[nn.Module, float]]:
        small = cut(model, strength, data.image_size, importance, compete)
        return small, (small, strength)

    return least(budget, model, make, clock, what=name)


def _finetuned(small: nn.Module, strength: float, model: nn.Module, data: Data, effort: Effort, clock: Clock) -> Pruned:
    small = with_new_statistics(small, data, effort, clock)
    done, history = tune(small, data, model if effort.distil else None, effort, clock)
    return Pruned(done, {"strength": strength, "seconds": clock.spent, "history": history})


def magnitudes(_: nn.Module) -> Score:
    """The L1 norms of channels, their mean over the layers that share them, each group's divided by their mean."""
    import torch_pruning

    score: Score = torch_pruning.importance.GroupMagnitudeImportance(p=1, normalizer="mean")
    return score


def taylors(gradients: Sequence[Sequence[Tensor]], network: nn.Module) -> Score:
    """Sums of weights times gradients, of each channel and batch over the layers that share it, squared and added up.

    Args:
        gradients: of each batch, for each of the network's parameters.
        network: of the groups.
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
