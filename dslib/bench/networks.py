"""The trained networks that come with the book: `dslib bench networks`."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..calibrating import Calibrate, calibrate
from ..data import load_data
from ..errors import BadConfig, BadModel
from ..measuring import count_macs, count_parameters, dense, measure, this_machine
from ..models import load_model
from ..planning import for_speedup
from ..profiling import profile
from ..ranking import rank
from ..records import Record, as_words, commit
from ..saving import Recipe, load, save
from ..sites import Plan, find_sites
from ..training import evaluate

DENSE = "dense counterpart"


def record_networks(
    folder: Path = Path("data/networks"),
    model: str = "mobilenet_v2",
    data: str = "imagenette",
    image_size: int = 128,
    ks: tuple[int, ...] = (8,),
    speedups: tuple[float, ...] = (1.5,),
    planned_on: str = "onnxruntime",
    count: int = 2048,
    rank_count: int = 512,
    batch_size: int = 1,
    runtimes: tuple[str, ...] = ("eager", "onnxruntime", "openvino"),
    echo: Callable[[str], object] = print,
) -> Record:
    """A pretrained network and what calibration makes of it without labels, in half precision; and how fast they are.

    Accuracies are those of the files: loaded again, on the validation split. Networks that stand in the folder are
    kept.

    Args:
        folder: for `original`, `k8`, `x1.5` and so on, recipes and weights.
        model: with pretrained weights, as for `load_model`.
        data, image_size: as for `load_data`.
        ks: how many of the highest ranked sites are kept; the others are merged.
        speedups: over the original, for which blocks may be dropped too.
        planned_on: the runtime that these are planned and measured on.
        count, rank_count: training images to calibrate and to rank with.
        batch_size: images a batch, of the latencies.
        runtimes: that latencies are measured on, of these networks and of the original's dense counterpart.
        echo: is told each network.
    """
    loaded = load_data(data, image_size)
    found = load_model(model, loaded.classes, "default")
    if not found.trained:
        raise BadModel(f"{model} is not trained for the classes of {data}: choose others")
    network = found.model.eval()
    sites, images = find_sites(network, image_size), loaded.train.first(count)
    for k in ks:
        sites.check_k(k)
    if not min(speedups, default=2) > 1:
        raise BadConfig(f"speedups: expected more than 1, found {speedups}")
    recipe = Recipe(model, tuple(loaded.classes), image_size)
    _kept(folder / "original", lambda: (network, recipe))

    ranking = functools.cache(lambda: rank(network, sites, images.first(rank_count), drop=bool(speedups)))
    costs = functools.cache(lambda: profile(network, sites, batch_size, runtime=planned_on))

    def calibrated(plan: Plan) -> tuple[nn.Module, Recipe]:
        done = calibrate(network, plan, images, Calibrate())
        return done.model, replace(recipe, mask=dict(plan.mask), merged=tuple(done.errors), dropped=tuple(plan.dropped))

    def keeping(k: int) -> tuple[nn.Module, Recipe]:
        return calibrated(Plan(ranking().mask(k)))

    def planned(speedup: float) -> tuple[nn.Module, Recipe]:
        return calibrated(for_speedup(network, ranking(), costs(), speedup, runtime=planned_on)[0])

    makers = {f"k{k}": functools.partial(keeping, k) for k in ks}
    makers |= {f"x{speedup:g}": functools.partial(planned, speedup) for speedup in speedups}
    for name, make in makers.items():
        _kept(folder / name, make)
    rows: list[dict[str, Any]] = []
    networks = {}
    for name in ("original", *makers):
        networks[name], made = load(folder / name, model)
        same = (made.model, made.classes, made.image_size) == (model, recipe.classes, image_size)
        if not same:
            raise BadConfig(f"{folder / name}.json is of {made.model} at {made.image_size} px: give another folder")
        removed = [] if made.mask is None else [site for site, on in made.mask.items() if not on]
        rows.append(
            {
                "network": name,
                "accuracy": evaluate(networks[name], loaded.val),
                "removed": removed,
                "dropped": list(made.dropped),
                "macs": count_macs(networks[name], (3, image_size, image_size)),
                "parameters": count_parameters(networks[name]),
            }
        )
        echo(f"{name}: accuracy {rows[-1]['accuracy']:.2%}, {rows[-1]['parameters']:,} parameters")
    networks[DENSE] = dense(network, sites).model
    timings = []
    for runtime in runtimes:
        timing = measure(networks, torch.randn(batch_size, 3, image_size, image_size), 41, runtime=runtime)
        for name in networks:
            ratio, low, high = timing.speedup(name, over="original")
            timings.append(
                {
                    "network": name,
                    "runtime": timing.runtime,
                    "ms": timing.median(name),
                    "speedup": ratio,
                    "q25": low,
                    "q75": high,
                    "busy": timing.busy,
                }
            )
            echo(f"{name}: {ratio:.2f} times as fast as the original on {timing.runtime}")
    settings = {
        "folder": str(folder),
        "model": model,
        "data": data,
        "image_size": image_size,
        "k": ks,
        "speedup": speedups,
        "planned_on": planned_on,
        "count": count,
        "rank_count": rank_count,
        "batch_size": batch_size,
        "runtime": runtimes,
    }
    command = f"dslib bench networks {as_words(settings)}"
    return Record("networks", command, settings, {"rows": rows, "timings": timings}, this_machine(), commit())


def _kept(path: Path, make: Callable[[], tuple[nn.Module, Recipe]]) -> None:
    """Write a network in half precision, which a recipe's loading makes float32 again; unless one stands there."""
    if not path.with_name(f"{path.name}.json").exists():
        network, recipe = make()
        save(path, copy.deepcopy(network).half(), recipe)
