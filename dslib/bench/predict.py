"""How well a profile predicts the latency of whole networks: `dslib bench predict`."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from ..algebra import in_channels
from ..errors import BadConfig
from ..measuring import measure, pick_device, this_machine
from ..merging import merge
from ..models import load_model
from ..profiling import profile
from ..records import Record, as_words, commit
from ..shrinking import shrink
from ..sites import find_sites


def record_prediction(
    model: str,
    image_size: int = 224,
    batch_size: int = 8,
    runtime: str = "eager",
    device: str = "auto",
    masks: int = 20,
    rounds: int = 15,
    seed: int = 0,
) -> Record:
    """Profile a network, then measure it with random masks, each in turns with the original.

    The predicted latency of a mask is compared with the profile's latency of the original times the measured ratio
    (`measured_ms`), so that a slow spell of the machine between profile and measurement does not count; the medians
    as they came are in the rows too.

    Args:
        model: name, as for `load_model`; random weights.
        image_size: side in pixels.
        batch_size: images a batch; halved until the memory suffices.
        runtime: as for `measure`.
        device: to measure.
        masks: how many; each site is removed with a probability that is drawn for the mask.
        rounds: measurements of each.
        seed: of the masks.
    """
    if not (masks > 0 and batch_size > 0):
        raise BadConfig(f"expected one or more masks and images, found {masks} and {batch_size}")
    where = pick_device(device)
    network = load_model(model).model.to(where)
    network.eval()
    sites = find_sites(network, image_size)
    cost = profile(network, sites, batch_size, rounds=rounds, runtime=runtime)
    images = torch.randn(cost.batch_size, in_channels(network), image_size, image_size, device=where)
    generator, rows = random.Random(seed), list[dict[str, Any]]()
    while len(rows) < masks:
        share = generator.random()
        removed = [name for name in sites.mergeable if generator.random() < share]
        if not removed:
            continue
        mask = sites.mask([name for name in sites.names if name not in removed])
        small = merge(shrink(network, mask, image_size=image_size), only=cost.worth_merging(mask))
        timing = measure({"original": network, "small": small}, images, rounds, runtime=runtime)
        measured = cost.total * timing.median("small") / timing.median("original")
        predicted = cost.predict(mask, merged=False)
        rows.append(
            {
                "removed": removed,
                "predicted_ms": predicted,
                "measured_ms": measured,
                "error": predicted / measured - 1,
                "median_ms": timing.median("small"),
                "original_median_ms": timing.median("original"),
                "busy": timing.busy,
            }
        )
    errors = np.abs([row["error"] for row in rows])
    values = {
        "total_ms": cost.total,
        "rows": rows,
        "median_error": float(np.median(errors)),
        "largest_error": errors.max(),
        "runtime": cost.runtime,
        "measured_batch_size": cost.batch_size,
    }
    settings = {
        "model": model,
        "image_size": image_size,
        "batch_size": batch_size,
        "runtime": runtime,
        "device": str(where),
        "masks": masks,
        "rounds": rounds,
        "seed": seed,
    }
    return Record(
        "predict", f"dslib bench predict {as_words(settings)}", settings, values, this_machine(where), commit()
    )
