"""A mask's three accuracies: plain, with boundary activation, and self-distilled too: `dslib bench ablation`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from ..baselines import PAPER_KEPT
from ..data import load_data
from ..errors import BadConfig, BadModel, nearest
from ..finetuning import Finetune, finetune
from ..measuring import pick_device, this_machine
from ..models import load_model
from ..records import Record, as_options, as_words, commit
from ..shrinking import shrink
from ..sites import find_sites
from ..training import evaluate
from .rows import Rows

WAYS = {"plain": (False, False), "boundary": (True, False), "distilled": (True, True)}  # boundary ReLU6, teacher


def record_ablation(
    mask: str = "A",
    model: str = "mobilenet_v2",
    weights: str = "default",
    options: Mapping[str, Any] | None = None,
    data: str = "imagenette",
    image_size: int | None = None,
    epochs: int = 2,
    lr: float = 0.1,
    batch_size: int = 64,
    seeds: int = 3,
    device: str = "auto",
    hours: float | None = None,
    out: Path | None = None,
    echo: Callable[[str], object] = print,
) -> Record:
    """Finetune one shrunk network in the paper's three ways, over seeds; activations are torn out, none fades.

    Args:
        mask: one of the paper's, A to F, for a network with MobileNetV2's 17 sites.
        model, weights, options: as for `load_model`; weights must be trained for the data's classes.
        data, image_size: as for `load_data`.
        epochs, lr, batch_size: of each finetuning.
        seeds: finetunings of each way.
        device: as for `pick_device`.
        hours: begin no row after so many.
        out: the record's file; rows that stand there are not made again.
        echo: is told the outcome.
    Source: Fu et al., ICML 2022, table 2: that its three accuracies are these is inferred, see data/paper/README.md.
    """
    if mask not in PAPER_KEPT:
        raise BadConfig(nearest("mask", mask, PAPER_KEPT))
    if not min(seeds, epochs) > 0:
        raise BadConfig(f"seeds, epochs: expected 1 or more, found {seeds} and {epochs}")
    loaded = load_data(data, image_size)
    settings = {
        "mask": mask,
        "model": model,
        "weights": weights,
        "model_option": as_options(options),
        "data": data,
        "image_size": loaded.image_size,
        "epochs": epochs,
        "lr": lr,
        "batch_size": batch_size,
        "seeds": seeds,
    }
    where = pick_device(device)
    rows = Rows(
        Record("ablation", f"dslib bench ablation {as_words(settings)}", settings, {}, this_machine(where), commit()),
        out,
        selecting=("seeds",),
        hours=hours,
    )
    network, trained = load_model(model, loaded.classes, weights, options)
    if not trained:
        raise BadModel(f"{model} with weights {weights!r} is not trained for the classes of {data}")
    network = network.to(where, memory_format=torch.channels_last)  # type: ignore[call-overload]
    sites = find_sites(network, loaded.image_size)
    if len(sites) != 17:
        raise BadConfig(f"the paper's masks are for MobileNetV2's 17 sites, found {len(sites)} in {model}")
    kept = sites.mask([sites.names[i] for i in PAPER_KEPT[mask]])

    def tuned(way: str, seed: int) -> dict[str, Any]:
        boundary, teacher = WAYS[way]
        small = shrink(network, kept, nn.ReLU6 if boundary else None, loaded.image_size)
        before, began = evaluate(small, loaded.val), time.perf_counter()
        config = Finetune(epochs=epochs, lr=lr, batch_size=batch_size, seed=seed)
        done = finetune(small, loaded, network if teacher else None, config)
        return {
            "before": before,
            "accuracy": done.history[-1]["val_accuracy"],
            "history": done.history,
            "seconds": time.perf_counter() - began,
        }

    rows.add({"way": "original"}, lambda: {"accuracy": evaluate(network, loaded.val)})
    for seed in range(seeds):
        for way in WAYS:
            rows.add({"way": way, "seed": seed}, partial(tuned, way, seed))
    echo(table(rows.record).to_string())
    for missing in rows.missing:
        echo(f"not begun, the hours are over: {missing}")
    return rows.record


def table(record: Record) -> pd.DataFrame:
    """One row a way: accuracy in percent, its mean over seeds, its standard deviation, and how many seeds."""
    frame = pd.DataFrame([row for row in record.values["rows"] if "seed" in row])
    if frame.empty:
        return frame
    found = frame.assign(accuracy=100 * frame["accuracy"]).groupby("way")["accuracy"].agg(["mean", "std", "count"])
    return found.reindex([way for way in WAYS if way in found.index]).round(2)
