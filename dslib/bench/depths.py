"""A network calibrated to every k, without labels, beside random masks: `dslib bench depths`."""

from __future__ import annotations

import time
from collections.abc import Mapping
from random import Random
from typing import Any

import torch
from torch import nn

from ..algebra import in_channels
from ..calibrating import Calibrate, Images, calibrate, logits_of
from ..data import Data, load_data
from ..errors import BadConfig, BadModel
from ..measuring import measure, this_machine
from ..models import load_model
from ..ranking import agreement, rank
from ..records import Record, as_options, as_words, commit
from ..sites import Mask, Sites, find_sites
from ..training import evaluate

BATCH, ROUNDS = 32, 21  # of the timings


def record_depths(
    model: str,
    data: str,
    image_size: int | None = None,
    count: int = 1024,
    rank_count: int = 512,
    random_masks: int = 2,
    seed: int = 0,
    weights: str = "default",
    options: Mapping[str, Any] | None = None,
) -> Record:
    """Rank the sites once, then calibrate for every k; accuracy is for the report only, nothing is chosen by it.

    Of each k the speed too, in PyTorch, in turns with the original.

    Args:
        model: name of the network.
        data: a dataset; its training images are used without labels, its validation split gives the accuracies.
        image_size: side in pixels.
        count, rank_count: images for each calibration and for the ranking.
        random_masks: how many random masks to calibrate beside, for each third k.
        seed: of the choice of images, positions and random masks.
        weights, options: as for `load_model`; the weights must be trained for the data.
    """
    if not min(count, rank_count) > 0:
        raise BadConfig(f"expected one or more images, found {count} and {rank_count}")
    loaded = load_data(data, image_size)
    network, trained = load_model(model, loaded.classes, weights, options)
    if not trained:
        raise BadModel(f"{model} with weights {weights!r} is not trained for {data}: give weights that are")
    network.eval()
    sites = find_sites(network, loaded.image_size)
    images, config = loaded.train.first(count, seed), Calibrate(seed=seed)
    started = time.perf_counter()
    found = rank(network, sites, loaded.train.first(rank_count, seed), config)
    ranking_seconds = time.perf_counter() - started
    low, high = len(sites.always_kept), len(sites)
    rows = [{"k": high, **_kept(network, loaded)}]
    for k in range(high - 1, low - 1, -1):
        rows.append({"k": k, **calibrated_row(network, found.mask(k), images, loaded, config, timed=True)})
    rng = Random(seed)
    others = [
        {"k": k, **calibrated_row(network, _random(sites, k, rng), images, loaded, config)}
        for k in range(high - 2, low, -3)
        for _ in range(random_masks)
    ]
    values = {
        "importance": found.scores,
        "ranking_seconds": ranking_seconds,
        "depths": rows,
        "random": others,
        "seconds_without_evaluation": ranking_seconds + sum(row["seconds"] for row in rows),
        "val_images": len(loaded.val),
    }
    settings = {
        "model": model,
        "data": data,
        "image_size": loaded.image_size,
        "count": count,
        "rank_count": rank_count,
        "random_masks": random_masks,
        "seed": seed,
        "weights": weights,
        "model_option": as_options(options),
    }
    return Record("depths", f"dslib bench depths {as_words(settings)}", settings, values, this_machine(), commit())


def _kept(network: nn.Module, data: Data) -> dict[str, Any]:
    return {"removed": [], "seconds": 0.0, "agreement": 1.0, "accuracy": evaluate(network, data.val), "speedup": 1.0}


def calibrated_row(
    network: nn.Module, mask: Mask, images: Images, data: Data, config: Calibrate, timed: bool = False
) -> dict[str, Any]:
    """One mask's row: seconds to calibrate, agreement with the original on the images, accuracy; speed if `timed`."""
    started = time.perf_counter()
    done = calibrate(network, mask, images, config, progress=False)
    seconds = time.perf_counter() - started
    same = agreement(logits_of(done.model, images), logits_of(network, images))
    return {
        "removed": list(mask.removed),
        "seconds": seconds,
        "agreement": same,
        "errors": done.errors,
        "accuracy": evaluate(done.model, data.val),
        **(_speed(network, done.model, data.image_size) if timed else {}),
    }


def _speed(network: nn.Module, small: nn.Module, image_size: int) -> dict[str, Any]:
    images = torch.randn(BATCH, in_channels(network), image_size, image_size)
    timing = measure({"original": network, "small": small}, images, ROUNDS)
    ratio, low, high = timing.speedup("small", over="original")
    return {"speedup": ratio, "q25": low, "q75": high, "busy": timing.busy, "runtime": timing.runtime}


def _random(sites: Sites, k: int, rng: Random) -> Mask:
    """A random mask that keeps k sites, those that cannot be merged among them."""
    return sites.mask(rng.sample(sites.mergeable, k - len(sites.always_kept)))
