"""Planning: the best plan under a latency, given what each site matters (`Found`) and costs (`CostTable`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from .algebra import dtype_of, in_channels
from .errors import BadConfig, MaskMismatch
from .measuring import measure
from .merging import merge
from .profiling import CostTable
from .ranking import Found
from .shrinking import shrink
from .sites import Mask, Plan

Speedup = tuple[float, float, float]  # ratio of medians, and quartiles of the rounds' ratios
MOST = 20_000  # plans of a network's first sites that are kept in mind


class Planned(NamedTuple):
    """A plan, its predicted latency (ms per batch) and the importance that it removes, in sum."""

    plan: Plan
    latency: float
    loss: float


class _Choice(NamedTuple):
    """What can be done with the sites from `first` up to the one that is looked at."""

    first: int
    saving: float
    loss: float
    removed: bool
    dropped: bool = False


class _Front(NamedTuple):
    """Plans of a network's first sites, none of which is worse than another in both: arrays of one length each."""

    saving: np.ndarray
    loss: np.ndarray
    choice: np.ndarray  # index of the last one made
    before: np.ndarray  # index of the plan of the sites before it


def plan(found: Found, cost: CostTable, latency: float, merged: bool = True) -> Plan:
    """The plan within a latency that removes the least importance in sum.

    Args:
        found: what each site, each run of sites that may become one convolution, and each block that may go, matters.
        cost: what each costs on this device.
        latency: of the whole network at most, ms per batch.
        merged: whether every removed site is merged, as by `calibrate`; else it stays linear where that is quicker.
    Raises:
        MaskMismatch: if no plan is that quick (the quickest is named), or a cost is missing, negative or NaN.
    Source: Kim et al., ICML 2023 (dynamic programming over runs); here exact, see `pareto`.
    """
    if math.isnan(latency):
        raise BadConfig("latency: expected milliseconds per batch, found NaN")
    options = _options(found, cost, merged)
    need = cost.total - latency
    fronts = _fronts(options)
    last = fronts[-1]
    enough = np.flatnonzero(last.saving >= need - 1e-9 * cost.total)
    if not len(enough) > 0:
        raise MaskMismatch(
            f"latency: the least that can be reached is {cost.total - last.saving.max():.2f} ms per "
            f"batch, found {latency:g}"
        )
    return _plan_of(fronts, options, int(enough[last.loss[enough].argmin()]), found)


def pareto(found: Found, cost: CostTable, merged: bool = True) -> list[Planned]:
    """All plans that no other beats in both latency and importance removed, the slowest first.

    Exact by dynamic programming over the sites: only plans of the first sites that no other beats can be part of one
    of the whole. (Where they are more than 20,000, of those that save alike to a 20,000th of all the best one stays.)

    Args:
        found, cost, merged: as for `plan`.
    """
    options = _options(found, cost, merged)
    fronts = _fronts(options)
    last = fronts[-1]
    plans = [(_plan_of(fronts, options, int(i), found), float(last.loss[i])) for i in last.saving.argsort()]
    best: list[Planned] = []
    for one in (Planned(p, cost.predict(p, merged), loss) for p, loss in plans[::-1]):  # sums differ by rounding
        if best and one.latency <= best[-1].latency:
            best.pop()
        best.append(one)
    return best[::-1]


class Joint(NamedTuple):
    """One of several networks, what is to be done to it, and the loss that is predicted for it."""

    network: str
    planned: Planned
    loss: float


def joint(networks: Mapping[str, tuple[Found, CostTable]], merged: bool = True) -> list[Joint]:
    """Over several networks (widths of one, say), all plans that no other beats in latency and loss, slowest first.

    Args:
        networks: name -> importances (from `importance`) and costs of the network; all costs are of one device,
            runtime, batch size and image size.
        merged: as for `plan`.
    Raises:
        MaskMismatch: if the costs are of different settings.
    """
    units = {found.unit for found, _ in networks.values()}
    if units != {"nats of cross-entropy"}:
        raise MaskMismatch(
            "expected importances in nats of cross-entropy, to be added to a "
            f"network's own, found {', '.join(map(repr, sorted(units)))}"
        )
    settings = {(c.device, c.runtime, c.batch_size, c.image_size) for _, c in networks.values()}
    if len(settings) != 1:
        raise MaskMismatch(f"costs of different settings cannot be compared: {sorted(settings)}")
    every = [
        Joint(name, planned, found.own + planned.loss)
        for name, (found, cost) in networks.items()
        for planned in pareto(found, cost, merged)
    ]
    best: list[Joint] = []
    for one in sorted(every, key=lambda one: (one.planned.latency, one.loss)):
        if not best or one.loss < best[-1].loss:
            best.append(one)
    return best[::-1]


