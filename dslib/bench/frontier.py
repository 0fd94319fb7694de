"""The accuracy-speed frontier: every method at every budget, for the same time: `dslib bench frontier`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from torch import nn

from ..baselines import METHODS, Budget, Effort, Trial
from ..data import Data, load_data
from ..errors import BadConfig, BadModel, nearest
from ..measuring import count_macs, count_parameters, pick_device, this_machine
from ..models import load_model
from ..records import Record, as_options, as_words, commit
from ..training import evaluate
from .judging import hold_back
from .retime import latency
from .rows import Rows

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
        methods: names of `baselines.METHODS`; points of one that is not there fail, and say so.
        speedups: budgets, over the original.
        seeds: of the budgets in `repeated`; the others have one.
        repeated: budgets with all seeds; none for all of them.
        seconds: that each point may take, all told but for measuring latencies, see `Effort`.
        search_lr: of what methods train before the final training.
        lrs, gentle_lrs: learning rates of the final training that are tried for each method, by the usual and (where
            weights are inherited) by the gentle recipe, by a whole run at the budget `tuned_at` on training images,
            `held` of which are held back. Where there is only one, nothing is tried.
        batch_size: of the trainings.
        runtime, precision, latency_batch: that latencies are measured on, and the images a batch.
        held: see `lrs`.
        tuned_at: see `lrs`; methods that do not reach it take the first rate, and their rows say so.
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
    repeated: tuple[float, ...] = ()
    seconds: float = 240.0
    search_lr: float = 0.04
    lrs: tuple[float, ...] = (0.1, 0.03)
    gentle_lrs: tuple[float, ...] = (0.01, 0.003)
    batch_size: int = 64
    runtime: str = "eager"
    precision: str | None = None
    latency_batch: int = 8
    held: int = 1024
    tuned_at: float = 1.5
    device: str = "auto"

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not (bool(self.methods) and bool(self.speedups)):
            raise BadConfig("expected one method and one speedup at least")
        if not min(self.seeds, self.held, self.latency_batch) > 0:
            raise BadConfig("expected one or more of each")
        if not min(*self.speedups, self.tuned_at) > 1:
            raise BadConfig(f"speedups: expected more than 1, found {self.speedups}")
        if not self.lrs:
            raise BadConfig("expected one learning rate at least")
        if not set(self.repeated) <= set(self.speedups):
            raise BadConfig(f"repeated: expected some of the speedups {self.speedups}, found {self.repeated}")

    @property
    def trials(self) -> list[dict[str, Any]]:
        """Recipes and learning rates."""
        gentle = self.gentle_lrs if self.weights != "none" else ()
        pairs = [*(("usual", lr) for lr in self.lrs), *(("gentle", lr) for lr in gentle)]
        return [{"recipe": recipe, "lr": lr} for recipe, lr in pairs]

    def points(self) -> Iterator[dict[str, Any]]:
        """The keys of all rows that are wanted, those of one seed first."""
        for seed in range(self.seeds):
            for speedup in self.speedups if seed == 0 else self.repeated or self.speedups:
                for method in self.methods:
                    yield {"method": method, "speedup": speedup, "seed": seed}


def record_frontier(
    frontier: Frontier | None = None,
    hours: float | None = None,
    out: Path | None = None,
    echo: Callable[[str], object] = print,
) -> Record:
    """Train what each method makes of a network within each budget; accuracy on the validation split.

    The same command may run several times at once, with the same `out`: each takes points that no other is at. A
    training beside it disturbs a measurement: when all is made, `retime` measures all latencies once more.

    Args:
        frontier: what is compared.
        hours: no point is begun after so many; those that are missing are told.
        out: the record's file; points that stand there are not made again, those that failed are tried again.
        echo: is told each point.
    """
    config = frontier or Frontier()
    data = load_data(config.data, config.image_size)
    where = pick_device(config.device)
    load = partial(load_model, config.model, data.classes, config.weights, config.options)
    loaded = [load(seed=seed) for seed in range(config.seeds)]
    trained = loaded[0].trained
    if not trained and config.weights != "none":
        raise BadModel(
            f"{config.model} with weights {config.weights!r} is not trained for "
            f"the classes of {config.data}: give others, or --weights none"
        )
    networks = [one.model.to(where).eval() for one in loaded]
    told = partial(_told, retry=partial(_retry, config, out), echo=echo)
    settings = {
        **asdict(config),
        "image_size": data.image_size,
        "device": str(where),
        "options": as_options(config.options),
    }
    blank = Record("frontier", _command(settings), settings, {}, this_machine(where), commit())
    choosing = ("methods", "speedups", "repeated", "seeds")
    rows = Rows(blank, out, selecting=choosing, hours=hours, shared=True)
    rest, val = hold_back(data, config.held)
    parts = replace(rest, val=val)
    budget = Budget(config.tuned_at, data.image_size, config.latency_batch, config.runtime, config.precision)

    def effort(seed: int, tuning: dict[str, Any]) -> Effort:
        return Effort(
            config.seconds,
            search_lr=config.search_lr,
            batch_size=config.batch_size,
            seed=seed,
            distil=trained,
            pretrained=trained,
            lr=tuning["lr"],
            recipe=tuning["recipe"],
        )

    def made(method: str, speedup: float, seed: int, tuning: dict[str, Any], on: Data) -> dict[str, Any]:
        return point(method, networks[seed], on, replace(budget, speedup=speedup), effort(seed, tuning))

    def original() -> dict[str, Any]:
        """Trained from nothing, by the first recipe, for all the time that every point has."""
        done = Trial(networks[0], data, budget, effort(0, config.trials[0])).finish(networks[0])
        seconds = sum(done.record["seconds"].values())
        return {"accuracy": evaluate(done.model, data.val), **config.trials[0], "seconds": seconds}

    def tried(method: str, tuning: dict[str, Any]) -> Task:
        key = {"method": method, "tried_at": config.tuned_at, **tuning}
        return key, partial(made, method, config.tuned_at, 0, tuning, parts)

    def wanted(key: dict[str, Any]) -> Task:
        """A point, with the recipe and learning rate of its method's best trial; the first where all of them failed."""
        trials = [(one, rows.find(tried(key["method"], one)[0])) for one in config.trials]
        known = [(one, row["accuracy"]) for one, row in trials if row is not None]
        best = max(known, key=lambda pair: pair[1])[0] if known else config.trials[0]
        return key, partial(_made_with, partial(made, **key, tuning=best, on=data), {**best, "tuned": bool(known)})

    whole = {"way": "original", **_size(networks[0], data)}
    if trained:
        rows.add(whole, lambda: {"accuracy": evaluate(networks[0], data.val)}, short=True)
    several = len(config.trials) > 1
    trials = [tried(method, one) for method in config.methods for one in config.trials if several]
    points = (wanted(key) for key in config.points())  # looked up when the trials are made
    _work(rows, trials, told)
    _work(rows, points if trained else chain([(whole, original)], points), told)
    for missing in rows.missing:
        echo(f"missing: {missing} (the same command with the same --out makes it)")
    return rows.record


