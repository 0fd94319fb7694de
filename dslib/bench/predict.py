"""How far are the latencies that a profile predicts from measured ones, over random masks?"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from ..measuring import measure
from ..merging import merge
from ..models import load_model
from ..profiling import CostTable, profile
from ..records import Record
from ..shrinking import shrink
from ..sites import Mask, find_sites
from .benchmark import Benchmark, Context, Values, noise
from .settings import ON_RUNTIMES, OneTiming, setting


@dataclass(frozen=True)
class Prediction(OneTiming):
    """Profile a network, then measure it with random masks, each in turns with the original.

    Args:
        batch_size: images a batch; halved until the memory suffices.
        masks: random masks; each site is removed with a probability that is drawn for the mask.
        seed: of the masks.
    """

    runtime: str = setting("eager", ON_RUNTIMES)
    device: str = "auto"
    masks: int = setting(20, "1 or more")
    rounds: int = setting(15, "1 or more")
    seed: int = 0


def answer(config: Prediction, context: Context[Prediction]) -> Values:
    """A row for each mask, and how far predictions are off.

    The predicted latency of a mask is compared with the profile's latency of the original times the measured ratio
    (`measured_ms`), so that a slow spell of the machine between profile and measurement does not count; the medians
    as they came are in the rows too.
    """
    network = load_model(config.model).model.to(context.device).eval()
    sites = find_sites(network, config.image_size)
    cost = profile(network, sites, config.batch_size, rounds=config.rounds, runtime=config.runtime)
    images = noise(network, cost.batch_size, config.image_size, context.device)
    generator, rows = random.Random(config.seed), list[Values]()
    while len(rows) < config.masks:
        share = generator.random()
        removed = [name for name in sites.mergeable if generator.random() < share]
        if removed:
            mask = sites.mask([name for name in sites.names if name not in removed])
            rows.append({"removed": removed, **_row(network, mask, cost, images, config)})
    errors = np.abs([row["error"] for row in rows])
    return {
        "total_ms": cost.total,
        "rows": rows,
        "median_error": float(np.median(errors)),
        "largest_error": errors.max(),
        "runtime": cost.runtime,
        "measured_batch_size": cost.batch_size,
    }


def _row(network: nn.Module, mask: Mask, cost: CostTable, images: Tensor, config: Prediction) -> Values:
    small = merge(shrink(network, mask, image_size=config.image_size), only=cost.worth_merging(mask))
    timing = measure({"original": network, "small": small}, images, config.rounds, runtime=config.runtime)
    measured = cost.total * timing.median("small") / timing.median("original")
    predicted = cost.predict(mask, merged=False)
    return {
        "predicted_ms": predicted,
        "measured_ms": measured,
        "error": predicted / measured - 1,
        "median_ms": timing.median("small"),
        "original_median_ms": timing.median("original"),
        "busy": timing.busy,
    }


def _told(record: Record) -> Iterator[str]:
    for row in record.values["rows"]:
        yield (
            f"{len(row['removed'])} removed: predicted {row['predicted_ms']:.1f} ms, measured "
            f"{row['measured_ms']:.1f} ms ({row['error']:+.1%})"
        )
    yield f"median error {record.values['median_error']:.1%}, largest {record.values['largest_error']:.1%}"


BENCHMARK = Benchmark("What does it cost and save here?", Prediction, answer, _told)
