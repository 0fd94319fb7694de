"""Layer-wise pruning: whole residual blocks go, the least important first."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ..datasets import Data
from ..errors import BadModel, require
from ..evaluating import loss_of, predict
from ..sites import find_sites
from .budget import Budget, least
from .result import Pruned, ready
from .slim import blank_image
from .tuning import Effort, start, tune


def layers(model: nn.Module, data: Data, budget: Budget, effort: Effort) -> Pruned:
    """Residual blocks are replaced by their shortcut: those go first whose removal alone raises the loss least.

    Source: Chen and Zhao, Shallowing Deep Networks, TPAMI 2019, which DepthShrinker compares with; there linear
    probes tell what a layer matters, here the cross-entropy on some training images.
    """
    clock = start(model, effort)
    model = ready(model, data, effort, clock)
    names = removable(model, data.image_size)
    images = data.train.first(effort.images, effort.seed)
    with clock.part("importance"):
        losses = {name: loss_of(predict(without(model, [name]), images), images) for name in names}
    order = sorted(names, key=losses.__getitem__)

    def make(strength: float) -> tuple[nn.Module, list[str]]:
        removed = order[: round(strength * len(order))]
        return without(model, removed), removed

    removed = least(budget, model, make, clock, what="layers")
    teacher = model if effort.distil else None
    done, history = tune(without(model, removed), data, teacher, effort, clock)
    return Pruned(done, {"removed": removed, "seconds": clock.spent, "history": history})


def removable(model: nn.Module, image_size: int) -> list[str]:
    """Blocks that give maps of the shape that they take, so that nothing need be put in their place.

    Raises:
        BadModel: if there is none.
    """
    names = find_sites(model, image_size).names
    same: dict[str, bool] = {}

    def note(name: str, _: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        same[name] = given[0].shape == output.shape

    copied = copy.deepcopy(model).eval()
    for name in names:
        copied.get_submodule(name).register_forward_hook(partial(note, name))
    with torch.no_grad():
        copied(blank_image(model, image_size))
    found = [name for name in names if same.get(name)]
    require(bool(found), "no block gives maps of the shape that it takes: no layer can be removed whole", BadModel)
    return found


def without(model: nn.Module, names: Sequence[str]) -> nn.Module:
    """A copy in which some blocks are the identity."""
    small = copy.deepcopy(model)
    for name in names:
        small.set_submodule(name, nn.Identity())
    return small
