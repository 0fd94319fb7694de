"""How accurate is a network that is calibrated to every k, without labels, beside random masks?"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

from torch import nn

from ..calibrating import Calibrate
from ..measuring import measure
from ..ranking import rank
from ..records import Record
from ..sites import Mask, Sites
from ..training import evaluate
from .benchmark import Benchmark, Context, Values, noise, speedup_of
from .plans import ROUNDS, calibrated_row
from .settings import OnTrained, setting

BATCH = 32  # of the timings


@dataclass(frozen=True)
class Depths(OnTrained):
    """Rank the sites once without labels, calibrate for every k, and evaluate; random masks beside.

    Accuracy is for the report only, nothing is chosen by it. Of each k the speed too, in PyTorch, in turns with the
    original.

    Args:
        random_masks: random masks beside, for each third k.
        seed: of the choice of images, positions and random masks.
    """

    count: int = setting(1024, "1 or more")
    random_masks: int = 2
    seed: int = 0
    weights: str = "default"
    model_option: dict[str, Any] | None = None


def answer(config: Depths, context: Context[Depths]) -> Values:
    """A row for each k and for each random mask."""
    data, (network, sites) = context.data, context.trained
    images, settings = data.train.first(config.count, config.seed), Calibrate(seed=config.seed)
    started = time.perf_counter()
    found = rank(network, sites, data.train.first(config.rank_count, config.seed), settings)
    ranking_seconds = time.perf_counter() - started
    low, high = len(sites.always_kept), len(sites)
    whole = {"removed": [], "seconds": 0.0, "agreement": 1.0, "accuracy": evaluate(network, data.val), "speedup": 1.0}
    rows: list[Values] = [{"k": high, **whole}]
    for k in range(high - 1, low - 1, -1):
        small, row = calibrated_row(network, found.mask(k), images, data, settings)
        rows.append({"k": k, **row, **_speed(network, small, data.image_size)})
    rng = Random(config.seed)
    others = [
        {"k": k, **calibrated_row(network, _random(sites, k, rng), images, data, settings)[1]}
        for k in range(high - 2, low, -3)
        for _ in range(config.random_masks)
    ]
    return {
        "importance": found.scores,
        "ranking_seconds": ranking_seconds,
        "depths": rows,
        "random": others,
        "seconds_without_evaluation": ranking_seconds + sum(row["seconds"] for row in rows),
        "val_images": len(data.val),
    }


def _speed(network: nn.Module, small: nn.Module, image_size: int) -> Values:
    timing = measure({"original": network, "small": small}, noise(network, BATCH, image_size), ROUNDS)
    return {**speedup_of(timing, "small", "original"), "busy": timing.busy, "runtime": timing.runtime}


def _random(sites: Sites, k: int, rng: Random) -> Mask:
    """A random mask that keeps k sites, those that cannot be merged among them."""
    return sites.mask(rng.sample(sites.mergeable, k - len(sites.always_kept)))


def _told(record: Record) -> Iterator[str]:
    for row in record.values["depths"]:
        shares = f"accuracy {row['accuracy']:.2%}, agreement {row['agreement']:.2%}"
        yield f"k={row['k']:<3} {shares}, {row['seconds']:.1f} s"
    yield f"{record.values['seconds_without_evaluation']:.0f} s in all, evaluation apart"


BENCHMARK = Benchmark("Calibration", Depths, answer, _told)
