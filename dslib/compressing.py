"""The label-free way in one call: sites, ranking, costs, plan and calibration, from unlabelled images, no training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from .algebra import droppable, dtype_of, structure_of
from .calibrating import Calibrate, Images, calibrate, logits_of
from .data import FolderSplit, Split
from .errors import BadConfig, MaskMismatch
from .measuring import dtype_for, runner_for
from .planning import Speedup, for_speedup
from .profiling import CostTable, profile
from .ranking import Importances, rank
from .saving import Recipe
from .sites import Mask, Plan, Sites, find_sites

Echo = Callable[[str], object]


class Compressed(NamedTuple):
    """A smaller network, and how it came about.

    Args:
        model: merged, in eval.
        plan: what was done to which sites.
        errors: what is left in each block that was fitted, as from `calibrate`.
        importances: by which the plan was chosen; None if it was given.
        costs: of the sites; None if no speed was asked for.
        speedup: over the original, as measured: ratio of medians, lower and upper quartile; None as for `costs`.
    """

    model: nn.Module
    plan: Plan
    errors: dict[str, float]
    importances: Importances | None = None
    costs: CostTable | None = None
    speedup: Speedup | None = None

    def recipe(self, original: Recipe) -> Recipe:
        """By which `load` rebuilds the network, from the original one's recipe."""
        fitted = [group for group in self.plan.groups if group[-1] in self.errors]
        return original.planned(self.plan, tuple(map("+".join, fitted)))


def compress(
    model: nn.Module,
    images: Images,
    k: int | None = None,
    speedup: float | None = None,
    plan: Mask | Plan | None = None,
    drop: bool = False,
    runtime: str = "eager",
    precision: str | None = None,
    batch_size: int = 32,
    ranking: Importances | Path | str | None = None,
    rank_count: int = 512,
    costs: CostTable | None = None,
    config: Calibrate | None = None,
    echo: Echo = lambda text: None,
) -> Compressed:
    """The network with fewer sites, calibrated on unlabelled images: k sites, so many times faster, or as planned.

    >>> dslib.compress(model, images, speedup=1.5, runtime="onnxruntime", drop=True).model  # doctest: +SKIP

    Args:
        model: trained, on the device to run on; left as it is.
        images: unlabelled, as for `calibrate`.
        k: sites to keep, the most important ones.
        speedup: in place of k: so many times faster than the original, measured here.
        plan: in place of either: what to do to which sites, or a mask.
        drop: whether, for a speed-up, blocks may go whole.
        runtime: what a speed-up is measured on.
        precision: the same; default the network's own.
        batch_size: the same: images a batch.
        ranking: importances from before, or a file of them, which is written if it does not exist; for k also those
            of a search. By default the sites are ranked first.
        rank_count: images used for ranking.
        costs: from before, of the same runtime; by default the sites are profiled first.
        config: settings of the calibrations.
        echo: is told what is done.
    Raises:
        BadConfig: unless exactly one of k, speedup and plan is given, and what else is given fits it.
        MaskMismatch: if k, plan, ranking or costs are not for this network, or no plan is quick enough.
    """
    check_request(k, speedup, plan, drop, rank_count)
    one = _few(images, 1)
    logits_of(model, one)  # what cannot be used is told before the work; a runtime that is not installed too
    example = one if isinstance(one, Tensor) else next(one.batches(1))[0]
    dtype = dtype_of(model) if precision is None else dtype_for(precision)
    runner_for(nn.Identity(), example.to(next(model.parameters()).device, dtype), runtime)
    found = reached = None
    if plan is None:
        sites = find_sites(model, example.shape[-1])
        sites.check_k(len(sites) if k is None else k)
        found = _ranking(model, sites, images, ranking, drop, k is None, rank_count, config, echo)
        if speedup is None:
            plan, costs = found.mask(k or 0), None
        else:
            if costs is None:
                echo(f"measuring {len(sites)} sites on {runtime}")
                costs = profile(model, sites, batch_size, runtime=runtime, precision=precision)
            plan, reached = for_speedup(model, found, costs, speedup, runtime=runtime, precision=precision)
            ratio, low, high = reached
            echo(f"{ratio:.2f} times as fast as the original (quartiles {low:.2f} to {high:.2f}; {costs.runtime})")
    plan = plan if isinstance(plan, Plan) else Plan(plan)
    echo(f"calibrating on {len(images)} photos")
    done = calibrate(model, plan, images, config)
    return Compressed(done.model, plan, done.errors, found, costs, reached)


def check_request(
    k: int | None, speedup: float | None, plan: object | None, drop: bool = False, rank_count: int = 1
) -> None:
    """Raise `BadConfig` unless `compress` can do what is asked, whatever the network."""
    if [k, speedup, plan].count(None) != 2:
        raise BadConfig("expected one of k, speedup and plan (or mask)")
    if speedup is not None and not speedup > 1:
        raise BadConfig(f"speedup: expected more than 1, found {speedup}")
    if drop and speedup is None:
        raise BadConfig("drop is for speedup: k and a plan say what is merged")
    if rank_count < 1:
        raise BadConfig(f"rank_count: expected 1 or more, found {rank_count}")


def _ranking(
    model: nn.Module,
    sites: Sites,
    images: Images,
    given: Importances | Path | str | None,
    drop: bool,
    adding: bool,
    count: int,
    config: Calibrate | None,
    echo: Echo,
) -> Importances:
    """The importances that were given, checked, or measured now; `adding`: their sums must mean something."""
    if isinstance(given, Importances) or (given is not None and Path(given).exists()):
        found = given if isinstance(given, Importances) else Importances.load(given)
        name = "the ranking" if isinstance(given, Importances) else str(given)
        echo(f"ranking: taken from {'before' if isinstance(given, Importances) else given}")
        if found.network not in ("", structure_of(model)) or found.sites != sites.names:
            raise MaskMismatch(f"{name} is of another network: rank this one")
        if drop and not found.dropped and droppable(model, sites.mergeable, sites.image_size):
            raise MaskMismatch(f"{name} says nothing of whole blocks: remove it, to rank anew")
        if adding and not found.unit:
            raise MaskMismatch(f"{name} only orders the sites, and a speed-up adds importances: rank anew")
    else:
        few = _few(images, count)
        trials = 1 + len(sites.mergeable) + (len(droppable(model, sites.mergeable, sites.image_size)) if drop else 0)
        echo(f"ranking {len(sites.mergeable)} sites on {len(few)} photos, {trials} calibrations")
        found = rank(model, sites, few, config, drop=drop)
        if given is not None:
            found.save(given)
    return found if drop else replace(found, dropped={})


def _few(images: Images, count: int) -> Tensor | Split:
    return images.first(count) if isinstance(images, (Split, FolderSplit)) else images[:count]
