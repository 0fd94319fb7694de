"""Finetuning from a calibrated network and from one whose activations fade out, in equal time: `dslib bench starts`."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from ..calibrating import Calibrate, calibrate
from ..data import Data, load_data
from ..errors import BadConfig
from ..finetuning import RECIPES, Finetune, finetune
from ..measuring import this_machine
from ..models import load_model
from ..ranking import rank
from ..records import Record, as_words, commit
from ..shrinking import fade
from ..sites import Mask, find_sites
from ..training import evaluate
from .ingredients import GIVEN
from .judging import hold_back
from .rows import Rows

STARTS = ("fading", "calibrated")
PROBE = 8  # batches that are timed to know how many fit


def record_starts(
    model: str,
    data: str,
    image_size: int | None = None,
    k: int = 9,
    minutes: tuple[float, ...] = (5.0,),
    lrs: tuple[float, ...] = (0.003, 0.01, 0.03),
    tuning_minutes: float = 1.5,
    seeds: int = 3,
    batch_size: int = 64,
    count: int = 2048,
    rank_count: int = 512,
    out: Path | None = None,
) -> Record:
    """Finetune the same masks from both starts for the same wall time, calibration counted.

    Learning rate and recipe (usual; or gentle: images not augmented, BatchNorm's statistics frozen) of each start are
    chosen by accuracy on training images that are held back, the validation split only reports. The number of steps
    follows from the measured time of a step.

    Args:
        model: name of a network with default weights for the data.
        data: a dataset.
        image_size: side in pixels.
        k: sites kept by the mask that the ranking gives; for a network of 17 sites, a given mask of nine is added.
        minutes: wall times to train for; the first with all seeds, others with one.
        lrs: peak learning rates tried for each start and recipe.
        tuning_minutes: each, a calibration counted, on the ranking's mask.
        seeds: how many.
        batch_size: of the finetuning.
        count, rank_count: unlabelled images for a calibration and for the ranking.
        out: the record's file: rows that stand there are not trained again.
    """
    if not (min(seeds, count, rank_count) > 0 and bool(lrs) and bool(minutes)):
        raise BadConfig("expected one or more of each setting")
    loaded = load_data(data, image_size)
    network = load_model(model, loaded.classes, "default").model
    network.eval()
    sites = find_sites(network, loaded.image_size)
    masks = {f"ranked k={k}": rank(network, sites, loaded.train.first(rank_count)).mask(k)}
    if len(sites) == 17:
        masks["given k=9"] = sites.mask([sites.names[i] for i in GIVEN["given k=9"]])
    first = next(iter(masks))
    held = len(loaded.train) // 8
    rest, val = hold_back(loaded, held)
    parts = replace(rest, val=val)

    settings = {
        "model": model,
        "data": data,
        "image_size": loaded.image_size,
        "k": k,
        "minutes": minutes,
        "lr": lrs,
        "tuning_minutes": tuning_minutes,
        "seeds": seeds,
        "batch_size": batch_size,
        "count": count,
        "rank_count": rank_count,
    }
    values = {
        "removed": {name: mask.removed for name, mask in masks.items()},
        "val_images": len(loaded.val),
        "held_back": held,
    }
    command = f"dslib bench starts {as_words(settings)}"
    rows = Rows(Record("starts", command, settings, values, this_machine(), commit()), out)

    def trained(name: str, start: str, recipe: str, lr: float, limit: float, seed: int, tuning: bool) -> dict[str, Any]:
        key = {
            "mask": name,
            "start": start,
            "recipe": recipe,
            "lr": lr,
            "minutes": limit,
            "seed": seed,
            "tuning": tuning,
        }
        config = Finetune(epochs=1, lr=lr, batch_size=batch_size, seed=seed, **RECIPES[recipe])
        on = parts if tuning else loaded
        row = rows.add(key, lambda: _trained(network, masks[name], start, on, config, limit, count))
        tqdm.write(f"{', '.join(map(str, key.values()))}: {row['accuracy_before']:.2%}, then {row['accuracy']:.2%}")
        return row

    best = {}
    for start in STARTS:
        tried = [trained(first, start, r, lr, tuning_minutes, 0, tuning=True) for r in RECIPES for lr in lrs]
        best[start] = max(tried, key=lambda row: row["accuracy"])
    for limit in minutes:
        for name in masks:
            for seed in range(seeds if limit == minutes[0] else 1):
                for start in STARTS:
                    trained(name, start, best[start]["recipe"], best[start]["lr"], limit, seed, tuning=False)
    return rows.record


def _trained(
    network: nn.Module, mask: Mask, start: str, data: Data, config: Finetune, minutes: float, count: int
) -> dict[str, Any]:
    """One finetuning: the seconds that it took, accuracy on the validation split.

    Before the training: of the calibrated network; one whose activations fade out is the original then.
    """
    began = time.perf_counter()
    if start == "calibrated":
        small = calibrate(
            network, mask, data.train.first(count, config.seed), Calibrate(seed=config.seed), progress=False
        ).model
    else:
        small = fade(network, mask, None, data.image_size)
    spent = time.perf_counter() - began
    size = config.batch_size
    few = replace(data, train=data.train.first(PROBE * size), val=data.val.first(size))
    probe = finetune(small, few, network, config).history[0]["seconds"] / len(few.train)
    left = 60 * minutes - spent
    if not left > size * probe:
        raise BadConfig(f"{minutes:g} minutes: {spent:.0f} s were gone before the first step: give more")
    images = left / probe
    epochs = math.ceil(images / len(data.train))
    part = replace(few, train=data.train.first(max(int(images / epochs), size), config.seed))
    done = finetune(small, part, network, replace(config, epochs=epochs))
    seconds = spent + sum(row["seconds"] for row in done.history)
    return {
        "seconds": seconds,
        "seconds_to_calibrate": spent,
        "epochs": epochs,
        "images_an_epoch": len(part.train),
        "accuracy_before": evaluate(small, data.val),
        "accuracy": evaluate(done.model, data.val),
    }
