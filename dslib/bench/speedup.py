"""What accuracy does calibration keep at a measured speed-up, on each runtime?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ..algebra import in_channels
from ..calibrating import Calibrate
from ..compressing import compress
from ..measuring import measure
from ..profiling import profile
from ..ranking import rank
from ..records import Record
from ..training import evaluate
from .benchmark import Benchmark, Context, Values, speedup_of
from .settings import ON_RUNTIMES, OnTrained, setting


@dataclass(frozen=True)
class Speedup(OnTrained):
    """For each runtime, the least important blocks whose removal is so many times faster there; then calibrate.

    All networks are then timed on all runtimes, BatchNorm folded. Accuracies are for the report only.

    Args:
        speedup: over the original, on the same runtime.
        runtime: any number of them.
        batch_size: that is timed.
        rounds: of the final timing.
        seed: of the choice of images and positions.
    """

    speedup: float = 1.3
    runtime: tuple[str, ...] = setting(("eager", "openvino"), ON_RUNTIMES)
    batch_size: int = 32
    rounds: int = 30
    seed: int = 0


def answer(config: Speedup, context: Context[Speedup]) -> Values:
    """Each network's accuracy, and its timing on each runtime."""
    data, (network, sites) = context.data, context.trained
    settings = Calibrate(seed=config.seed)
    found = rank(network, sites, data.train.first(config.rank_count, config.seed), settings)
    networks = {"original": network}
    rows: dict[str, Values] = {"original": {"removed": [], "accuracy": evaluate(network, data.val)}}
    for runtime in config.runtime:
        cost = profile(network, sites, config.batch_size, runtime=runtime)
        images = data.train.first(config.count, config.seed)
        asked: Values = {"speedup": config.speedup, "runtime": runtime, "ranking": found, "costs": cost}
        small, plan, *_ = compress(network, images, **asked, config=settings)
        networks[f"for {runtime}"] = small
        rows[f"for {runtime}"] = {
            "removed": list(plan.mask.removed),
            "k": plan.mask.k,
            "accuracy": evaluate(small, data.val),
            "kept_ms": cost.kept,
            "merged_ms": cost.merged,
        }
    timings = _timings(networks, config)
    best = {name: min(one["latency_ms"] for one in found.values()) for name, found in timings.items()}
    for name, row in rows.items():
        row |= {"timing": timings[name], "speedup_best_runtimes": best["original"] / best[name]}
    return {"importance": found.scores, "networks": rows, "val_images": len(data.val)}


def _timings(networks: Mapping[str, nn.Module], config: Speedup) -> dict[str, dict[str, Values]]:
    """Network -> runtime -> its timing."""
    generator = torch.Generator().manual_seed(config.seed)
    size, channels = config.image_size or 0, in_channels(networks["original"])
    images = torch.randn(config.batch_size, channels, size, size, generator=generator)
    found: dict[str, dict[str, Values]] = {name: {} for name in networks}
    for runtime in config.runtime:
        timing = measure(networks, images, config.rounds, runtime=runtime)
        for name in networks:
            times = speedup_of(timing, name, "original")
            found[name][timing.runtime] = {"latency_ms": timing.median(name), **times}
    return found


def _told(record: Record) -> Iterator[str]:
    for name, row in record.values["networks"].items():
        times = ", ".join(f"{t['speedup']:.2f} x on {runtime}" for runtime, t in row["timing"].items())
        yield f"{name}: accuracy {row['accuracy']:.2%}, {len(row['removed'])} removed, {times}"


BENCHMARK = Benchmark("Calibration", Speedup, answer, _told)
