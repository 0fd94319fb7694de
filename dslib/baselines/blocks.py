"""Layer-wise pruning: whole residual blocks go, the least important first."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..algebra import droppable
from ..data import Data
from ..errors import BadModel
from ..shrinking import shrink
from ..sites import Mask, Plan, find_sites
from ..training import loss_on
from .budget import Budget, least
from .result import Pruned, ready
from .tuning import Effort, start, tune, with_new_statistics


def layers(model: nn.Module, data: Data, budget: Budget, effort: Effort) -> Pruned:
    """Blocks whose output has the shape of their input go: those first whose removal alone raises the loss least.

    Source: Chen and Zhao, Shallowing Deep Networks, TPAMI 2019, which DepthShrinker compares with; there linear
    probes tell what a layer matters, here the cross-entropy on some training images.

    Raises:
        BadModel: if no block can go.
    """
    clock = start(model, effort)
    model = ready(model, data, effort, clock)
    sites = find_sites(model, data.image_size)
    names = droppable(model, sites.names, data.image_size)
    if not names:
        raise BadModel("no block gives maps of the shape that it takes: no layer can be removed whole")

    def without(removed: Sequence[str]) -> nn.Module:
        return shrink(
            model,
            Plan(Mask({name: name not in removed for name in sites.names}), dropped=removed),
            image_size=data.image_size,
        )

    images = data.train.first(effort.few, effort.seed)
    with clock.part("importance"):
        losses = {name: loss_on(without([name]), images) for name in names}
    order = sorted(names, key=losses.__getitem__)

    def make(strength: float) -> tuple[nn.Module, list[str]]:
        removed = order[: round(strength * len(order))]
        return without(removed), removed

    removed = least(budget, model, make, clock, what="layers")
    teacher = model if effort.distil else None
    small = with_new_statistics(without(removed), data, effort, clock)
    done, history = tune(small, data, teacher, effort, clock)
    return Pruned(done, {"removed": removed, "seconds": clock.spent, "history": history})
