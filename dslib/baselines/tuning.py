"""Equal time for all: a clock, and trainings of as many images as fit into what is left."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, replace
from typing import NamedTuple

import torch

from ..data import Data, Split
from ..errors import BadConfig, Settings, nearest, ranged
from ..finetuning import RECIPES, Finetune
from ..training import Train, Trained

#: trains a network on data, by some settings
Training = Callable[[Data, Finetune], Trained]
PROBE = 6  # batches that are timed to know how many fit


@dataclass(frozen=True)
class Effort(Settings):
    """What every method may spend, and how it trains; the same for all of a comparison but for what is tried out.

    Args:
        seconds: for everything but measuring latencies: ranking, searching, training. On one thread of a CPU those
            that the process computes, so that what else runs on the machine takes little away.
        lr: peak learning rate of the final training, per 256 images.
        recipe: of the final training: usual, or gentle (images not augmented, BatchNorm's statistics frozen).
        search_lr: of what trains before it, as usual: pretraining, importances, generated weights.
        batch_size: images a step.
        share: of the seconds that are left, for a search or a pretraining.
        images: training images that calibrations and gradients look at; rankings and statistics at `few` of them.
        distil: whether the original teaches (weight 0.7), which makes sense where it is trained.
        pretrained: whether the original is trained; else it is given with random weights, and methods that inherit
            weights train it first, for `share` of the seconds.
        seed: of everything that is drawn.
    """

    seconds: float = ranged(MISSING, "more than 0")
    lr: float = ranged(0.1, "more than 0")
    recipe: str = "usual"
    search_lr: float = ranged(0.1, "more than 0")
    batch_size: int = ranged(64, "2 or more")
    share: float = ranged(0.5, "between 0 and 1")
    images: int = ranged(1024, "8 or more")
    distil: bool = True
    pretrained: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges, and the recipe's name."""
        super().__post_init__()
        if self.recipe not in RECIPES:
            raise BadConfig(nearest("recipe", self.recipe, RECIPES))

    @property
    def few(self) -> int:
        """Images for what is done many times over, and for BatchNorm's statistics."""
        return max(2, self.images // 4)

    @property
    def search_config(self) -> Finetune:
        """Of what trains before the final training."""
        return Finetune(lr=self.search_lr, batch_size=self.batch_size, seed=self.seed)


@dataclass
class Clock:
    """Seconds that a method has left; only what is done within a `part` is counted, measuring latencies is not."""

    limit: float
    device: torch.device
    spent: dict[str, float] = field(default_factory=dict)

    def left(self) -> float:
        """Seconds that are left, less than none where more was spent."""
        return self.limit - sum(self.spent.values())

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """The time within the block is spent under a name."""
        began = self.now()
        try:
            yield
        finally:
            self.spent[name] = self.spent.get(name, 0.0) + self.now() - began

    def now(self) -> float:
        """Seconds: on one thread of a CPU those that this process computed."""
        alone = self.device.type == "cpu" and torch.get_num_threads() == 1  # of several, some wait for the others
        return time.process_time() if alone else time.perf_counter()


class Portion(NamedTuple):
    """A training that takes about so many seconds: the data with so many of its images, and epochs."""

    data: Data
    epochs: int


def per_image(training: Training, data: Data, config: Finetune, clock: Clock) -> float:
    """Seconds of the clock that a training takes for an image, from two short epochs."""
    size = config.batch_size
    few = replace(data, train=data.train.first(PROBE * size), val=data.val.first(size))
    began, wall = clock.now(), time.perf_counter()
    rows = training(few, replace(config, epochs=2)).history
    share = (clock.now() - began) / (time.perf_counter() - wall)  # what of a second of this process is counted
    return share * sum(row["seconds"] for row in rows) / (2 * len(few.train))


def portion_for(data: Data, seconds: float, each: float, config: Train, clock: Clock) -> Portion:
    """Which of the training images, and how many epochs of them, fit into a time, if `each` takes so many seconds.

    Of images in memory some come twice an epoch, so that the time is used up and nearly all images are seen.

    Raises:
        BadConfig: if not one batch fits; says what took the time.
    """
    fit, size = seconds / each, config.batch_size
    took = ", ".join(f"{name} {spent:.0f} s" for name, spent in clock.spent.items()) or "nothing yet"
    if fit < size:
        raise BadConfig(
            f"{max(seconds, 0):.0f} of {clock.limit:.0f} s are left for a training (took: {took}), a "
            f"batch takes {each * size:.1f} s: give more seconds"
        )
    split = data.train
    in_memory = isinstance(split, Split)  # images on disk are not doubled: fewer of them then, more often
    epochs = max(1, int(fit / len(split)) if in_memory else math.ceil(fit / len(split)))
    count = max(int(fit / epochs), size)
    if count <= len(split) or not isinstance(split, Split):
        return Portion(data if count >= len(split) else replace(data, train=split.first(count, config.seed)), epochs)
    again = split.first(count - len(split), config.seed)
    images, labels = torch.cat([split.images, again.images]), torch.cat([split.labels, again.labels])
    return Portion(replace(data, train=replace(split, images=images, labels=labels)), epochs)


def timed(training: Training, data: Data, config: Finetune, clock: Clock, name: str, seconds: float) -> Trained:
    """What a training gives on as many images as fit into some seconds, spent under a name; some are timed first."""
    before = clock.spent.get(name, 0.0)
    with clock.part(name):
        each = per_image(training, data, config, clock)
    part = portion_for(data, seconds - (clock.spent[name] - before), each, config, clock)
    with clock.part(name):
        quick = replace(part.data, val=data.val.first(config.batch_size))
        return training(quick, replace(config, epochs=part.epochs))
