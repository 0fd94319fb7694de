"""How much memory a calibration takes, in a process of its own: `dslib bench memory`."""

from __future__ import annotations

import multiprocessing
import time
from typing import Any

import torch

from ..algebra import in_channels
from ..calibrating import calibrate
from ..errors import BadConfig
from ..measuring import peak_memory_gib, this_machine
from ..models import load_model
from ..records import Record, as_words, commit
from ..sites import find_sites


def record_memory(model: str = "mobilenet_v2", image_size: int = 128, count: int = 2048, last: int = 16) -> Record:
    """The largest resident memory before and after calibrating a network of random weights on random images.

    Args:
        model: name, as for `load_model`.
        image_size: side in pixels.
        count: images.
        last: how many of the network's last mergeable sites are removed; the last ones are its widest.
    """
    if not min(count, last) > 0:
        raise BadConfig(f"expected one or more images and sites, found {count} and {last}")
    if peak_memory_gib() is None:
        raise BadConfig("this system does not say how much memory a process takes: use Linux or macOS")
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # a process begins with no memory but its own
        values = pool.apply(_calibrate, (model, image_size, count, last))
    settings = {"model": model, "image_size": image_size, "count": count, "last": last}
    return Record("memory", f"dslib bench memory {as_words(settings)}", settings, values, this_machine(), commit())


def _calibrate(model: str, image_size: int, count: int, last: int) -> dict[str, Any]:
    torch.manual_seed(0)
    network = load_model(model).model
    network.eval()
    sites = find_sites(network, image_size)
    mask = sites.mask([name for name in sites.names if name not in sites.mergeable[-last:]])
    images = torch.randn(count, in_channels(network), image_size, image_size)
    before, started = peak_memory_gib(), time.perf_counter()
    calibrate(network, mask, images, progress=False)
    return {
        "removed": list(mask.removed),
        "seconds": time.perf_counter() - started,
        "images_gib": images.nbytes / 2**30,
        "peak_memory_before_gib": before,
        "peak_memory_gib": peak_memory_gib(),
    }
