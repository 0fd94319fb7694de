"""Is it better to finetune from a calibrated network or from one whose activations fade out, for the same time?"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace

from torch import nn

from ..calibrating import Calibrate, calibrate
from ..data import Data
from ..errors import BadConfig
from ..finetuning import RECIPES, Finetune, finetune
from ..ranking import rank
from ..shrinking import fade
from ..sites import Mask, Sites
from ..training import evaluate
from .benchmark import Benchmark, Context, Row, Steps, Values
from .ingredients import GIVEN
from .settings import OnTrained, setting

STARTS = ("fading", "calibrated")
PROBE = 8  # batches that are timed to know how many fit


@dataclass(frozen=True)
class Starts(OnTrained):
    """Finetune the same masks from both starts for the same wall time, calibration counted.

    Learning rate and recipe (usual; or gentle: images not augmented, BatchNorm's statistics frozen) of each start are
    chosen by accuracy on training images that are held back, the validation split only reports. The number of steps
    follows from the measured time of a step. For a network of 17 sites a given mask of nine is tried too.

    Args:
        k: sites to keep, by the ranking.
        minutes: to finetune for; the first with all seeds, others with one.
        lr: peak learning rates tried for each start and recipe.
        tuning_minutes: for each learning rate and recipe of each start, on the ranking's mask.
        seeds: how many.
        batch_size: of the finetuning.
    """

    k: int = 9
    minutes: tuple[float, ...] = setting((5.0,), least=1)
    lr: tuple[float, ...] = setting((0.003, 0.01, 0.03), least=1)
    tuning_minutes: float = 1.5
    seeds: int = setting(3, "1 or more")
    batch_size: int = 64


def answer(config: Starts, context: Context[Starts]) -> Steps:
    """The trials of each start; then a row for each time, mask, seed and start."""
    data, (network, sites) = context.data, context.trained
    masks = _masks(network, sites, data, config)
    held = len(data.train) // 8
    rest, val = data.hold_back(held)
    parts = replace(rest, val=val)
    yield {
        "removed": {name: mask.removed for name, mask in masks.items()},
        "val_images": len(data.val),
        "held_back": held,
    }

    def row(name: str, start: str, recipe: str, lr: float, minutes: float, seed: int, tuning: bool) -> Row:
        key = {"mask": name, "start": start, "recipe": recipe, "lr": lr, "minutes": minutes}
        key |= {"seed": seed, "tuning": tuning}
        settings = Finetune(epochs=1, lr=lr, batch_size=config.batch_size, seed=seed, **RECIPES[recipe])
        on = parts if tuning else data
        return Row(key, lambda: _trained(network, masks[name], start, on, settings, minutes, config.count), told=_say)

    best = {}
    for start in STARTS:
        trials = [(recipe, lr) for recipe in RECIPES for lr in config.lr]
        first = next(iter(masks))
        tried = yield [row(first, start, *trial, config.tuning_minutes, 0, tuning=True) for trial in trials]
        if any("accuracy" not in one for one in tried):
            return  # the hours are over
        best[start] = max(tried, key=lambda one: one["accuracy"])
    for minutes in config.minutes:
        for name in masks:
            for seed in range(config.seeds if minutes == config.minutes[0] else 1):
                for start in STARTS:
                    yield row(name, start, best[start]["recipe"], best[start]["lr"], minutes, seed, tuning=False)


def _masks(network: nn.Module, sites: Sites, data: Data, config: Starts) -> dict[str, Mask]:
    masks = {f"ranked k={config.k}": rank(network, sites, data.train.first(config.rank_count)).mask(config.k)}
    if len(sites) == 17:
        masks["given k=9"] = sites.mask([sites.names[i] for i in GIVEN["given k=9"]])
    return masks


def _trained(
    network: nn.Module, mask: Mask, start: str, data: Data, config: Finetune, minutes: float, count: int
) -> Values:
    """One finetuning: the seconds that it took, accuracy on the validation split.

    Before the training: of the calibrated network; one whose activations fade out is the original then.
    """
    began = time.perf_counter()
    if start == "calibrated":
        images = data.train.first(count, config.seed)
        small = calibrate(network, mask, images, Calibrate(seed=config.seed), progress=False).model
    else:
        small = fade(network, mask, None, data.image_size)
    spent = time.perf_counter() - began
    size = config.batch_size
    few = replace(data, train=data.train.first(PROBE * size), val=data.val.first(size))
    probe = finetune(small, few, network, config).history[0]["seconds"] / len(few.train)
    left = 60 * minutes - spent
    if not left > size * probe:
        raise BadConfig(f"{minutes:g} minutes: {spent:.0f} s were gone before the first step: give more")
    images_seen = left / probe
    epochs = math.ceil(images_seen / len(data.train))
    part = replace(few, train=data.train.first(max(int(images_seen / epochs), size), config.seed))
    done = finetune(small, part, network, replace(config, epochs=epochs))
    return {
        "seconds": spent + sum(row["seconds"] for row in done.history),
        "seconds_to_calibrate": spent,
        "epochs": epochs,
        "images_an_epoch": len(part.train),
        "accuracy_before": evaluate(small, data.val),
        "accuracy": evaluate(done.model, data.val),
    }


def _say(row: Values) -> str:
    key = ("mask", "start", "recipe", "lr", "minutes", "seed", "tuning")
    came = f"{row['accuracy_before']:.2%}, then {row['accuracy']:.2%}" if "accuracy" in row else "not begun"
    return f"{', '.join(str(row[name]) for name in key)}: {came}"


BENCHMARK = Benchmark("Calibration", Starts, answer)
