"""Which way to choose what to keep is the most accurate within one predicted latency, finetuned alike?"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import pandas as pd

from ..baselines import CHOICES, masks_of, within
from ..calibrating import Calibrate
from ..errors import BadConfig
from ..planning import plan
from ..profiling import CostTable, profile
from ..ranking import Importances, rank
from ..records import Record
from ..running import CALIBRATED, Run
from ..searching import search
from ..sites import Plan
from ..training import evaluate
from .benchmark import Benchmark, Context, Row, Steps, Values
from .plans import judge, outcome, point, quiet
from .settings import ON_RUNTIMES, OnTrained, setting

METHODS = ("planner", "planner with runs", "search", *CHOICES)
LONGEST = 2  # sites that a planned run may join


@dataclass(frozen=True)
class Matrix(OnTrained):
    """Each method's plan at each budget, calibrated and finetuned alike; and how quick each plan is, in turns.

    Budgets are met as predicted from one cost table; what counts is what is measured.

    Args:
        methods: ways to choose.
        speedups: the budgets, as predicted by the profile on the runtime.
        seeds: of every method, of the calibration and of the finetuning.
        epochs: of the finetuning, from the calibrated start; the same for all.
        search_epochs: of the paper's search; learned slopes take two.
        latency_weight: of the paper's search; about where `dslib bench sign` sees it act first.
        batch_size: that latencies are measured at.
    """

    weights: str = "default"
    options: dict[str, Any] | None = setting(None, option="model_option")
    methods: tuple[str, ...] = setting(("planner", "search", "random", "keep the cheapest"), option="method")
    speedups: tuple[float, ...] = setting((1.2, 1.5), "more than 1", option="speedup")
    seeds: int = setting(3, "1 or more")
    epochs: int = 1
    search_epochs: int = 2
    latency_weight: float = 0.3
    batch_size: int = setting(32, "1 or more")
    runtime: str = setting("eager", ON_RUNTIMES)
    device: str = "auto"

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        unknown = [method for method in self.methods if method not in METHODS]
        if unknown:
            raise BadConfig(f"methods: expected some of {', '.join(METHODS)}, found {', '.join(unknown)}")


def answer(config: Matrix, context: Context[Matrix]) -> Steps:
    """The costs; what each method finds; its plan at each budget; how quick each plan is, measured once."""
    data, (network, sites) = context.data, context.trained
    measured = partial(profile, network, sites, config.batch_size, runtime=config.runtime, longest=LONGEST)

    def costs() -> Values:
        table = asdict(quiet(measured, context.echo))
        return {"table": table, "original": evaluate(network, data.val), "val_images": len(data.val)}

    cost = CostTable(**(yield Row({"cost": config.runtime}, costs, short=True))["table"])
    for seed in range(config.seeds):
        for method in config.methods:
            find = partial(_find, method, seed, context, cost)
            found = yield Row({"found": method, "seed": seed}, find, keep_errors=True)
            for speedup in config.speedups:
                key = {"method": method, "speedup": speedup, "seed": seed}
                make = partial(_judge, found, key, context, cost) if "seconds" in found else None
                row = yield from point(key, make, (network, sites, cost, config.runtime))
                removed = f"{len(row['removed'])} removed, " if "accuracy" in row else ""
                context.echo(f"{method}, {speedup:g} times, seed {seed}: {removed}{outcome({**found, **row})}")


def _find(method: str, seed: int, context: Context[Matrix], cost: CostTable) -> Values:
    """What a method finds, and how long it takes."""
    began, config, data, (network, sites) = time.perf_counter(), context.config, context.data, context.trained
    if method.startswith("planner"):
        images, longest = data.train.first(config.rank_count, seed), LONGEST if method == "planner with runs" else 1
        found = rank(network, sites, images, Calibrate(seed=seed), longest=longest)
        return {"table": found.as_json(), "seconds": time.perf_counter() - began}
    if method == "search":
        k = max(len(sites) // 2, len(sites.always_kept))
        epochs, weight = config.search_epochs, config.latency_weight
        settings = replace(Run.search, k=k, epochs=epochs, latency_weight=weight, seed=seed)
        savings = {name: cost.saving((name,), merged=True) for name in cost.kept}  # calibrating merges
        m = search(network, data, sites, savings, settings).scores
        masks, more = masks_of(sites, m), {"m": m}
    else:
        masks, more = CHOICES[method](network, data, sites, cost, seed), {}
    return {**more, "kept": [mask.kept for mask in masks], "seconds": time.perf_counter() - began}


def _judge(found: Mapping[str, Any], key: Values, context: Context[Matrix], cost: CostTable) -> Values:
    """One plan at a budget: its accuracy before and after finetuning."""
    config, data, (network, sites) = context.config, context.data, context.trained
    budget, seed = cost.total / key["speedup"], key["seed"]
    if "table" in found:
        chosen = plan(Importances.of(found["table"]), cost, budget)
    else:
        chosen = Plan(within(map(sites.mask, found["kept"]), cost, budget))
    settings = replace(CALIBRATED, epochs=config.epochs, seed=seed)
    return judge(network, chosen, data, cost, settings, data.train.first(config.count, seed))


def results(record: Record) -> pd.DataFrame:
    """A record's rows of accuracies, each with its plan's timing."""
    rows = record.values["rows"]
    timings = {row["timed"]: row for row in rows if "measured_speedup" in row}
    found = [row for row in rows if "accuracy" in row and "method" in row]
    return pd.DataFrame([{**timings[row["plan"]], **row} for row in found if row["plan"] in timings])


def over_random(found: pd.DataFrame, method: str = "planner") -> pd.DataFrame:
    """For each budget how much more accurate a method is than random masks, in means; and the standard error of that.

    Args:
        found: from `results`.
        method: which one.
    """
    each = found.groupby(["method", "speedup"])["accuracy"].agg(["mean", "sem", "size"])
    mine, chance = each.loc[method], each.loc["random"]
    return pd.DataFrame(
        {
            "difference": mine["mean"] - chance["mean"],
            "standard_error": (mine["sem"] ** 2 + chance["sem"] ** 2) ** 0.5,
            "networks": mine["size"],
            "random networks": chance["size"],
        }
    )


GROWING = ("methods", "speedups", "seeds")
BENCHMARK = Benchmark("Which activations?", Matrix, answer, selecting=GROWING, idle=True)
