"""Equal time for all: a clock, and trainings of as many images as fit into what is left."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, replace
from typing import NamedTuple

import torch
from torch import nn

from ..data import Data, Split
from ..errors import BadConfig, Settings, nearest, ranged
from ..finetuning import RECIPES, Finetune, finetune
from ..shrinking import Fade
from ..training import History, Train, recalibrate_batchnorm

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
    """Seconds that a method has left; only what is done within a `part` is counted, measuring latencies is not.

    Args:
        limit: seconds in all.
        device: that computes.
    """

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


def start(model: nn.Module, effort: Effort) -> Clock:
    """A clock for a method that begins now."""
    return Clock(effort.seconds, next(model.parameters()).device)


def per_image(network: nn.Module, data: Data, teacher: nn.Module | None, config: Finetune, clock: Clock) -> float:
    """Seconds of the clock that a training takes for an image, from two short epochs; the network stays as it is."""
    size = config.batch_size
    few = replace(data, train=data.train.first(PROBE * size), val=data.val.first(size))
    began, wall = clock.now(), time.perf_counter()
    rows = finetune(network, few, teacher, replace(config, epochs=2)).history
    share = (clock.now() - began) / (time.perf_counter() - wall)  # what of a second of this process is counted
    return share * sum(row["seconds"] for row in rows) / (2 * len(few.train))


def portion_for(data: Data, seconds: float, each: float, config: Train, clock: Clock) -> Portion:
    """Which of the training images, and how many epochs of them, fit into a time.

    Of images in memory some come twice an epoch, so that the time is used up and nearly all images are seen.

    Args:
        data: all images.
        seconds: there are.
        each: seconds that an image takes.
        config: batch size and seed.
        clock: that has counted what went before.
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


def tune(
    network: nn.Module, data: Data, teacher: nn.Module | None, effort: Effort, clock: Clock
) -> tuple[nn.Module, History]:
    """A finetuned copy of the network, in all that is left of the time.

    BatchNorm's statistics are not frozen, in any recipe, while activations fade: they are of what is no longer there.

    Args:
        network: to train.
        data: to train on; its validation split only makes the curve, from its first images.
        teacher: the original, or None.
        effort: the settings.
        clock: whose time it takes; some steps are timed first, and counted.
    """
    config = Finetune(lr=effort.lr, batch_size=effort.batch_size, seed=effort.seed, **RECIPES[effort.recipe])
    if any(isinstance(module, Fade) for module in network.modules()):
        config = replace(config, freeze_batchnorm=False)
    return _timed(network, data, teacher, config, clock, "training", clock.left())


def pretrain(
    network: nn.Module,
    data: Data,
    effort: Effort,
    clock: Clock,
    name: str = "pretraining",
    teacher: nn.Module | None = None,
) -> nn.Module:
    """A copy of the network, trained in its share of what is left of the time, as usual; on labels, or taught too."""
    return _timed(network, data, teacher, effort.search_config, clock, name, effort.share * clock.left())[0]


def with_new_statistics(network: nn.Module, data: Data, effort: Effort, clock: Clock) -> nn.Module:
    """The network with BatchNorm's statistics gathered anew, in place: what was taken out has changed them."""
    with clock.part("statistics"):
        images = data.train.first(effort.few, effort.seed)
        batches = (batch for batch, _ in images.batches(effort.batch_size))
        recalibrate_batchnorm(network, (batch for batch in batches if len(batch) > 1))  # one image has no spread
    return network


def _timed(
    network: nn.Module, data: Data, teacher: nn.Module | None, config: Finetune, clock: Clock, name: str, seconds: float
) -> tuple[nn.Module, History]:
    before = clock.spent.get(name, 0.0)
    with clock.part(name):
        each = per_image(network, data, teacher, config, clock)
    part = portion_for(data, seconds - (clock.spent[name] - before), each, config, clock)
    with clock.part(name):
        quick = replace(part.data, val=data.val.first(config.batch_size))
        done = finetune(network, quick, teacher, replace(config, epochs=part.epochs))
    return done.model, done.history
