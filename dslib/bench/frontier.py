"""The accuracy-speed frontier: every method at every budget, for the same time: `dslib bench frontier`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn

from ..baselines import METHODS, Budget, Effort
from ..datasets import Data, load_data
from ..devices import pick_device, this_machine
from ..errors import BadModel, nearest, require
from ..evaluating import evaluate
from ..measuring import count_macs, count_parameters
from ..models import load_model
from ..records import Record, as_options, as_words, commit
from .judging import hold_back
from .rows import Rows

LRS = {"planner": (0.003, 0.01, 0.03), "narrow-and-shrunk": (0.003, 0.01, 0.03)}  # where a calibrated network goes on
USUAL = (0.03, 0.1, 0.3)
PAUSE = 5.0  # seconds between two looks at what others make
Make = Callable[[], dict[str, Any]]
Task = tuple[dict[str, Any], Make]


@dataclass(frozen=True)
class Frontier:
    """What is compared.

    Args:
        model, weights, options: as for `load_model`; weights that are trained for the data's classes are inherited by
            all methods, with "none" everything begins from nothing.
        data, image_size: as for `load_data`.
        methods: names of `baselines.METHODS`.
        speedups: budgets, over the original.
        seeds: of the budgets in `repeated`; the others have one.
        repeated: budgets with all seeds.
        seconds: that each point may take, all told but for measuring latencies.
        search_lr: of what methods train before the final training; its own learning rate is chosen, see `held`.
        batch_size: of the trainings.
        runtime, precision, latency_batch: that latencies are measured on, and the images a batch.
        held: training images that are held back to choose each method's learning rate, at the middle budget.
        device: as for `pick_device`.
    """

    model: str = "mobilenet_v2"
    weights: str = "default"
    options: dict[str, Any] | None = None
    data: str = "imagenette"
    image_size: int | None = None
    methods: tuple[str, ...] = ("uniform", "metapruning", "layers", "depthshrinker", "planner")
    speedups: tuple[float, ...] = (1.25, 1.5, 1.75, 2.5)
    seeds: int = 3
    repeated: tuple[float, ...] = (1.5, 2.5)
    seconds: float = 240.0
    search_lr: float = 0.04
    batch_size: int = 64
    runtime: str = "eager"
    precision: str | None = None
    latency_batch: int = 8
    held: int = 1024
    device: str = "auto"

    def __post_init__(self) -> None:
        """Check the ranges."""
        for method in self.methods:
            require(method in METHODS, nearest("method", method, METHODS))
        require(bool(self.methods) and bool(self.speedups), "expected one method and one speedup at least")
        require(min(self.seeds, self.held, self.latency_batch) > 0, "expected one or more of each")
        require(min(self.speedups) > 1, f"speedups: expected more than 1, found {self.speedups}")
        require(set(self.repeated) <= set(self.speedups), f"repeated: expected some of the speedups {self.speedups}, "
                f"found {self.repeated}")  # fmt: skip

    @property
    def middle(self) -> float:
        """The budget at which learning rates are chosen."""
        return sorted(self.speedups)[len(self.speedups) // 2]

    def points(self) -> Iterator[dict[str, Any]]:
        """The keys of all rows that are wanted, those of one seed first."""
        for seed in range(self.seeds):
            for speedup in self.speedups if seed == 0 else self.repeated:
                for method in self.methods:
                    yield {"method": method, "speedup": speedup, "seed": seed}


def record_frontier(
    frontier: Frontier | None = None, hours: float | None = None, out: Path | None = None,
    echo: Callable[[str], object] = print,
) -> Record:  # fmt: skip
    """Train what each method makes of a network within each budget; accuracy on the validation split.

    The same command may run several times at once, with the same `out`: each takes points that no other is at.

    Args:
        frontier: what is compared.
        hours: no point is begun after so many; those that are missing are told.
        out: the record's file; points that stand there are not made again, those that failed are tried again.
        echo: is told each point.
    """
    config = frontier or Frontier()
    data = load_data(config.data, config.image_size)
    where = pick_device(config.device)
    network, trained = load_model(config.model, data.classes, config.weights, config.options)
    require(trained or config.weights == "none", f"{config.model} with weights {config.weights!r} is not trained for "
            f"the classes of {config.data}: give others, or --weights none", BadModel)  # fmt: skip
    network = network.to(where).eval()
    settings = {**asdict(config), "image_size": data.image_size, "device": str(where),
                "options": as_options(config.options)}  # fmt: skip
    blank = Record("frontier", _command(settings), settings, {}, this_machine(where), commit())
    choosing = ("methods", "speedups", "repeated", "seeds")
    rows = Rows(blank, out, selecting=choosing, hours=hours, shared=True)
    rest, val = hold_back(data, config.held)
    parts = replace(rest, val=val)

    def made(method: str, speedup: float, seed: int, lr: float, on: Data) -> dict[str, Any]:
        effort = Effort(config.seconds, lr, config.search_lr, config.batch_size, seed=seed,
                        distil=trained, pretrained=trained)  # fmt: skip
        budget = Budget(speedup, data.image_size, config.latency_batch, config.runtime, config.precision)
        return point(method, network, on, budget, effort)

    trials = {
        method: [({"method": method, "lr_tried": lr, "speedup": config.middle},
                  partial(made, method, config.middle, 0, lr, parts)) for lr in LRS.get(method, USUAL)]
        for method in config.methods
    }  # fmt: skip

    def wanted(key: dict[str, Any]) -> Task:
        """A point, with the learning rate of its method's best trial; the middle one where all of them failed."""
        tried = trials[key["method"]]
        known = [row for trial, _ in tried if (row := rows.find(trial)) is not None]
        best: dict[str, Any] = max(known, key=lambda row: row["accuracy"]) if known else tried[1][0]
        return key, partial(made, **key, lr=best["lr_tried"], on=data)

    if trained:
        whole = {"way": "original", **_size(network, data)}
        rows.add(whole, lambda: {"accuracy": evaluate(network, data.val)}, short=True)
    _work(rows, [task for tasks in trials.values() for task in tasks], echo)
    _work(rows, [wanted(key) for key in config.points()], echo)
    for missing in rows.missing:
        echo(f"missing: {missing} (the same command with the same --out makes it)")
    return rows.record


