"""Methods that take activations out: the paper's search, its masks, Layer Folding, and ours."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from ..calibrating import Calibrate, calibrate
from ..data import Data, cut
from ..finetuning import Finetune, finetune
from ..merging import merge
from ..planning import pareto
from ..profiling import CostTable
from ..ranking import rank
from ..searching import Search, search
from ..shrinking import fade, shrink
from ..sites import Mask, Plan, Sites, find_sites
from ..training import Train, Trained
from .channels import narrowed
from .choosing import masks_of, paper_masks, train_slopes, useful
from .trial import Pruned, Trial
from .tuning import Portion, per_image, portion_for

LATENCY_WEIGHT = 0.3  # of the paper's search, see `dslib bench sign`
RECOVERED_ON, REACH = 2**19, 4  # pixels, if `few` images have so many; and blocks: a ranking must leave time to train
SEARCHING = 1.15  # times as long a step takes with gates, see `dslib bench steps`


def depthshrinker(trial: Trial) -> Pruned:
    """The paper's search with latency-aware decay, its largest mask within the budget, finetuned, merged.

    Source: Fu et al., ICML 2022. Departs: one search gives the masks of every k, activations fade out (an option of the
    released code), no boundary activation (see `dslib bench ablation`).
    """
    model, effort = trial.trained(), trial.effort
    sites, cost = _measured(trial, model)
    with trial.clock.part("search"):
        part = _search_time(trial, model)
        config = Search(
            k=max(1, len(sites.always_kept), len(sites) // 2),
            latency_weight=LATENCY_WEIGHT,
            epochs=part.epochs,
            lr=effort.search_lr,
            batch_size=effort.batch_size,
            seed=effort.seed,
        )
        found = search(model, part.data, sites, cost, config)
    mask = _first_mask("depthshrinker", trial, model, masks_of(sites, found.scores), cost)
    return _merged(trial, fade(model, mask, None, trial.data.image_size), mask)


def layer_folding(trial: Trial) -> Pruned:
    """Activations become linear by degrees that are trained with the weights; the most linear ones go.

    Source: Dror et al., Layer Folding, 2021. Departs: the activations of a block share one degree, and what is removed
    is what the budget asks, not what passes a threshold: those go at once, the others are whole again.
    """
    model, effort = trial.trained(), trial.effort
    sites, cost = _measured(trial, model)
    with trial.clock.part("search"):
        part = _search_time(trial, model)
        config = Train(part.epochs, effort.search_lr, effort.batch_size, seed=effort.seed)
        degrees, folded = train_slopes(model, part.data, sites, config)
    mask = _first_mask("layer folding", trial, folded, masks_of(sites, degrees), cost)
    small = shrink(folded, mask, None, trial.data.image_size)
    return _merged(trial, trial.with_new_statistics(small), mask)


def given_masks(trial: Trial) -> Pruned:
    """The paper's masks A to F, the first that is quick enough; for networks with MobileNetV2's 17 sites.

    Source: Fu et al., ICML 2022: found for width 1.4 on ImageNet and a Tesla V100; here for whatever is at hand.
    """
    model = trial.original
    sites, cost = _measured(trial, model)
    masks = paper_masks(model, trial.data, sites, cost, trial.effort.seed)
    mask = _first_mask("given masks", trial, model, masks, cost)
    return _merged(trial, fade(model, mask, None, trial.data.image_size), mask)


def planner(trial: Trial) -> Pruned:
    """Ours: what merging each block does, or dropping it; the best plan within the budget, calibrated, finetuned.

    What it does is the divergence from the original on other images, which needs no labels and fewer images than a
    loss does: what labels say of a few hundred images is mostly chance.

    Source: importances and dynamic program after Kim et al., ICML 2023 and 2024 (LayerMerge), see `rank`.
    """
    return _plan_and_calibrate("planner", trial, trial.trained())


def narrow_and_shrunk(trial: Trial) -> Pruned:
    """Ours, of a narrower network: channels give one half of the speed-up (its root), depth the other.

    Channels go uniformly by L1 norm; the narrow network is trained for its share of the time, then planned, calibrated
    and finetuned.
    """
    half = copy.copy(trial)  # on the same clock
    half.budget = replace(trial.budget, speedup=trial.budget.speedup**0.5)
    narrow, strength = narrowed(half)
    narrow = trial.pretrain(trial.with_new_statistics(narrow), "narrowing", trial.teacher)
    return _plan_and_calibrate("narrow and shrunk", trial, narrow, strength=strength)


def _plan_and_calibrate(name: str, trial: Trial, model: nn.Module, **found: Any) -> Pruned:
    """The best plan with which a network is quick enough over the original; calibrated and finetuned."""
    data, effort = trial.data, trial.effort
    sites, cost = _measured(trial, model)
    with trial.clock.part("ranking"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*: give more images")  # there is no time for more
        count = min(effort.few, math.ceil(RECOVERED_ON / data.image_size**2))
        recover, held = cut(data.train.first(count + effort.few, effort.seed), count)[::-1]
        ranked = rank(model, sites, recover, Calibrate(reach=REACH, seed=effort.seed), False, drop=True, held=held)
    plan = _first_quick_enough(name, trial, model, [point.plan for point in pareto(ranked, cost)])
    with trial.clock.part("calibration"):
        images = data.train.first(effort.images, effort.seed)
        small = calibrate(model, plan, images, Calibrate(seed=effort.seed), progress=False).model
    return trial.finish(small, **found, removed=list(plan.mask.removed), dropped=plan.dropped)


def _first_mask(name: str, trial: Trial, model: nn.Module, masks: Sequence[Mask], cost: CostTable) -> Mask:
    """The first of several masks, most kept first, that is quick enough.

    A site whose removal costs time is kept all the same, as the planner keeps it.
    """
    return _first_quick_enough(name, trial, model, [Plan(mask) for mask in dict.fromkeys(useful(masks, cost))]).mask


def _first_quick_enough(name: str, trial: Trial, model: nn.Module, plans: Sequence[Plan]) -> Plan:
    """The first of several plans, slowest first, with which the merged network is as quick as asked for."""

    def make(strength: float) -> tuple[nn.Module, Plan]:
        plan = plans[round(strength * (len(plans) - 1))]
        return merge(shrink(model, plan, image_size=trial.budget.image_size)), plan

    return trial.least(make, name, steps=1 + math.ceil(math.log2(len(plans))))


def _merged(trial: Trial, small: nn.Module, mask: Mask) -> Pruned:
    """Finetuned, and merged then."""
    done = trial.finish(small, removed=list(mask.removed))
    return done._replace(model=merge(done.model))


def _measured(trial: Trial, model: nn.Module) -> tuple[Sites, CostTable]:
    """Sites, and what each costs on the device, runtime and batch of the budget."""
    sites = find_sites(model, trial.data.image_size)
    return sites, trial.budget.cost(model, sites)


def _search_time(trial: Trial, model: nn.Module) -> Portion:
    """What a search may train on: its share of the time that is left."""
    config = trial.effort.search_config

    def training(data: Data, config: Finetune) -> Trained:
        return finetune(model, data, None, config)

    each = SEARCHING * per_image(training, trial.data, config, trial.clock)
    return portion_for(trial.data, trial.effort.share * trial.clock.left(), each, config, trial.clock)
