"""Ways to choose which activations to keep, compared within one predicted latency: `dslib bench methods`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn

from ..baselines import CHOICES, masks_of, within
from ..calibrating import Calibrate
from ..data import Data, load_data
from ..errors import BadConfig, BadModel
from ..measuring import pick_device, this_machine
from ..models import load_model
from ..planning import plan
from ..profiling import CostTable, profile
from ..ranking import Importances, rank
from ..records import Record, as_options, as_words, commit
from ..running import CALIBRATED, Run
from ..searching import search
from ..sites import Plan, Sites, find_sites
from ..training import evaluate
from .judging import judge, quiet, timed
from .rows import Rows

METHODS = ("planner", "planner with runs", "search", *CHOICES)
LONGEST = 2  # sites that a planned run may join
MINIMUM = ("planner", "search", "random", "keep the cheapest")


@dataclass(frozen=True)
class Matrix:
    """What is compared.

    Args:
        model, weights, options: as for `load_model`; the weights must be trained for the data.
        data, image_size: as for `load_data`.
        methods: of `METHODS`.
        speedups: the budgets, as predicted by the profile on the runtime.
        seeds: of every method, of the calibration and of the finetuning.
        epochs: of the finetuning, from the calibrated start; the same for all.
        search_epochs: of the paper's search (learned slopes take two).
        latency_weight: of the paper's search: about where `dslib bench sign` sees it act first.
        count, rank_count: unlabelled images for a calibration and for the ranking.
        batch_size: that latencies are measured at.
        runtime: that they are measured on.
    """

    model: str = "mobilenet_v2"
    data: str = "imagenette"
    image_size: int | None = None
    weights: str = "default"
    options: dict[str, Any] | None = None
    methods: tuple[str, ...] = MINIMUM
    speedups: tuple[float, ...] = (1.2, 1.5)
    seeds: int = 3
    epochs: int = 1
    search_epochs: int = 2
    latency_weight: float = 0.3
    count: int = 2048
    rank_count: int = 512
    batch_size: int = 32
    runtime: str = "eager"
    device: str = "auto"

    def __post_init__(self) -> None:
        """Check the ranges."""
        unknown = [method for method in self.methods if method not in METHODS]
        if unknown:
            raise BadConfig(f"methods: expected some of {', '.join(METHODS)}, found {', '.join(unknown)}")
        if not min(self.seeds, self.count, self.rank_count, self.batch_size) > 0:
            raise BadConfig("expected one or more of each")
        if not all(speedup > 1 for speedup in self.speedups):
            raise BadConfig(f"speedups: expected more than 1, found {self.speedups}")


def record_methods(
    matrix: Matrix | None = None,
    hours: float | None = None,
    out: Path | None = None,
    echo: Callable[[str], object] = print,
) -> Record:
    """Each method's plan at each budget, calibrated and finetuned alike; and how quick each plan is, in turns with the
    original. Budgets are met as predicted from one cost table; what counts is what is measured.

    Args:
        matrix: what is compared.
        hours: no row is begun after so many; those that are missing are told.
        out: the record's file; rows that stand there are not made again.
        echo: is told each row.
    """
    matrix = matrix or Matrix()
    loaded = load_data(matrix.data, matrix.image_size)
    where = pick_device(matrix.device)
    network, trained = load_model(matrix.model, loaded.classes, matrix.weights, matrix.options)
    if not trained:
        raise BadModel(
            f"{matrix.model} with weights {matrix.weights!r} is not trained for {matrix.data}: give weights that are"
        )
    network = network.to(where).eval()
    sites = find_sites(network, loaded.image_size)
    config = {
        **asdict(matrix),
        "image_size": loaded.image_size,
        "device": str(where),
        "options": as_options(matrix.options),
    }
    blank = Record("methods", _command(config), config, {}, this_machine(where), commit())
    rows = Rows(blank, out, idle=True, selecting=("methods", "speedups", "seeds"), hours=hours)
    cost = rows.add(
        {"cost": matrix.runtime},
        lambda: {
            "table": asdict(
                quiet(
                    partial(profile, network, sites, matrix.batch_size, runtime=matrix.runtime, longest=LONGEST), echo
                )
            ),
            "original": evaluate(network, loaded.val),
            "val_images": len(loaded.val),
        },
        short=True,
    )
    compared = _Compared(matrix, network, loaded, sites, CostTable(**cost["table"]))
    for seed in range(matrix.seeds):
        for method in matrix.methods:
            key = {"found": method, "seed": seed}
            found = rows.add(key, partial(compared.find, method, seed), keep_errors=True)
            for speedup in matrix.speedups:
                point = {"method": method, "speedup": speedup, "seed": seed}
                if "seconds" not in found:
                    rows.miss(point)
                    echo(_say({**found, **point}))
                    continue
                row = rows.add(point, partial(compared.judge, found, point), keep_errors=True)
                speed = compared.time(row, rows) if "accuracy" in row else {}
                echo(_say({**speed, **row}))
    for name in rows.missing:
        echo(f"missing: {name} (the same command with the same --out makes it)")
    return rows.record


class _Compared:
    """One network on which methods are compared."""

    def __init__(self, matrix: Matrix, network: nn.Module, data: Data, sites: Sites, cost: CostTable) -> None:
        self.matrix, self.network, self.data, self.sites, self.cost = matrix, network, data, sites, cost

    def find(self, method: str, seed: int) -> dict[str, Any]:
        """What a method finds, and how long it takes."""
        began, matrix = time.perf_counter(), self.matrix
        if method.startswith("planner"):
            images = self.data.train.first(matrix.rank_count, seed)
            longest = LONGEST if method == "planner with runs" else 1
            found = rank(self.network, self.sites, images, Calibrate(seed=seed), longest=longest)
            return {"table": found.as_json(), "seconds": time.perf_counter() - began}
        if method == "search":
            k = max(len(self.sites) // 2, len(self.sites.always_kept))
            config = replace(
                Run.search, k=k, epochs=matrix.search_epochs, latency_weight=matrix.latency_weight, seed=seed
            )
            savings = {name: self.cost.saving((name,), merged=True) for name in self.cost.kept}  # calibrating merges
            m = search(self.network, self.data, self.sites, savings, config).scores
            masks, more = masks_of(self.sites, m), {"m": m}
        else:
            masks, more = CHOICES[method](self.network, self.data, self.sites, self.cost, seed), {}
        return {**more, "kept": [mask.kept for mask in masks], "seconds": time.perf_counter() - began}

    def judge(self, found: Mapping[str, Any], point: dict[str, Any]) -> dict[str, Any]:
        """One plan at a budget: its accuracy before and after finetuning, its speed-up as measured."""
        matrix = self.matrix
        budget, seed = self.cost.total / point["speedup"], point["seed"]
        if "table" in found:
            chosen = plan(Importances.of(found["table"]), self.cost, budget)
        else:
            chosen = Plan(within(map(self.sites.mask, found["kept"]), self.cost, budget))
        config, images = replace(CALIBRATED, epochs=matrix.epochs, seed=seed), self.data.train.first(matrix.count, seed)
        return judge(self.network, chosen, self.data, self.cost, config, images)

    def time(self, row: Mapping[str, Any], rows: Rows) -> dict[str, Any]:
        """The row of a plan's timing: several methods may find the same one, it is measured once."""
        chosen = Plan(self.sites.mask(set(self.sites.names) - set(row["removed"])), row["runs"], row.get("dropped", ()))
        make = partial(timed, self.network, chosen, self.cost, self.matrix.runtime)
        return rows.add({"timed": row["plan"]}, make, short=True)


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


def _command(config: dict[str, Any]) -> str:
    names = {"methods": "method", "speedups": "speedup", "options": "model_option"}
    return f"dslib bench methods {as_words({names.get(key, key): value for key, value in config.items()})}"


def _say(row: dict[str, Any]) -> str:
    point = f"{row['method']}, {row['speedup']:g} times, seed {row['seed']}"
    if "accuracy" not in row:
        return f"{point}: {row.get('error', 'not begun')}"
    return (
        f"{point}: {len(row['removed'])} removed, {row['measured_speedup']:.2f} times as fast, accuracy "
        f"{row['accuracy_before']:.2%}, finetuned {row['accuracy']:.2%}"
    )
