"""Training a small network as a larger one, against as it is for the same time: `dslib bench expand`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from ..data import load_data
from ..errors import BadConfig
from ..measuring import Others, pick_device, this_machine, tune_allocator
from ..models import load_model
from ..records import Record, as_options, as_words, commit
from ..training import Boost, Enough, Log, Train, boost, cross_entropy, evaluate, train
from .rows import Rows

TRIED = 24  # steps of each that are timed, in turns of a few
FADED = {"fading": 1.0, "linear": 1e-9}  # where the activations are out in such a trial


def record_expand(
    model: str = "mobilenet_v2",
    options: Mapping[str, Any] | None = None,
    data: str = "cifar10",
    image_size: int | None = None,
    ratio: float = 2.0,
    epochs: int = 6,
    lr: float = 0.1,
    batch_size: int = 128,
    seeds: int = 3,
    device: str = "auto",
    hours: float | None = None,
    out: Path | None = None,
    echo: Callable[[str], object] = print,
) -> Record:
    """A small network from nothing: expanded for `epochs`, and as it is for as many epochs as take the same time.

    How much longer a step of the expanded one takes is measured first, in turns, and kept with the rows.

    Args:
        model, options: as for `load_model`.
        data, image_size: as for `load_data`.
        ratio: inner channels of the expanded blocks over input channels.
        epochs: of the expanded network.
        lr, batch_size: of both.
        seeds: trainings of each.
        device: as for `pick_device`.
        hours: begin no row after so many.
        out: the record's file; rows that stand there are not made again.
        echo: is told the outcome.
    """
    if not (seeds > 0 and epochs > 0):
        raise BadConfig(f"expected seeds and epochs, found {seeds} and {epochs}")
    loaded = load_data(data, image_size)
    settings = {
        "model": model,
        "model_option": as_options(options),
        "data": data,
        "image_size": loaded.image_size,
        "ratio": ratio,
        "epochs": epochs,
        "lr": lr,
        "batch_size": batch_size,
        "seeds": seeds,
    }
    where = pick_device(device)
    tune_allocator()
    rows = Rows(
        Record("expand", f"dslib bench expand {as_words(settings)}", settings, {}, this_machine(where), commit()),
        out,
        selecting=("seeds",),
        hours=hours,
    )

    def fresh(seed: int) -> nn.Module:
        network = load_model(model, loaded.classes, options=options, seed=seed).model
        return network.to(where, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def as_it_is(config: Train, log: Log | None = None) -> nn.Module:
        network = fresh(config.seed)

        def note(_: int) -> dict[str, Any]:
            return {"val_accuracy": evaluate(network, loaded.val)}

        loss = cross_entropy(config.label_smoothing)
        train(network, loaded, loss, config, after_epoch=note, title="as it is", log=log)
        return network.eval()

    def expanded(config: Boost, log: Log | None = None) -> nn.Module:
        return boost(fresh(config.seed), loaded, config, log=log).model

    common: dict[str, Any] = {"lr": lr, "batch_size": batch_size, "warmup": 0.5}
    ways: dict[str, Any] = {"expanded": (expanded, Boost, {"ratio": ratio}), "as it is": (as_it_is, Train, {})}

    def speeds() -> dict[str, Any]:
        """Median milliseconds of a step, in turns: as it is; expanded with activations, fading, and without."""
        cases = {name: ("expanded", {"fade_from": 0.0, "fade_to": to}) for name, to in FADED.items()}
        cases |= {"whole": ("expanded", {"fade_from": 0.9, "fade_to": 1.0}), "as it is": ("as it is", {})}
        ms: dict[str, list[float]] = {case: [] for case in cases}
        others = Others()
        for _ in range(3):
            for case, (way, more) in cases.items():
                work, kind, own = ways[way]
                try:
                    work(kind(epochs=epochs, **common, **own, **more), Log(steps=TRIED // 3 + 2))
                except Enough as trial:
                    ms[case] += [1000 * (after - before) for before, after in pairwise(trial.ended[2:])]
        medians = {case: statistics.median(found) for case, found in ms.items()}
        first, last = Boost.fade_from, 1 - Boost.fade_to
        expanded = first * medians["whole"] + (1 - first - last) * medians["fading"] + last * medians["linear"]
        return {"ms": medians, "slower": expanded / medians["as it is"], "others": others.cores()}

    def trained(way: str, seed: int, longer: float) -> dict[str, Any]:
        work, kind, own = ways[way]
        began = time.perf_counter()
        config = kind(epochs=round(epochs * longer), seed=seed, **common, **own)
        network = work(config)
        seconds = time.perf_counter() - began
        return {
            "epochs": config.epochs,
            "seconds": seconds,
            "accuracy": evaluate(network, loaded.val),
            "config": asdict(config),
        }

    slower = rows.add({"timing": "ms a step"}, speeds)["slower"]
    for seed in range(seeds):
        for way in ways:
            rows.add({"way": way, "seed": seed}, partial(trained, way, seed, 1.0 if way == "expanded" else slower))
    echo(table(rows.record).to_string())
    for missing in rows.missing:
        echo(f"not begun, the hours are over: {missing}")
    return rows.record


def table(record: Record) -> pd.DataFrame:
    """One row a way: epochs, mean seconds, accuracy in percent: its mean over seeds and its standard deviation."""
    frame = pd.DataFrame([row for row in record.values["rows"] if "seed" in row and "accuracy" in row])
    if frame.empty:
        return frame
    grouped = frame.assign(accuracy=100 * frame["accuracy"]).groupby("way")
    found = grouped["accuracy"].agg(["mean", "std", "count"])
    found.insert(0, "epochs", grouped["epochs"].first())
    found.insert(1, "seconds", grouped["seconds"].mean())
    return found.round(2)
