"""What accuracy and speed does each method reach within measured latencies, for the same time?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

from torch import nn

from ..baselines import METHODS, Budget, Effort, Pruned, Trial
from ..data import Data
from ..errors import BadConfig, BadModel, nearest
from ..measuring import count_macs, count_parameters
from ..models import load_model
from ..plots import frontier_points
from ..training import evaluate
from .benchmark import Benchmark, Context, Row, Steps, Values
from .retime import latency
from .settings import IN_PRECISIONS, ON_RUNTIMES, BenchSettings, setting


@dataclass(frozen=True)
class Frontier(BenchSettings):
    """Train what each method makes of a network within each budget; accuracy on the validation split.

    Begin it several times at once, with the same --out, to share the points: each takes those that no other is at. A
    training beside it disturbs a measurement: when all is made, `retime` measures all latencies once more.

    Args:
        weights: trained for the data's classes they are inherited by all methods; with none all begin from nothing.
        methods: ways to make a network small; points of one that is not known fail, and say so.
        speedups: budgets, over the original.
        seeds: of the budgets in `repeated`; the others have one.
        repeated: speed-ups with all seeds; default all.
        seconds: that each point may take, all told but for measuring latencies.
        search_lr: of what methods train before the final training.
        lrs: learning rates of the final training that are tried for each method, by the usual recipe, by a whole run
            at the budget `tuned_at` on training images, `held` of which are held back; one alone is not tried.
        gentle_lrs: as `lrs`, by the gentle recipe, where weights are inherited.
        batch_size: of the trainings.
        precision: that they are measured in; default float32.
        latency_batch: images a batch, of the latencies.
        held: training images that are held back from trials of learning rates.
        tuned_at: speed-up of the trials; methods that do not reach it take the first rate, and their rows say so.
    """

    model: str = "mobilenet_v2"
    weights: str = "default"
    options: dict[str, Any] | None = setting(None, option="model_option")
    data: str = "imagenette"
    image_size: int | None = None
    methods: tuple[str, ...] = setting(
        ("uniform", "metapruning", "layers", "depthshrinker", "planner"), option="method", least=1
    )
    speedups: tuple[float, ...] = setting((1.25, 1.5, 1.75, 2.5), "more than 1", option="speedup", least=1)
    seeds: int = setting(3, "1 or more")
    repeated: tuple[float, ...] = ()
    seconds: float = 240.0
    search_lr: float = 0.04
    lrs: tuple[float, ...] = setting((0.1, 0.03), option="lr", least=1)
    gentle_lrs: tuple[float, ...] = setting((0.01, 0.003), option="gentle_lr")
    batch_size: int = 64
    runtime: str = setting("eager", ON_RUNTIMES)
    precision: str | None = setting(None, IN_PRECISIONS)
    latency_batch: int = setting(8, "1 or more")
    held: int = setting(1024, "1 or more")
    tuned_at: float = setting(1.5, "more than 1")
    device: str = "auto"

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        if not set(self.repeated) <= set(self.speedups):
            raise BadConfig(f"repeated: expected some of the speedups {self.speedups}, found {self.repeated}")

    @property
    def trials(self) -> list[Values]:
        """Recipes and learning rates."""
        gentle = self.gentle_lrs if self.weights != "none" else ()
        pairs = [*(("usual", lr) for lr in self.lrs), *(("gentle", lr) for lr in gentle)]
        return [{"recipe": recipe, "lr": lr} for recipe, lr in pairs]

    def points(self) -> Iterator[Values]:
        """The keys of all rows that are wanted, those of one seed first."""
        for seed in range(self.seeds):
            for speedup in self.speedups if seed == 0 else self.repeated or self.speedups:
                for method in self.methods:
                    yield {"method": method, "speedup": speedup, "seed": seed}


def answer(config: Frontier, context: Context[Frontier]) -> Steps:
    """The original; each method's trials of learning rates; then a row for each method, budget and seed."""
    makers = _Makers(context)
    told = partial(_told, retry=partial(_retry, config, context))
    whole = Row({"way": "original", **_size(makers.networks[0], context.data)}, makers.original, short=makers.trained)
    if makers.trained:
        yield whole
    several = len(config.trials) > 1
    keys = [
        {"method": method, "tried_at": config.tuned_at, **tuning}
        for method in config.methods
        for tuning in config.trials
        if several
    ]
    tried = yield [Row(key, partial(makers.trial, **key), keep_errors=True, told=told) for key in keys]
    best: dict[str, Values] = {}
    for method in config.methods:
        found = [row for row in tried if row["method"] == method and "accuracy" in row]
        chosen = max(found, key=lambda row: row["accuracy"], default=config.trials[0])
        best[method] = {"recipe": chosen["recipe"], "lr": chosen["lr"], "tuned": bool(found)}
    points = [
        Row(key, partial(makers.point, **key, **best[key["method"]]), keep_errors=True, told=told)
        for key in config.points()
    ]
    yield points if makers.trained else [whole._replace(keep_errors=True, told=told), *points]


