"""The accuracy that calibration keeps at a speed-up that was measured: `dslib bench speedup`."""

from __future__ import annotations

from typing import Any

import torch

from ..algebra import in_channels
from ..calibrating import Calibrate, calibrate
from ..data import load_data
from ..measuring import measure, this_machine
from ..models import load_model
from ..planning import for_speedup
from ..profiling import profile
from ..ranking import rank
from ..records import Record, as_words, commit
from ..sites import find_sites
from ..training import evaluate


def record_speedup(
    model: str,
    data: str,
    image_size: int | None = None,
    speedup: float = 1.3,
    runtimes: tuple[str, ...] = ("eager",),
    batch_size: int = 32,
    count: int = 2048,
    rank_count: int = 512,
    rounds: int = 30,
    seed: int = 0,
) -> Record:
    """For each runtime, the least important blocks whose removal is so many times faster there; then calibrate.

    All networks are then timed on all runtimes, BatchNorm folded. Accuracies are for the report only.

    Args:
        model: name of a network with default weights for the data.
        data: a dataset; its training images are used without labels, its validation split gives the accuracies.
        image_size: side in pixels.
        speedup: asked of each runtime, over the original on the same.
        runtimes: as for `measure`.
        batch_size: that is timed.
        count, rank_count: images for the calibration and for the ranking.
        rounds: of the final timing.
        seed: of the choice of images and positions.
    """
    loaded = load_data(data, image_size)
    network = load_model(model, loaded.classes, "default").model
    network.eval()
    size = loaded.image_size
    sites = find_sites(network, size)
    config = Calibrate(seed=seed)
    found = rank(network, sites, loaded.train.first(rank_count, seed), config)
    networks = {"original": network}
    rows: dict[str, dict[str, Any]] = {"original": {"removed": [], "accuracy": evaluate(network, loaded.val)}}
    for runtime in runtimes:
        cost = profile(network, sites, batch_size, runtime=runtime)
        plan, _ = for_speedup(network, found, cost, speedup, runtime=runtime)
        name = f"for {runtime}"
        networks[name] = calibrate(network, plan, loaded.train.first(count, seed), config).model
        rows[name] = {
            "removed": list(plan.mask.removed),
            "k": plan.mask.k,
            "accuracy": evaluate(networks[name], loaded.val),
            "kept_ms": cost.kept,
            "merged_ms": cost.merged,
        }
    images = torch.randn(batch_size, in_channels(network), size, size, generator=torch.Generator().manual_seed(seed))
    for runtime in runtimes:
        timing = measure(networks, images, rounds, runtime=runtime)
        for name, row in rows.items():
            ratio, low, high = timing.speedup(name, over="original")
            timed = {"latency_ms": timing.median(name), "speedup": ratio, "q25": low, "q75": high}
            row.setdefault("timing", {})[timing.runtime] = timed
    best = {name: min(timed["latency_ms"] for timed in row["timing"].values()) for name, row in rows.items()}
    for name, row in rows.items():
        row["speedup_best_runtimes"] = best["original"] / best[name]
    values = {"importance": found.scores, "networks": rows, "val_images": len(loaded.val)}
    settings = {
        "model": model,
        "data": data,
        "image_size": size,
        "speedup": speedup,
        "runtime": runtimes,
        "batch_size": batch_size,
        "count": count,
        "rank_count": rank_count,
        "rounds": rounds,
        "seed": seed,
    }
    return Record("speedup", f"dslib bench speedup {as_words(settings)}", settings, values, this_machine(), commit())
