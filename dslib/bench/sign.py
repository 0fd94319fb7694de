"""Does a larger latency weight make the search's networks faster, on the embedded digits?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import pandas as pd
import torch

from ..calibrating import calibrate
from ..data import load_data
from ..models import load_model
from ..profiling import CostTable, profile
from ..ranking import Importances
from ..records import Record
from ..running import Run, pretrain
from ..searching import search
from ..sites import find_sites
from ..training import Train, evaluate
from .benchmark import Benchmark, Context, Row, Steps, Values
from .plans import quiet
from .settings import BenchSettings, setting

IMAGES = 512  # to calibrate on


@dataclass(frozen=True)
class Sign(BenchSettings):
    """Searches of one network, trained from nothing, over latency weights and seeds, on the CPU.

    Args:
        weight: latency weights.
        seeds: searches of each.
        k: sites to keep.
        epochs: of a search.
        accuracies: of every k of the first seed's searches, calibrated.
    """

    weight: tuple[float, ...] = setting((0.0, 0.03, 0.1, 0.3, 1.0, 3.0), least=2)
    seeds: int = setting(3, "1 or more")
    k: int = 8
    epochs: int = 3
    model: str = "mobilenet_v2"
    model_option: dict[str, Any] | None = None
    accuracies: bool = True


def answer(config: Sign, context: Context[Sign]) -> Steps:
    """The network's costs; then a row for each latency weight and seed."""
    torch.manual_seed(0)
    data = load_data("digits")
    network = load_model(config.model, data.classes, options=config.model_option).model
    trained = Train(epochs=8, lr=0.4, batch_size=64, warmup=1)
    run = Run(config.model, "digits", config.k, weights="none", options=config.model_option or {}, pretrain=trained)
    pretrain(network, data, run, head_only=False)
    sites = find_sites(network, data.image_size)

    def costs() -> Values:
        return {"table": asdict(quiet(lambda: profile(network, sites, 32), context.echo))}

    cost = CostTable(**(yield Row({"cost": "eager"}, costs, short=True))["table"])
    original = evaluate(network, data.val)
    context.echo(f"accuracy before {original:.1%}")
    settled = replace(Run.search, k=config.k, epochs=config.epochs, lr=0.2)

    def searched(weight: float, seed: int) -> Values:
        found = search(network, data, sites, cost, replace(settled, latency_weight=weight, seed=seed))
        mask = found.mask(config.k)
        row = {"predicted_ms": cost.predict(mask, merged=False), "removed": list(mask.removed), "m": found.scores}
        return row | ({"calibrated_accuracy": calibrated(found)} if config.accuracies and not seed else {})

    def calibrated(found: Importances) -> dict[int, float]:
        """For each k the accuracy of what the search keeps, calibrated and not trained."""
        images, low, high = data.train.first(IMAGES), len(sites.always_kept), len(sites)
        small = (calibrate(network, found.mask(j), images, progress=False).model for j in range(low, high))
        return dict(zip(range(low, high + 1), [*(evaluate(one, data.val) for one in small), original], strict=True))

    for weight in config.weight:
        for seed in range(config.seeds):
            yield Row({"weight": weight, "seed": seed}, partial(searched, weight, seed))


def spearman(frame: pd.DataFrame) -> float:
    """Rank correlation of the columns `weight` and `predicted_ms`, -1 to 1."""
    return float(frame[["weight", "predicted_ms"]].corr(method="spearman").iloc[0, 1])


def _told(record: Record) -> Iterator[str]:
    rows = [row for row in record.values["rows"] if "weight" in row]
    if rows:
        frame = pd.DataFrame(rows)
        means = frame.groupby("weight")["predicted_ms"].mean().round(2).to_dict()
        yield f"Spearman's rank correlation {spearman(frame):.2f}; weight -> predicted ms, mean over seeds: {means}"


BENCHMARK = Benchmark("Which activations?", Sign, answer, _told)
