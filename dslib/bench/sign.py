"""Whether a larger latency weight makes the search's networks faster: `dslib bench sign`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from ..calibrating import calibrate
from ..data import load_data
from ..errors import BadConfig
from ..measuring import this_machine
from ..models import load_model
from ..profiling import CostTable, profile
from ..ranking import Importances
from ..records import Record, as_options, as_words, commit
from ..running import Run, pretrain
from ..searching import search
from ..sites import find_sites
from ..training import Train, evaluate
from .judging import quiet
from .rows import Rows

IMAGES = 512  # to calibrate on
WEIGHTS = (0.0, 0.03, 0.1, 0.3, 1.0, 3.0)


def record_sign(
    weights: tuple[float, ...] = WEIGHTS,
    seeds: int = 3,
    k: int = 8,
    epochs: int = 3,
    model: str = "mobilenet_v2",
    options: Mapping[str, Any] | None = None,
    accuracies: bool = True,
    out: Path | None = None,
    echo: Callable[[str], object] = print,
) -> Record:
    """Searches of one network, trained from nothing on the embedded digits, over latency weights and seeds, on the CPU.

    Args:
        weights: latency weights.
        seeds: searches of each.
        k: sites kept.
        epochs: of a search.
        model, options: as for `load_model`.
        accuracies: whether of the first seed's searches every k is calibrated too, and its accuracy taken.
        out: the record's file; rows that stand there are not made again.
        echo: is told the outcome.
    """
    if not (seeds > 0 and len(weights) > 1):
        raise BadConfig(f"expected seeds and two weights or more, found {seeds} and {weights}")
    data = load_data("digits")
    settings = {
        "weight": weights,
        "seeds": seeds,
        "k": k,
        "epochs": epochs,
        "model": model,
        "model_option": as_options(options),
    }
    command = f"dslib bench sign {as_words(settings)}" + ("" if accuracies else " --no-accuracies")
    rows = Rows(Record("sign", command, {**settings, "accuracies": accuracies}, {}, this_machine(), commit()), out)
    torch.manual_seed(0)
    network = load_model(model, data.classes, options=options).model
    run = Run(
        model,
        "digits",
        k,
        weights="none",
        options=options or {},
        pretrain=Train(epochs=8, lr=0.4, batch_size=64, warmup=1),
    )
    pretrain(network, data, run, head_only=False)
    sites = find_sites(network, data.image_size)
    costs = rows.add({"cost": "eager"}, lambda: {"table": asdict(quiet(lambda: profile(network, sites, 32), echo))})
    cost = CostTable(**costs["table"])
    original = evaluate(network, data.val)
    settled = replace(Run.search, k=k, epochs=epochs, lr=0.2)

    def searched(weight: float, seed: int) -> dict[str, Any]:
        found = search(network, data, sites, cost, replace(settled, latency_weight=weight, seed=seed))
        mask = found.mask(k)
        row = {"predicted_ms": cost.predict(mask, merged=False), "removed": list(mask.removed), "m": found.scores}
        return row | ({"calibrated_accuracy": calibrated(found)} if accuracies and not seed else {})

    def calibrated(found: Importances) -> dict[int, float]:
        """For each k the accuracy of what the search keeps, calibrated and not trained."""
        images, low, high = data.train.first(IMAGES), len(sites.always_kept), len(sites)
        small = (calibrate(network, found.mask(j), images, progress=False).model for j in range(low, high))
        return dict(zip(range(low, high + 1), [*(evaluate(one, data.val) for one in small), original], strict=True))

    for weight in weights:
        for seed in range(seeds):
            rows.add({"weight": weight, "seed": seed}, partial(searched, weight, seed))
    frame = pd.DataFrame([row for row in rows.record.values["rows"] if "weight" in row])
    rho, mean = spearman(frame), frame.groupby("weight")["predicted_ms"].mean()
    echo(
        f"accuracy before {original:.1%}; Spearman's rank correlation {rho:.2f}; weight -> "
        f"predicted ms, mean over seeds: {mean.round(2).to_dict()}"
    )
    return rows.record


def spearman(frame: pd.DataFrame) -> float:
    """Rank correlation of the columns `weight` and `predicted_ms`, -1 to 1."""
    return float(frame[["weight", "predicted_ms"]].corr(method="spearman").iloc[0, 1])
