"""What do exact borders cost over hoisted ones, and how long does merging take?"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from ..measuring import measure, peak_memory_gib
from ..merging import merge
from ..models import load_model
from ..records import Record
from ..shrinking import shrink
from ..sites import find_sites
from .benchmark import Benchmark, Context, Values, noise, speedup_of
from .settings import OneTiming

MERGES = 3  # the first of a process takes longer, and tells what one merge takes from nothing


@dataclass(frozen=True)
class Borders(OneTiming):
    """All of a network's mergeable sites merged hoisted; exact with a bias per position; exact with a channel of ones.

    They are measured in turns. Weights are random: speed does not depend on them.
    """

    seed: int = field(default=0, init=False)


def answer(config: Borders, _: Context[Borders]) -> Values:
    """Latency of each way and how many times the hoisted one's it is; seconds of each merge."""
    network = load_model(config.model).model.eval()
    sites = find_sites(network, config.image_size)
    hoisted, kept = (shrink(network, sites.mask([]), None, config.image_size, hoist) for hoist in (True, False))
    seconds = []
    for _number in range(MERGES):
        started = time.perf_counter()
        ways = {"hoisted": merge(hoisted)}
        seconds.append(time.perf_counter() - started)
    peak = peak_memory_gib()
    ways |= {"bias": merge(kept, image_size=config.image_size), "ones": merge(kept)}
    images = noise(network, config.batch_size, config.image_size)
    timing = measure(ways, images, config.rounds)
    return {
        "networks": {
            name: {"latency_ms": timing.median(name), **speedup_of(timing, "hoisted", name, "times_hoisted")}
            for name in ways
        },
        "sites": len(sites.mergeable),
        "merge_seconds": seconds,
        "peak_memory_gib": peak,
        "runtime": timing.runtime,
    }


def _told(record: Record) -> Iterator[str]:
    values = record.values
    for name, value in values["networks"].items():
        yield f"{name:8} {value['latency_ms']:.2f} ms per batch, {value['times_hoisted']:.3f} x hoisted"
    seconds = ", ".join(f"{s:.2f}" for s in values["merge_seconds"])
    yield f"merged {values['sites']} sites, {len(values['merge_seconds'])} times, in {seconds} s"


BENCHMARK = Benchmark("What does it cost and save here?", Borders, answer, _told)