def for_speedup(
    model: nn.Module,
    found: Found,
    cost: CostTable,
    speedup: float,
    rounds: int = 15,
    runtime: str = "eager",
    precision: str | None = None,
) -> tuple[Plan, Speedup]:
    """The plan that removes the least importance and makes the merged network so many times faster, as measured.

    Predicted latencies are sums over blocks; where the whole network then falls short, more is asked of them.

    Args:
        model: the network that was ranked and profiled.
        found: the importances.
        cost: measured here; the network is timed at its batch size and image size.
        speedup: ratio of medians, BatchNorm folded on both sides.
        rounds: measurements of each network.
        runtime, precision: that the costs were measured on.
    Returns:
        The plan; and the measured speed-up with its quartiles.
    Raises:
        MaskMismatch: if the network is not that fast without all sites whose removal saves time.
    """
    if not speedup > 1:
        raise BadConfig(f"speedup: expected more than 1, found {speedup:g}")
    size, device = cost.image_size, next(model.parameters()).device
    images = torch.randn(cost.batch_size, in_channels(model), size, size, device=device, dtype=dtype_of(model))
    least = cost.total - _fronts(_options(found, cost, merged=True))[-1].saving.max()
    latency = max(cost.total / speedup, least)
    while True:
        best = plan(found, cost, latency)
        networks = {"small": merge(shrink(model, best, image_size=size)), "original": model}
        timing = measure(networks, images, rounds, runtime=runtime, precision=precision)
        reached = timing.speedup("small", over="original")
        if reached[0] >= speedup:
            return best, reached
        if not latency > least:
            raise MaskMismatch(
                f"speedup: at its quickest, with {len(best.mask.removed)} sites removed, the network "
                f"is {reached[0]:.2f} times as fast, expected {speedup:g}"
            )
        slower = min(latency, cost.predict(best, merged=True))
        latency = max(slower - 0.005 * cost.total, least)  # another plan, and not much quicker than need be


def _options(found: Found, cost: CostTable, merged: bool) -> list[list[_Choice]]:
    """For each site what can be done that ends with it: keep, remove or drop it, or merge it with those before it."""
    if not found.unit:
        raise MaskMismatch(
            "these importances only order the sites, their sums mean nothing: take a mask of "
            "them, or importances from `importance` or `rank`"
        )
    same = not (found.network and cost.network) or found.network == cost.network
    if not same:
        raise MaskMismatch("importances and costs are of different networks: profile the one that was ranked")
    if found.image_size not in (0, cost.image_size):
        raise MaskMismatch(
            f"importances are of images of {found.image_size} px, costs of "
            f"{cost.image_size} px: give both the same --image-size"
        )
    cost.check({*found.m, *found.dropped})
    place = {name: i for i, name in enumerate(found.order)}
    options = [[_Choice(i, 0.0, 0.0, False)] for i in range(len(found.order))]
    for name, loss in found.m.items():
        options[place[name]].append(_Choice(place[name], cost.saving((name,), merged), loss, True))
    for name, loss in found.dropped.items():
        options[place[name]].append(_Choice(place[name], cost.kept[name], loss, removed=True, dropped=True))
    for run, loss in found.runs.items():
        if run in cost.runs:
            names = tuple(run.split("+"))
            options[place[names[-1]]].append(_Choice(place[names[0]], cost.saving(names, merged), loss, True))
    losses = [choice.loss for row in options for choice in row]
    if not all(map(math.isfinite, losses)):
        raise MaskMismatch("an importance is NaN or infinite: rank the sites again")
    return options


def _fronts(options: list[list[_Choice]]) -> list[_Front]:
    """After each site, the plans of the sites so far that no other beats."""
    step = max(sum(max(choice.saving for choice in row) for row in options) / MOST, 1e-12)
    nothing = np.zeros(1, dtype=np.int64)
    fronts = [_Front(np.zeros(1), np.zeros(1), nothing, nothing)]
    for row in options:
        parts = []
        for index, choice in enumerate(row):
            before = fronts[choice.first]
            size = len(before.saving)
            made = (before.saving + choice.saving, before.loss + choice.loss, np.full(size, index), np.arange(size))
            parts.append(_Front(*made))
        joined = _Front(*map(np.concatenate, zip(*parts, strict=True)))
        best = _unbeaten(joined, joined.saving)
        fronts.append(best if len(best.saving) <= MOST else _unbeaten(best, np.floor(best.saving / step)))
    return fronts


def _unbeaten(front: _Front, saving: np.ndarray) -> _Front:
    """Those that no other beats in both loss and (so counted) saving, the largest first; that one always stays."""
    saving = saving.copy()
    saving[np.lexsort((front.loss, -front.saving))[0]] = np.inf
    order = np.lexsort((front.loss, -saving))
    loss = front.loss[order]
    least = np.concatenate([[np.inf], np.minimum.accumulate(loss)[:-1]])
    kept = order[loss < least]
    return _Front(*(values[kept] for values in front))


def _plan_of(fronts: list[_Front], options: list[list[_Choice]], index: int, found: Found) -> Plan:
    removed: set[str] = set()
    runs, dropped = [], []
    place = len(options)
    while place:
        front = fronts[place]
        choice = options[place - 1][front.choice[index]]
        names = found.order[choice.first : place]
        if choice.removed:
            removed.update(names)
            if len(names) > 1:
                runs.append(names)
            elif choice.dropped:
                dropped.append(names[0])
        index, place = int(front.before[index]), choice.first
    return Plan(Mask({name: name not in removed for name in found.order}), runs[::-1], dropped[::-1])
