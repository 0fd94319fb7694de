"""Planning: the best plan under a latency, given what each site matters (`Importances`) and costs (`CostTable`)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import nn

from .algebra import dtype_of, in_channels
from .errors import BadConfig, MaskMismatch
from .measuring import measure
from .merging import merge
from .profiling import CostTable
from .ranking import Importances
from .shrinking import shrink
from .sites import Mask, Plan

Speedup = tuple[float, float, float]  # ratio of medians, and quartiles of the rounds' ratios
MOST = 20_000  # plans of a network's first sites that are kept in mind


class OperatingPoint(NamedTuple):
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


def unbeaten(gain: ArrayLike, loss: ArrayLike) -> np.ndarray:
    """Indices of the points that no other beats in both, the largest gain first; of equal points, of the first one.

    Args:
        gain: (n,), the larger the better: milliseconds saved, speed.
        loss: (n,), the smaller the better: importance removed, accuracy with its sign changed.
    """
    gain, loss = np.asarray(gain), np.asarray(loss)
    order = np.lexsort((loss, -gain))
    sorted_loss = loss[order]
    least_so_far = np.concatenate([[np.inf], np.minimum.accumulate(sorted_loss)[:-1]])[: len(order)]
    return order[sorted_loss < least_so_far]


def plan(found: Importances, cost: CostTable, latency: float, merged: bool = True) -> Plan:
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
    fronts = _fronts(options)
    last = fronts[-1]
    enough = np.flatnonzero(last.saving >= cost.total - latency - 1e-9 * cost.total)
    if not len(enough):
        least = cost.total - last.saving.max()
        raise MaskMismatch(f"latency: the least that can be reached is {least:.2f} ms per batch, found {latency:g}")
    return _plan_of(fronts, options, int(enough[last.loss[enough].argmin()]), found.sites)


def pareto(found: Importances, cost: CostTable, merged: bool = True) -> list[OperatingPoint]:
    """All plans that no other beats in both latency and importance removed, the slowest first.

    Exact by dynamic programming over the sites: only plans of the first sites that no other beats can be part of one
    of the whole. (Where they are more than 20,000, of those that save alike to a 20,000th of all the best one stays.)

    Args:
        found, cost, merged: as for `plan`.
    """
    options = _options(found, cost, merged)
    fronts = _fronts(options)
    points = []
    for i, loss in enumerate(fronts[-1].loss):
        best = _plan_of(fronts, options, i, found.sites)
        points.append(OperatingPoint(best, cost.predict(best, merged), float(loss)))
    kept = unbeaten([-one.latency for one in points], [one.loss for one in points])  # sums differ by rounding
    return [points[i] for i in kept[::-1]]


class Joint(NamedTuple):
    """One of several networks, what is to be done to it, and the loss that is predicted for it."""

    network: str
    point: OperatingPoint
    loss: float


def joint(networks: Mapping[str, tuple[Importances, CostTable]], merged: bool = True) -> list[Joint]:
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
        Joint(name, point, found.base_loss + point.loss)
        for name, (found, cost) in networks.items()
        for point in pareto(found, cost, merged)
    ]
    kept = unbeaten([-one.point.latency for one in every], [one.loss for one in every])
    return [every[i] for i in kept[::-1]]


def for_speedup(
    model: nn.Module,
    found: Importances,
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
        if latency <= least:
            raise MaskMismatch(
                f"speedup: at its quickest, with {len(best.mask.removed)} sites removed, the network "
                f"is {reached[0]:.2f} times as fast, expected {speedup:g}"
            )
        slower = min(latency, cost.predict(best))
        latency = max(slower - 0.005 * cost.total, least)  # another plan, and not much quicker than need be


def _options(found: Importances, cost: CostTable, merged: bool) -> list[list[_Choice]]:
    """For each site what can be done that ends with it: keep, remove or drop it, or merge it with those before it."""
    _check_same_network(found, cost)
    place = {name: i for i, name in enumerate(found.sites)}
    options = [[_Choice(i, 0.0, 0.0, removed=False)] for i in place.values()]

    def add(names: Sequence[str], saving: float, loss: float, dropped: bool = False) -> None:
        if not math.isfinite(loss):
            raise MaskMismatch("an importance is NaN or infinite: rank the sites again")
        options[place[names[-1]]].append(_Choice(place[names[0]], saving, loss, True, dropped))

    for name, loss in found.scores.items():
        add([name], cost.saving([name], merged), loss)
    for name, loss in found.dropped.items():
        add([name], cost.kept[name], loss, dropped=True)
    for run, loss in found.runs.items():
        if run in cost.runs:
            names = run.split("+")
            add(names, cost.saving(names, merged), loss)
    return options


def _check_same_network(found: Importances, cost: CostTable) -> None:
    """Raise `MaskMismatch` unless the two tables belong together, and can be summed."""
    if not found.unit:
        raise MaskMismatch(
            "these importances only order the sites, their sums mean nothing: take a mask of "
            "them, or importances from `importance` or `rank`"
        )
    if found.network and cost.network and found.network != cost.network:
        raise MaskMismatch("importances and costs are of different networks: profile the one that was ranked")
    if found.image_size not in (0, cost.image_size):
        raise MaskMismatch(
            f"importances are of images of {found.image_size} px, costs of "
            f"{cost.image_size} px: give both the same --image-size"
        )
    cost.check({*found.scores, *found.dropped})


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
            parts.append(
                _Front(
                    saving=before.saving + choice.saving,
                    loss=before.loss + choice.loss,
                    choice=np.full(size, index),
                    before=np.arange(size),
                )
            )
        front = _Front(*map(np.concatenate, zip(*parts, strict=True)))
        front = _rows(front, unbeaten(front.saving, front.loss))
        fronts.append(front if len(front.saving) <= MOST else _thinned(front, step))
    return fronts


def _rows(front: _Front, indices: np.ndarray) -> _Front:
    return _Front(*(column[indices] for column in front))


def _thinned(front: _Front, step: float) -> _Front:
    """Of the plans that save alike, to a step in ms, the best one; and the one that saves most, which comes first."""
    saving = np.floor(front.saving / step)
    saving[0] = np.inf
    return _rows(front, unbeaten(saving, front.loss))


def _plan_of(fronts: list[_Front], options: list[list[_Choice]], index: int, sites: tuple[str, ...]) -> Plan:
    """What was chosen for a plan of the last front, site by site from the last one back."""
    removed: set[str] = set()
    runs, dropped = [], []
    place = len(options)
    while place:
        front = fronts[place]
        choice = options[place - 1][front.choice[index]]
        names = sites[choice.first : place]
        if choice.removed:
            removed.update(names)
            if len(names) > 1:
                runs.append(names)
            elif choice.dropped:
                dropped.append(names[0])
        index, place = int(front.before[index]), choice.first
    return Plan(Mask({name: name not in removed for name in sites}), runs[::-1], dropped[::-1])
