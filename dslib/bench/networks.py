"""How accurate and how fast are the trained networks that come with the book, original and calibrated?"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ..compressing import compress
from ..errors import BadConfig
from ..measuring import count_macs, count_parameters, dense, measure
from ..profiling import profile
from ..ranking import rank
from ..saving import Recipe, load, save
from ..training import evaluate
from .benchmark import Benchmark, Context, Values, noise, speedup_of
from .settings import ON_RUNTIMES, OnTrained, setting

DENSE = "dense counterpart"
ROUNDS = 41  # of each timing


@dataclass(frozen=True)
class Networks(OnTrained):
    """A pretrained network and what calibration makes of it without labels, in half precision; and how fast they are.

    Accuracies are those of the files: loaded again, on the validation split. Networks that stand in the folder are
    kept.

    Args:
        folder: for `original`, `k8`, `x1.5` and so on, recipes and weights.
        k: how many of the highest ranked sites are kept; the others are merged.
        speedup: over the original, to be reached by merging and dropping blocks.
        planned_on: the runtime that these are planned and measured on.
        batch_size: images a batch, of the latencies.
        runtime: that latencies are measured on, of these networks and of the original's dense counterpart.
    """

    image_size: int = 128
    folder: Path = Path("data/networks")
    k: tuple[int, ...] = (8,)
    speedup: tuple[float, ...] = setting((1.5,), "more than 1")
    planned_on: str = setting("onnxruntime", ON_RUNTIMES)
    batch_size: int = 1
    runtime: tuple[str, ...] = setting(("eager", "onnxruntime", "openvino"), ON_RUNTIMES)


def answer(config: Networks, context: Context[Networks]) -> Values:
    """A row for each network, and the timings of all on each runtime."""
    original, sites = context.trained
    for k in config.k:
        sites.check_k(k)
    makers = _makers(config, context)
    for name, make in makers.items():
        path = config.folder / name
        if not path.with_name(f"{name}.json").exists():
            network, recipe = make()
            save(path, copy.deepcopy(network).half(), recipe)  # loading makes float32 of it again
    rows, networks, wanted = [], dict[str, nn.Module](), (config.model, tuple(context.data.classes), config.image_size)
    for name in makers:
        networks[name], recipe = load(config.folder / name, config.model)
        if (recipe.model, recipe.classes, recipe.image_size) != wanted:
            path = config.folder / f"{name}.json"
            raise BadConfig(f"{path} is of {recipe.model} at {recipe.image_size} px: give another folder")
        rows.append({"network": name, **_row(networks[name], recipe, context)})
        context.echo(f"{name}: accuracy {rows[-1]['accuracy']:.2%}, {rows[-1]['parameters']:,} parameters")
    networks[DENSE] = dense(original, sites).model
    return {"rows": rows, "timings": _timings(networks, config, context.echo)}


def _makers(config: Networks, context: Context[Networks]) -> dict[str, Callable[[], tuple[nn.Module, Recipe]]]:
    """Name of a network -> what makes it and its recipe; ranking and costs are made once, if at all."""
    original, sites = context.trained
    images = context.data.train.first(config.count)
    recipe = Recipe(config.model, tuple(context.data.classes), config.image_size)
    ranking = functools.cache(lambda: rank(original, sites, images.first(config.rank_count), drop=bool(config.speedup)))
    costs = functools.cache(lambda: profile(original, sites, config.batch_size, runtime=config.planned_on))

    def small(k: int | None = None, speedup: float | None = None) -> tuple[nn.Module, Recipe]:
        on: Values = {} if speedup is None else {"runtime": config.planned_on, "costs": costs(), "drop": True}
        done = compress(original, images, k, speedup, ranking=ranking(), **on)
        return done.model, done.recipe(recipe)

    return {
        "original": lambda: (original, recipe),
        **{f"k{k}": functools.partial(small, k) for k in config.k},
        **{f"x{speedup:g}": functools.partial(small, None, speedup) for speedup in config.speedup},
    }


def _row(network: nn.Module, recipe: Recipe, context: Context[Networks]) -> Values:
    size = context.data.image_size
    return {
        "accuracy": evaluate(network, context.data.val),
        "removed": [] if recipe.mask is None else [site for site, on in recipe.mask.items() if not on],
        "dropped": list(recipe.dropped),
        "macs": count_macs(network, (3, size, size)),
        "parameters": count_parameters(network),
    }


def _timings(networks: Mapping[str, nn.Module], config: Networks, echo: Callable[[str], object]) -> list[Values]:
    timings = []
    for runtime in config.runtime:
        images = noise(networks["original"], config.batch_size, config.image_size)
        timing = measure(networks, images, ROUNDS, runtime=runtime)
        for name in networks:
            row = {"network": name, "runtime": timing.runtime, "ms": timing.median(name)}
            row |= {**speedup_of(timing, name, "original"), "busy": timing.busy}
            timings.append(row)
            echo(f"{name}: {row['speedup']:.2f} times as fast as the original on {timing.runtime}")
    return timings


BENCHMARK = Benchmark("Calibration", Networks, answer)
