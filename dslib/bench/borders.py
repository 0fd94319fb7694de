"""What exact borders cost over hoisted ones, and how long merging takes: `dslib bench borders`."""

from __future__ import annotations

import time

import torch

from ..algebra import in_channels
from ..errors import BadConfig
from ..measuring import measure, peak_memory_gib, this_machine
from ..merging import merge
from ..models import load_model
from ..records import Record, commit
from ..shrinking import shrink
from ..sites import find_sites

MERGES = 3  # the first of a process takes longer, and tells what one merge takes from nothing


def record_borders(model: str = "mobilenet_v2", image_size: int = 224, batch_size: int = 8, rounds: int = 30) -> Record:
    """All of a network's mergeable sites merged in three ways, measured in turns, as a record.

    Hoisted; exact with a bias per position; exact with a channel of ones. Weights are random: speed does not
    depend on them.

    Args:
        model: name, as for `load_model`; its sites must have exact borders.
        image_size: side in pixels.
        batch_size: images a batch.
        rounds: measurements of each.
    """
    if not (batch_size > 0 and rounds > 0):
        raise BadConfig(f"expected 1 or more images and rounds, found {batch_size} and {rounds}")
    network = load_model(model).model
    network.eval()
    sites = find_sites(network, image_size)
    hoisted, kept = (shrink(network, sites.mask([]), None, image_size, hoist) for hoist in (True, False))
    seconds = []
    for _ in range(MERGES):
        started = time.perf_counter()
        ways = {"hoisted": merge(hoisted)}
        seconds.append(time.perf_counter() - started)
    peak = peak_memory_gib()
    ways |= {"bias": merge(kept, image_size=image_size), "ones": merge(kept)}
    images = torch.randn(batch_size, in_channels(network), image_size, image_size)
    timing = measure(ways, images, rounds)
    networks = {}
    for name in ways:
        ratio, low, high = timing.speedup("hoisted", over=name)
        networks[name] = {"latency_ms": timing.median(name), "times_hoisted": ratio, "q25": low, "q75": high}
    values = {
        "networks": networks,
        "sites": len(sites.mergeable),
        "merge_seconds": seconds,
        "peak_memory_gib": peak,
        "runtime": timing.runtime,
    }
    config = {"model": model, "image_size": image_size, "batch_size": batch_size, "rounds": rounds, "seed": 0}
    command = f"dslib bench borders --model {model} --image-size {image_size} --batch-size {batch_size}"
    return Record("borders", f"{command} --rounds {rounds}", config, values, this_machine(), commit())
