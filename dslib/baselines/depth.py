"""Methods that take activations out: the paper's search, its masks, Layer Folding, and ours."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from ..calibrating import Calibrate, calibrate
from ..data import Data, hold_back
from ..finetuning import Finetune
from ..merging import merge
from ..planning import pareto
from ..profiling import CostTable
from ..ranking import rank
from ..searching import Search, search
from ..shrinking import fade, shrink
from ..sites import Mask, Plan, Sites, find_sites
from ..training import Train
from .budget import Budget, least
from .channels import narrowed
from .choosing import masks_of, paper_masks, train_slopes, useful
from .result import Pruned, ready
from .tuning import Clock, Effort, Portion, per_image, planned, pretrain, start, tune, with_new_statistics

LATENCY_WEIGHT = 0.3  # of the paper's search, see `dslib bench sign`
RECOVERED_ON, REACH = 2**19, 4  # pixels, if `few` images have so many; and blocks: a ranking must leave time to train
SEARCHING = 1.15  # times as long a step takes with gates, see `dslib bench steps`


def depthshrinker(model: nn.Module, data: Data, budget: Budget, effort: Effort) -> Pruned:
    """The paper's search with latency-aware decay, its largest mask within the budget, finetuned, merged.

    Source: Fu et al., ICML 2022. Departs: one search gives the masks of every k, activations fade out (an option of the
    released code), no boundary activation (see `dslib bench ablation`).
    """
    clock = start(model, effort)
    model = ready(model, data, effort, clock)
    sites, cost = _measured(model, data, budget)
    with clock.part("search"):
        part = _search_time(model, data, effort, clock)
        k = max(1, len(sites.always_kept), len(sites) // 2)
        found = search(
            model,
            part.data,
            sites,
            cost,
            Search(
                k=k,
                latency_weight=LATENCY_WEIGHT,
                epochs=part.epochs,
                lr=effort.search_lr,
                batch_size=effort.batch_size,
                seed=effort.seed,
            ),
        )
    return _shrunk("depthshrinker", model, model, data, budget, effort, clock, masks_of(sites, found.scores), cost)


def layer_folding(model: nn.Module, data: Data, budget: Budget, effort: Effort) -> Pruned:
    """Activations become linear by degrees that are trained with the weights; the most linear ones go.

    Source: Dror et al., Layer Folding, 2021. Departs: the activations of a block share one degree, and what is removed
    is what the budget asks, not what passes a threshold: those go at once, the others are whole again.
    """
    clock = start(model, effort)
    model = ready(model, data, effort, clock)
    sites, cost = _measured(model, data, budget)
    with clock.part("search"):
        part = _search_time(model, data, effort, clock)
        config = Train(part.epochs, effort.search_lr, effort.batch_size, seed=effort.seed)
        degrees, folded = train_slopes(model, part.data, sites, config)
    masks = masks_of(sites, degrees)
    return _shrunk("layer folding", folded, model, data, budget, effort, clock, masks, cost, fading=False)


def given_masks(model: nn.Module, data: Data, budget: Budget, effort: Effort) -> Pruned:
    """The paper's masks A to F, the first that is quick enough; for networks with MobileNetV2's 17 sites.

    Source: Fu et al., ICML 2022: found for width 1.4 on ImageNet and a Tesla V100; here for whatever is at hand.
    """
    clock = start(model, effort)
    sites, cost = _measured(model, data, budget)
    masks = paper_masks(model, data, sites, cost, effort.seed)
    return _shrunk("given masks", model, model, data, budget, effort, clock, masks, cost)


def planner(model: nn.Module, data: Data, budget: Budget, effort: Effort) -> Pruned:
    """Ours: what merging each block does, or dropping it; the best plan within the budget, calibrated, finetuned.

    What it does is the divergence from the original on other images, which needs no labels and fewer images than a
    loss does: what labels say of a few hundred images is mostly chance.

    Source: importances and dynamic program after Kim et al., ICML 2023 and 2024 (LayerMerge), see `rank`.
    """
    clock = start(model, effort)
    return _planned("planner", ready(model, data, effort, clock), model, data, budget, effort, clock, {})


def narrow_and_shrunk(model: nn.Module, data: Data, budget: Budget, effort: Effort) -> Pruned:
    """Ours, of a narrower network: channels give one half of the speed-up (its root), depth the other.

    Channels go uniformly by L1 norm; the narrow network is trained for its share of the time, then planned, calibrated
    and finetuned.
    """
    clock = start(model, effort)
    narrow, strength = narrowed(model, data, replace(budget, speedup=budget.speedup**0.5), effort, clock)
    narrow = with_new_statistics(narrow, data, effort, clock)
    narrow = pretrain(narrow, data, effort, clock, "narrowing", model if effort.distil else None)
    return _planned("narrow and shrunk", narrow, model, data, budget, effort, clock, {"strength": strength})


def _planned(
    name: str,
    model: nn.Module,
    original: nn.Module,
    data: Data,
    budget: Budget,
    effort: Effort,
    clock: Clock,
    more: dict[str, object],
) -> Pruned:
    """OperatingPoint, calibrated and finetuned, so that it is quick enough over the original."""
    sites, cost = _measured(model, data, budget)
    with clock.part("ranking"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*: give more images")  # there is no time for more
        count = min(effort.few, math.ceil(RECOVERED_ON / data.image_size**2))
        recover, held = hold_back(data.train.first(count + effort.few, effort.seed), count)[::-1]
        found = rank(model, sites, recover, Calibrate(reach=REACH, seed=effort.seed), False, drop=True, held=held)
    plan = _first_quick_enough(name, [one.plan for one in pareto(found, cost)], model, original, budget, clock)
    with clock.part("calibration"):
        images = data.train.first(effort.images, effort.seed)
        small = calibrate(model, plan, images, Calibrate(seed=effort.seed), progress=False).model
    done, history = tune(small, data, original if effort.distil else None, effort, clock)
    record = {"removed": list(plan.mask.removed), "dropped": plan.dropped, "seconds": clock.spent, "history": history}
    return Pruned(done, {**more, **record})


def _shrunk(
    name: str,
    model: nn.Module,
    original: nn.Module,
    data: Data,
    budget: Budget,
    effort: Effort,
    clock: Clock,
    masks: Sequence[Mask],
    cost: CostTable,
    fading: bool = True,
) -> Pruned:
    """The first of several masks, most kept first, that is quick enough; its activations fade out, or go at once.

    A site whose removal costs time is kept all the same, as the planner keeps it.
    """
    plans = [Plan(mask) for mask in dict.fromkeys(useful(masks, cost))]
    mask = _first_quick_enough(name, plans, model, original, budget, clock).mask
    if fading:
        small = fade(model, mask, None, data.image_size)
    else:
        small = with_new_statistics(shrink(model, mask, None, data.image_size), data, effort, clock)
    done, history = tune(small, data, original if effort.distil else None, effort, clock)
    return Pruned(merge(done), {"removed": list(mask.removed), "seconds": clock.spent, "history": history})


def _first_quick_enough(
    name: str, plans: Sequence[Plan], model: nn.Module, original: nn.Module, budget: Budget, clock: Clock
) -> Plan:
    """The first of several plans, slowest first, with which the merged network is as quick as asked for."""

    def make(strength: float) -> tuple[nn.Module, Plan]:
        plan = plans[round(strength * (len(plans) - 1))]
        return merge(shrink(model, plan, image_size=budget.image_size)), plan

    return least(budget, original, make, clock, 1 + math.ceil(math.log2(len(plans))), name)


def _measured(model: nn.Module, data: Data, budget: Budget) -> tuple[Sites, CostTable]:
    """Sites, and what each costs on the device, runtime and batch of the budget."""
    sites = find_sites(model, data.image_size)
    return sites, budget.cost(model, sites)


def _search_time(model: nn.Module, data: Data, effort: Effort, clock: Clock) -> Portion:
    """What a search may train on: its share of the time that is left."""
    config = Finetune(lr=effort.search_lr, batch_size=effort.batch_size, seed=effort.seed)
    each = SEARCHING * per_image(model, data, None, config, clock)
    return planned(data, effort.share * clock.left(), each, config, clock)
