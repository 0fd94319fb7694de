"""What each ingredient of calibration gives, and the number of images: `dslib bench ingredients`."""

from __future__ import annotations

from typing import Any

from ..calibrating import Calibrate
from ..data import load_data
from ..errors import BadConfig
from ..measuring import peak_memory_gib, this_machine
from ..models import load_model
from ..ranking import rank
from ..records import Record, as_words, commit
from ..sites import find_sites
from .depths import calibrated_row

GIVEN = {  # kept sites, numbered from 0: masks for MobileNetV2's 17 that calibration was first tried on
    "given k=12": (0, 1, 3, 4, 6, 8, 10, 11, 13, 14, 15, 16),
    "given k=9": (0, 3, 4, 10, 11, 13, 14, 15, 16),
}
INGREDIENTS: dict[str, dict[str, Any]] = {
    "least squares": {"refit": False, "match": False, "ridges": 1},
    "+ kept blocks refitted": {"match": False, "ridges": 1},
    "+ mean and spread matched": {"ridges": 1},
    "+ ridge on images held back": {},
}


def record_ingredients(
    model: str,
    data: str,
    image_size: int | None = None,
    count: int = 2048,
    rank_count: int = 512,
    ks: tuple[int, ...] = (9, 5),
    counts: tuple[int, ...] = (16, 64, 256, 1024, 4096),
    seeds: int = 2,
) -> Record:
    """Calibrate with each ingredient added in turn, with several seeds, and with few and many images.

    Accuracies are for the report only, nothing is chosen by them.

    Args:
        model: name of a network with default weights for the data.
        data: a dataset; its training images are used without labels, its validation split gives the accuracies.
        image_size: side in pixels.
        count, rank_count: images for a calibration and for the ranking.
        ks: sites kept by the masks that the ranking gives; for a network of 17 sites, those of `GIVEN` are added.
        counts: other numbers of images, tried on the ranking's first mask.
        seeds: how many; each chooses images and positions anew.
    """
    if not min(count, rank_count, seeds, *counts) > 0:
        raise BadConfig("expected one or more images and seeds")
    if not ks:
        raise BadConfig("ks: expected one or more numbers of sites to keep, found none")
    loaded = load_data(data, image_size)
    network = load_model(model, loaded.classes, "default").model
    network.eval()
    sites = find_sites(network, loaded.image_size)
    found = rank(network, sites, loaded.train.first(rank_count), Calibrate())
    masks = {f"ranked k={k}": found.mask(k) for k in ks}
    if len(sites) == 17:
        masks |= {name: sites.mask([sites.names[i] for i in kept]) for name, kept in GIVEN.items()}
    every = list(INGREDIENTS)
    count = min(count, len(loaded.train))
    tried = [(name, count, 0, added) for name in masks for added in every[:-1]]
    tried += [(name, count, seed, every[-1]) for name in masks for seed in range(seeds)]
    first = next(iter(masks))
    tried += [
        (first, n, seed, every[-1]) for n in counts if n < len(loaded.train) and n != count for seed in range(seeds)
    ]
    rows = []
    for name, images, seed, added in tried:
        config = Calibrate(seed=seed, **INGREDIENTS[added])
        row = calibrated_row(network, masks[name], loaded.train.first(images, seed), loaded, config)
        rows.append({"mask": name, "images": images, "seed": seed, "ingredients": added, **row})
    values = {"rows": rows, "val_images": len(loaded.val), "peak_memory_gib": peak_memory_gib()}
    settings = {
        "model": model,
        "data": data,
        "image_size": loaded.image_size,
        "count": count,
        "rank_count": rank_count,
        "k": ks,
        "images": counts,
        "seeds": seeds,
    }
    command = f"dslib bench ingredients {as_words(settings)}"
    return Record("ingredients", command, settings, values, this_machine(), commit())
