"""Pruning of channels, by the library Torch-Pruning: uniform widths, by magnitude, by Taylor expansion."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..datasets import Data
from ..errors import BadModel, first_line, require
from ..models import find_head
from ..splits import Split
from .budget import Budget, least
from .result import Pruned, ready
from .slim import STEP, blank_image
from .tuning import Clock, Effort, tune


def uniform(model: nn.Module, data: Data, budget: Budget, effort: Effort) -> Pruned:
    """The same share of every layer's channels goes; where weights are inherited, those with the smallest L1 norm.

    Source: the width multiplier of Howard et al., MobileNets, 2017; by norm Li et al., ICLR 2017. Departs from the
    paper's baseline, whose narrow networks are trained from nothing: here so only where the original is not trained.
    """
    clock = Clock(effort.seconds)  # an original without weights has none to give: the narrow one takes all the time
    return _pruned("uniform", model, data, budget, effort, clock, is_global=False, importance=magnitudes)


def magnitude(model: nn.Module, data: Data, budget: Budget, effort: Effort) -> Pruned:
    """Channels with the smallest L1 norm of all layers go, each layer's norms divided by their mean.

    Source: Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017; over coupled layers Fang et al., DepGraph,
    CVPR 2023. At once, and then finetuned.
    """
    clock = Clock(effort.seconds)
    model = ready(model, data, effort, clock)
    return _pruned("magnitude", model, data, budget, effort, clock, is_global=True, importance=magnitudes)


def taylor(model: nn.Module, data: Data, budget: Budget, effort: Effort) -> Pruned:
    """Channels go whose weights times gradients are smallest: the loss that they cost, to first order.

    Source: Molchanov et al., Importance Estimation for Neural Network Pruning, CVPR 2019; over coupled layers as for
    `magnitude`. At once, and then finetuned.
    """
    clock = Clock(effort.seconds)
    model = ready(model, data, effort, clock)
    with clock.part("importance"):
        gradients = _gradients(model, data.train.first(effort.images, effort.seed), effort.batch_size)

    def importance(network: nn.Module) -> Any:
        import torch_pruning

        for parameter, gradient in zip(network.parameters(), gradients, strict=True):
            parameter.grad = gradient.clone()
        return torch_pruning.importance.GroupTaylorImportance()

    return _pruned("taylor", model, data, budget, effort, clock, is_global=True, importance=importance)


def cut(
    model: nn.Module, strength: float, image_size: int, is_global: bool, importance: Callable[[nn.Module], Any]
) -> nn.Module:
    """A copy without a share of its channels; of each group of coupled ones a multiple of `STEP` stays.

    Args:
        model: the network.
        strength: share of the channels that go, 0 to 1.
        image_size: side in pixels.
        is_global: whether groups' channels compete with each other, each importance divided by its group's mean.
        importance: a copy of the network -> an importance of Torch-Pruning.
    Raises:
        BadModel: if Torch-Pruning cannot prune the network.
    """
    import torch_pruning

    small = copy.deepcopy(model).eval()
    image = blank_image(model, image_size)
    try:
        graph = torch_pruning.DependencyGraph().build_dependency(small, image)
        groups = list(graph.get_all_groups(ignored_layers=[find_head(small)[1]], root_module_types=[nn.Conv2d]))
        measure = importance(small)
        scores = [measure(group) for group in groups]
        for group, score, going in zip(groups, scores, _how_many(scores, strength, is_global), strict=True):
            if going:
                first, lowest = group[0].dep, score.argsort()[:going].tolist()
                graph.get_pruning_group(first.target.module, first.handler, lowest).prune()
        with torch.no_grad():
            same = small(image).shape == model.eval()(image).shape
    except (RuntimeError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise BadModel(f"Torch-Pruning cannot prune this network: {first_line(error)}") from error
    require(same, "Torch-Pruning changed the number of outputs of this network", BadModel)
    small.zero_grad()
    return small


def _how_many(scores: Sequence[Tensor], strength: float, is_global: bool) -> list[int]:
    """Channels of each group that go, so that multiples of `STEP` stay."""
    if is_global:
        relative = [score / score.mean().clamp(min=1e-12) for score in scores]
        order = torch.cat(relative).sort()[0]
        bound = order[min(int(strength * len(order)), len(order) - 1)]
        shares = [(score < bound).double().mean().item() if strength < 1 else 1.0 for score in relative]
    else:
        shares = [strength] * len(scores)
    going = []
    for share, score in zip(shares, scores, strict=True):
        staying = max(STEP, STEP * math.ceil((1 - share) * len(score) / STEP))
        going.append(max(0, len(score) - staying))
    return going


def _pruned(
    name: str, model: nn.Module, data: Data, budget: Budget, effort: Effort, clock: Clock, is_global: bool,
    importance: Callable[[nn.Module], Any],
) -> Pruned:  # fmt: skip
    """Pruned as far as the budget asks, then trained for the rest of the time."""

    def make(strength: float) -> tuple[nn.Module, tuple[float, nn.Module]]:
        small = cut(model, strength, data.image_size, is_global, importance)
        return small, (strength, small)

    (strength, small), _ = least(budget, model, make, what=name)
    teacher = model if effort.distil else None
    done, history = tune(small, data, teacher, effort, clock)
    return Pruned(done, {"strength": strength, "seconds": clock.spent, "history": history})


def magnitudes(_: nn.Module) -> Any:
    """The L1 norms of coupled channels, summed over layers."""
    import torch_pruning

    return torch_pruning.importance.GroupMagnitudeImportance(p=1)


def _gradients(model: nn.Module, images: Split, batch_size: int) -> tuple[Tensor, ...]:
    """Of the mean cross-entropy of some images, for each parameter."""
    network, device = copy.deepcopy(model).eval().requires_grad_(True), next(model.parameters()).device
    for x, y in images.batches(batch_size):
        loss = F.cross_entropy(network(x.to(device)), y.to(device), reduction="sum") / len(images)
        loss.backward()
    return tuple(torch.zeros_like(p) if p.grad is None else p.grad for p in network.parameters())
