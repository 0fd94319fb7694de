"""How much memory does a calibration take?"""

from __future__ import annotations

import multiprocessing
import time
from dataclasses import dataclass

import torch

from ..calibrating import calibrate
from ..errors import BadConfig
from ..measuring import peak_memory_gib
from ..models import load_model
from ..sites import find_sites
from .benchmark import Benchmark, Context, Values, noise
from .settings import BenchSettings, setting


@dataclass(frozen=True)
class Memory(BenchSettings):
    """Calibrate a network of random weights on random images, in a process of its own.

    Args:
        count: random images.
        last: how many of the network's last mergeable sites are removed; the last ones are its widest.
    """

    model: str = "mobilenet_v2"
    image_size: int = 128
    count: int = setting(2048, "1 or more")
    last: int = setting(16, "1 or more")


def answer(config: Memory, _: Context[Memory]) -> Values:
    """The largest resident memory before and after."""
    if peak_memory_gib() is None:
        raise BadConfig("this system does not say how much memory a process takes: use Linux or macOS")
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # a process begins with no memory but its own
        return pool.apply(_calibrate, (config,))


def _calibrate(config: Memory) -> Values:
    torch.manual_seed(0)
    network = load_model(config.model).model.eval()
    sites = find_sites(network, config.image_size)
    mask = sites.mask([name for name in sites.names if name not in sites.mergeable[-config.last :]])
    images = noise(network, config.count, config.image_size)
    before, started = peak_memory_gib(), time.perf_counter()
    calibrate(network, mask, images, progress=False)
    return {
        "removed": list(mask.removed),
        "seconds": time.perf_counter() - started,
        "images_gib": images.nbytes / 2**30,
        "peak_memory_before_gib": before,
        "peak_memory_gib": peak_memory_gib(),
    }


TOLD = "{peak_memory_gib:.1f} GiB ({images_gib:.1f} of them images), {seconds:.0f} s"
BENCHMARK = Benchmark("Calibration", Memory, answer, TOLD)