class _Makers:
    """Makes the rows."""

    def __init__(self, context: Context[Frontier]) -> None:
        config = context.config
        self.config, self.data = config, context.data
        load = partial(load_model, config.model, context.data.classes, config.weights, config.options)
        loaded = [load(seed=seed) for seed in range(config.seeds)]
        self.trained = loaded[0].trained
        if not self.trained and config.weights != "none":
            raise BadModel(
                f"{config.model} with weights {config.weights!r} is not trained for "
                f"the classes of {config.data}: give others, or --weights none"
            )
        self.networks = [one.model.to(context.device).eval() for one in loaded]
        self.budget = Budget(
            config.tuned_at, context.data.image_size, config.latency_batch, config.runtime, config.precision
        )

    @cached_property
    def parts(self) -> Data:
        """The training images without some, which judge the trials."""
        rest, val = self.data.hold_back(self.config.held)
        return replace(rest, val=val)

    def original(self) -> Values:
        """As it comes; or trained from nothing, by the first recipe, for all the time that every point has."""
        if self.trained:
            return {"accuracy": evaluate(self.networks[0], self.data.val)}
        network, tuning = self.networks[0], self.config.trials[0]
        done = Trial(network, self.data, self.budget, self._effort(0, **tuning)).finish(network)
        return {"accuracy": evaluate(done.model, self.data.val), **tuning, "seconds": _seconds(done)}

    def trial(self, method: str, tried_at: float, recipe: str, lr: float) -> Values:
        """A whole run on part of the images."""
        return self._made(method, tried_at, self.parts, self._effort(0, recipe, lr))

    def point(self, method: str, speedup: float, seed: int, recipe: str, lr: float, tuned: bool) -> Values:
        """What is compared; it also says how its learning rate came about."""
        made = self._made(method, speedup, self.data, self._effort(seed, recipe, lr))
        return {**made, "recipe": recipe, "lr": lr, "tuned": tuned}

    def _effort(self, seed: int, recipe: str, lr: float) -> Effort:
        config = self.config
        return Effort(
            config.seconds,
            search_lr=config.search_lr,
            batch_size=config.batch_size,
            seed=seed,
            distil=self.trained,
            pretrained=self.trained,
            lr=lr,
            recipe=recipe,
        )

    def _made(self, method: str, speedup: float, data: Data, effort: Effort) -> Values:
        """What a method makes of a network: accuracy, size, and latency in turns with the original's."""
        if method not in METHODS:
            raise BadConfig(nearest("method", method, METHODS))
        model, budget = self.networks[effort.seed], replace(self.budget, speedup=speedup)
        done = METHODS[method](Trial(model, data, budget, effort))
        timing = replace(budget, rounds=2 * budget.rounds).steady(model, done.model)
        return {
            "accuracy": evaluate(done.model, data.val),
            **_size(done.model, data),
            **latency(timing, speedup),
            "seconds": _seconds(done),
            "found": done.record,
        }


def _seconds(done: Pruned) -> float:
    return float(sum(done.record["seconds"].values()))


def _size(model: nn.Module, data: Data) -> dict[str, int]:
    shape = (3, data.image_size, data.image_size)
    return {"macs": count_macs(model, shape), "parameters": count_parameters(model)}


def _told(row: Values, retry: Callable[[Values], str]) -> str:
    names = ("way", "method", "speedup", "seed", "tried_at", "recipe", "lr")
    what = ", ".join(f"{name} {row[name]}" for name in names if name in row)
    if "error" in row:
        again = f"; to try it again: {retry(row)}" if row.get("method") in METHODS else ""
        return f"{what}: failed: {row['error']}{again}"
    if "accuracy" not in row:
        return f"{what}: not begun"
    if "measured_speedup" not in row:
        return f"{what}: {row['accuracy']:.2%}"
    return f"{what}: {row['accuracy']:.2%} at {row['measured_speedup']:.2f} times the speed, {row['seconds']:.0f} s"


def _retry(config: Frontier, context: Context[Frontier], row: Mapping[str, Any]) -> str:
    """The command that makes a row of a method again: a point, with those of other seeds; a trial, with all points."""
    speedups = (row["speedup"],) if "speedup" in row else config.speedups
    repeated = tuple(speedup for speedup in config.repeated if speedup in speedups)
    seeds = 1 if config.repeated and not repeated else config.seeds
    only = replace(config, methods=(row["method"],), speedups=speedups, repeated=repeated, seeds=seeds)
    return BENCHMARK.command(only, context.out)


BENCHMARK = Benchmark(
    "Against rivals",
    Frontier,
    answer,
    lambda record: [frontier_points(record).round(3).to_string()],
    selecting=("methods", "speedups", "repeated", "seeds"),
    shared=True,
)