def point(method: str, model: nn.Module, data: Data, budget: Budget, effort: Effort) -> dict[str, Any]:
    """What a method makes of a network: accuracy, size, and latency in turns with the original's."""
    if method not in METHODS:
        raise BadConfig(nearest("method", method, METHODS))
    done = METHODS[method](Trial(model, data, budget, effort))
    timing = replace(budget, rounds=2 * budget.rounds).steady(model, done.model)
    return {
        "accuracy": evaluate(done.model, data.val),
        **_size(done.model, data),
        **latency(timing, budget.speedup),
        "seconds": sum(done.record["seconds"].values()),
        "found": done.record,
    }


def _made_with(make: Make, tuning: dict[str, Any]) -> dict[str, Any]:
    """A row that also says how its learning rate came about."""
    return {**make(), **tuning}


def _work(rows: Rows, tasks: Iterable[Task], told: Callable[[dict[str, Any]], object]) -> None:
    """Make all rows that no other process makes, and wait for those that others make; each is told."""
    waiting = list(tasks)
    while waiting:
        left = []
        for key, make in waiting:
            with rows.claimed(key) as mine:
                if not mine:
                    left.append((key, make))
                elif rows.find(key) is None and not rows.failed(key):
                    told(rows.add(key, make, keep_errors=True))
        if len(left) == len(waiting):
            time.sleep(PAUSE)
        waiting = left


def _told(row: Mapping[str, Any], retry: Callable[[Mapping[str, Any]], str], echo: Callable[[str], object]) -> None:
    names = ("way", "method", "speedup", "seed", "tried_at", "recipe", "lr")
    what = ", ".join(f"{name} {row[name]}" for name in names if name in row)
    if "error" in row:
        again = f"; to try it again: {retry(row)}" if row.get("method") in METHODS else ""
        echo(f"{what}: failed: {row['error']}{again}")
    elif "accuracy" not in row:
        echo(f"{what}: not begun")
    elif "measured_speedup" not in row:
        echo(f"{what}: {row['accuracy']:.2%}")
    else:
        speed, seconds = f"{row['measured_speedup']:.2f} times the speed", f"{row['seconds']:.0f} s"
        echo(f"{what}: {row['accuracy']:.2%} at {speed}, {seconds}")


def _retry(config: Frontier, out: Path | None, row: Mapping[str, Any]) -> str:
    """The command that makes a row of a method again: a point, with those of other seeds; a trial, with all points."""
    only: dict[str, Any] = {
        "methods": (row["method"],),
        "speedups": (row["speedup"],) if "speedup" in row else config.speedups,
    }
    only["repeated"] = tuple(s for s in config.repeated if s in only["speedups"])
    if config.repeated and not only["repeated"]:
        only["seeds"] = 1
    return _command(asdict(replace(config, **only)) | {"options": as_options(config.options)}, out)


def _size(model: nn.Module, data: Data) -> dict[str, int]:
    shape = (3, data.image_size, data.image_size)
    return {"macs": count_macs(model, shape), "parameters": count_parameters(model)}


def _command(config: Mapping[str, Any], out: Path | None = None) -> str:
    names = {
        "methods": "method",
        "speedups": "speedup",
        "lrs": "lr",
        "gentle_lrs": "gentle_lr",
        "options": "model_option",
    }
    given = {names.get(key, key): value for key, value in config.items() if value is not None}
    return f"dslib bench frontier {as_words({**given, **({} if out is None else {'out': out})})}"
