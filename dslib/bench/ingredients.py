"""What does each ingredient of calibration give, and what the number of images?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..calibrating import Calibrate
from ..measuring import peak_memory_gib
from ..ranking import rank
from ..records import Record
from .benchmark import Benchmark, Context, Values
from .plans import calibrated_row
from .settings import OnTrained, setting

GIVEN = {  # kept sites, numbered from 0: masks for MobileNetV2's 17 that calibration was first tried on
    "given k=12": (0, 1, 3, 4, 6, 8, 10, 11, 13, 14, 15, 16),
    "given k=9": (0, 3, 4, 10, 11, 13, 14, 15, 16),
}
INGREDIENTS: dict[str, Values] = {
    "least squares": {"refit": False, "match": False, "ridges": 1},
    "+ kept blocks refitted": {"match": False, "ridges": 1},
    "+ mean and spread matched": {"ridges": 1},
    "+ ridge on images held back": {},
}


@dataclass(frozen=True)
class Ingredients(OnTrained):
    """Calibrate with each ingredient added in turn, with several seeds, and with few and many images.

    Accuracies are for the report only, nothing is chosen by them. For a network of 17 sites two given masks are tried
    beside those of the ranking.

    Args:
        k: sites to keep, by the ranking.
        images: other numbers of images, tried with the first k.
        seeds: how many; each chooses images and positions anew.
    """

    k: tuple[int, ...] = setting((9, 5), least=1)
    images: tuple[int, ...] = setting((16, 64, 256, 1024, 4096), "1 or more")
    seeds: int = setting(2, "1 or more")


def answer(config: Ingredients, context: Context[Ingredients]) -> Values:
    """A row for each mask, number of images, seed and set of ingredients."""
    data, (network, sites) = context.data, context.trained
    found = rank(network, sites, data.train.first(config.rank_count), Calibrate())
    masks = {f"ranked k={k}": found.mask(k) for k in config.k}
    if len(sites) == 17:
        masks |= {name: sites.mask([sites.names[i] for i in kept]) for name, kept in GIVEN.items()}
    *fewer, whole = INGREDIENTS
    first, most = next(iter(masks)), len(data.train)
    count = min(config.count, most)
    tried = [(name, count, 0, added) for name in masks for added in fewer]
    tried += [(name, count, seed, whole) for name in masks for seed in range(config.seeds)]
    others = [number for number in config.images if number < most and number != count]
    tried += [(first, number, seed, whole) for number in others for seed in range(config.seeds)]
    rows = []
    for name, images, seed, added in tried:
        settings = Calibrate(seed=seed, **INGREDIENTS[added])
        _, row = calibrated_row(network, masks[name], data.train.first(images, seed), data, settings)
        rows.append({"mask": name, "images": images, "seed": seed, "ingredients": added, **row})
    return {"rows": rows, "val_images": len(data.val), "peak_memory_gib": peak_memory_gib()}


def _told(record: Record) -> Iterator[str]:
    for row in record.values["rows"]:
        yield (
            f"{row['mask']}, {row['images']} images, seed {row['seed']}, {row['ingredients']}: "
            f"accuracy {row['accuracy']:.2%}, {row['seconds']:.1f} s"
        )
    yield f"largest memory {record.values['peak_memory_gib']:.1f} GiB"


BENCHMARK = Benchmark("Calibration", Ingredients, answer, _told)
