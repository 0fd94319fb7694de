"""Equal time for all: a clock, and a training that ends when the time is over."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from torch import nn

from ..datasets import Data
from ..errors import require
from ..finetuning import Finetune, finetune
from ..schedules import Train
from ..snapshots import History

PROBE = 6  # batches that are timed to know how many fit
GENTLE: dict[str, Any] = {"augment": False, "freeze_batchnorm": True}  # how a calibrated network is finetuned


@dataclass(frozen=True)
class Effort:
    """What every method may spend, and how it trains; the same for all of a comparison.

    Args:
        seconds: of wall time for everything but measuring latencies: ranking, searching, training.
        lr: peak learning rate of the final training, per 256 images.
        search_lr: of what trains before it: pretraining, importances, generated weights.
        batch_size: images a step.
        share: of the seconds for what comes before the final training, at most, where a method trains to search.
        images: unlabelled training images that statistics, rankings and calibrations look at.
        distil: whether the original teaches (weight 0.7), which makes sense where it is trained.
        pretrained: whether the original is trained; else it is given with random weights, and methods that inherit
            weights train it first, for `share` of the seconds.
        seed: of everything that is drawn.
    """

    seconds: float
    lr: float = 0.1
    search_lr: float = 0.1
    batch_size: int = 64
    share: float = 0.5
    images: int = 1024
    distil: bool = True
    pretrained: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        require(self.seconds > 0, f"seconds: expected more than 0, found {self.seconds}")
        require(0 < self.share < 1, f"share: expected between 0 and 1, found {self.share}")
        require(min(self.lr, self.search_lr) > 0, "lr, search_lr: expected more than 0")
        require(min(self.batch_size, self.images) > 1, "batch_size, images: expected 2 or more")


@dataclass
class Clock:
    """Seconds that a method has left; only what is done within a `part` is counted, measuring latencies is not.

    Args:
        limit: seconds in all.
    """

    limit: float
    spent: dict[str, float] = field(default_factory=dict)

    def left(self) -> float:
        """Seconds that are left, less than none where more was spent."""
        return self.limit - sum(self.spent.values())

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """The time within the block is spent under a name."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.spent[name] = self.spent.get(name, 0.0) + time.perf_counter() - began


class Planned(NamedTuple):
    """A training that takes about so many seconds: the data with so many of its images, and epochs."""

    data: Data
    epochs: int


def per_image(network: nn.Module, data: Data, teacher: nn.Module | None, config: Finetune) -> float:
    """Seconds that a training takes for an image, from some steps of it; the network stays as it is."""
    size = config.batch_size
    few = replace(data, train=data.train.first(PROBE * size), val=data.val.first(size))
    return float(finetune(network, few, teacher, replace(config, epochs=2)).history[-1]["seconds"]) / len(few.train)


def planned(data: Data, seconds: float, each: float, config: Train) -> Planned:
    """Which part of the training images, and how many epochs of it, fit into a time.

    Args:
        data: all images.
        seconds: there are.
        each: seconds that an image takes.
        config: batch size and seed.
    Raises:
        BadConfig: if not one batch fits.
    """
    images, size = seconds / each, config.batch_size
    require(images >= size, f"{max(seconds, 0):.0f} s are left for a training, a batch takes {each * size:.1f} s: give "
            "more seconds")  # fmt: skip
    epochs = math.ceil(images / len(data.train))
    count = max(int(images / epochs), size)
    part = data if count >= len(data.train) else replace(data, train=data.train.first(count, config.seed))
    return Planned(part, epochs)


def tune(
    network: nn.Module, data: Data, teacher: nn.Module | None, effort: Effort, clock: Clock, name: str = "training",
    seconds: float | None = None, **settings: Any,
) -> tuple[nn.Module, History]:  # fmt: skip
    """A trained copy of the network, in what is left of the time or in so many seconds.

    Some steps are timed first, and counted.

    Args:
        network: to train.
        data: to train on; its validation split only makes the curve, from its first images.
        teacher: the original, or None.
        effort: the settings.
        clock: whose time it takes.
        name: what the time is spent as.
        seconds: to spend; default all that are left.
        settings: of `Finetune`, in place of those of `effort`.
    """
    limit, before = clock.left() if seconds is None else min(seconds, clock.left()), clock.spent.get(name, 0.0)
    common: dict[str, Any] = {"lr": effort.lr, "batch_size": effort.batch_size, "seed": effort.seed, **settings}
    config = Finetune(**common)
    with clock.part(name):
        each = per_image(network, data, teacher, config)
    part = planned(data, limit - (clock.spent[name] - before), each, config)
    with clock.part(name):
        quick = replace(part.data, val=data.val.first(effort.batch_size))
        done = finetune(network, quick, teacher, replace(config, epochs=part.epochs))
    return done.model, done.history