def point(method: str, model: nn.Module, data: Data, budget: Budget, effort: Effort) -> dict[str, Any]:
    """What a method makes of a network: accuracy, size, and latency in turns with the original's."""
    done = METHODS[method](model, data, budget, effort)
    timing = replace(budget, rounds=2 * budget.rounds).timing(model, done.model)
    ratio, low, high = timing.speedup("network", over="original")
    return {
        "accuracy": evaluate(done.model, data.val), **_size(done.model, data), "lr": effort.lr,
        "ms": timing.median("network"), "original_ms": timing.median("original"), "measured_speedup": ratio,
        "q25": low, "q75": high, "timing_busy": timing.busy, "runtime": timing.runtime,
        "seconds": sum(done.record["seconds"].values()), "found": done.record,
    }  # fmt: skip


def _work(rows: Rows, tasks: Iterable[Task], echo: Callable[[str], object]) -> None:
    """Make all rows that no other process makes, and wait for those that others make."""
    waiting = list(tasks)
    while waiting:
        left = []
        for key, make in waiting:
            with rows.claimed(key) as mine:
                if not mine:
                    left.append((key, make))
                    continue
                known = rows.find(key) is not None
                row = rows.add(key, make, keep_errors=True)
            if not known:
                echo(_told(row))
        if len(left) == len(waiting):
            time.sleep(PAUSE)
        waiting = left


def _told(row: Mapping[str, Any]) -> str:
    what = ", ".join(f"{name} {row[name]}" for name in ("method", "speedup", "seed", "lr_tried") if name in row)
    if "error" in row:
        return f"{what}: failed: {row['error']} (the same command tries it again)"
    if "accuracy" not in row:
        return f"{what}: not begun"
    return f"{what}: {row['accuracy']:.2%} at {row['measured_speedup']:.2f} times the speed, {row['seconds']:.0f} s"


def _size(model: nn.Module, data: Data) -> dict[str, int]:
    shape = (3, data.image_size, data.image_size)
    return {"macs": count_macs(model, shape), "parameters": count_parameters(model)}


def _command(config: Mapping[str, Any]) -> str:
    names = {"methods": "method", "speedups": "speedup", "options": "model_option"}
    return f"dslib bench frontier {as_words({names.get(key, key): value for key, value in config.items()})}"


def table(record: Record) -> pd.DataFrame:
    """The rows of points, without what each method found; errors too."""
    rows = [row for row in record.values["rows"] if "method" in row and "lr_tried" not in row]
    return pd.DataFrame([{name: value for name, value in row.items() if name != "found"} for row in rows])
