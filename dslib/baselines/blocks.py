"""Layer-wise pruning: whole residual blocks go, the least important first."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..algebra import droppable
from ..errors import BadModel
from ..shrinking import shrink
from ..sites import Mask, Plan, find_sites
from ..training import loss_on
from .trial import Pruned, Trial


def layers(trial: Trial) -> Pruned:
    """Blocks whose output has the shape of their input go: those first whose removal alone raises the loss least.

    Source: Chen and Zhao, Shallowing Deep Networks, TPAMI 2019, which DepthShrinker compares with; there linear
    probes tell what a layer matters, here the cross-entropy on some training images.

    Raises:
        BadModel: if no block can go.
    """
    model, size = trial.trained(), trial.data.image_size
    sites = find_sites(model, size)
    names = droppable(model, sites.names, size)
    if not names:
        raise BadModel("no block gives maps of the shape that it takes: no layer can be removed whole")

    def without(removed: Sequence[str]) -> nn.Module:
        mask = Mask({name: name not in removed for name in sites.names})
        return shrink(model, Plan(mask, dropped=removed), image_size=size)

    images = trial.data.train.first(trial.effort.few, trial.effort.seed)
    with trial.clock.part("importance"):
        losses = {name: loss_on(without([name]), images) for name in names}
    order = sorted(names, key=losses.__getitem__)

    def make(strength: float) -> tuple[nn.Module, list[str]]:
        removed = order[: round(strength * len(order))]
        return without(removed), removed

    removed = trial.least(make, "layers")
    return trial.finish(trial.with_new_statistics(without(removed)), removed=removed)
