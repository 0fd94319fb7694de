"""MetaPruning: generated weights for any widths, and an evolutionary search among them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from ..datasets import Data
from ..evaluating import loss_of, predict, recalibrate_batchnorm
from ..finetuning import Finetune
from ..splits import Split, hold_back
from ..training import cross_entropy, train
from .budget import Budget, least
from .result import Pruned
from .slim import Macs, Slim
from .tuning import PROBE, Clock, Effort, planned, tune

Widths = tuple[int, ...]

LEAST = 0.1  # share of a group's channels
FIRST, PARENTS, CHILDREN = 20, 6, 10  # random configurations to begin with; of each generation
TRIED = 3  # of the best of a generation that are measured
MUTATION = 0.1  # probability of a group's share to be drawn anew
GENERATORS = "generators"
SEARCH = 0.3  # of the time before the final training, for evolution; the rest trains generators


def metapruning(model: nn.Module, data: Data, budget: Budget, effort: Effort) -> Pruned:
    """A network that generates weights for any widths is trained with random ones; the best widths are evolved.

    Candidates are judged by their cross-entropy on training images that were held back, with BatchNorm's statistics
    gathered anew, within the multiply-accumulates that the budget corresponds to; widths of a generation that are not
    quick enough, as measured, lower those.

    Source: Liu et al., MetaPruning, ICCV 2019. Departs: see `Slim`; the network that is found goes on with the weights
    that were generated for it, instead of being trained from nothing, which so short a time would not allow.
    """
    clock = Clock(effort.seconds)
    train_split, held = hold_back(data.train, effort.images // 2)
    rest = replace(data, train=train_split)
    slim = Slim(model, data.image_size, ordered=effort.pretrained)
    macs = Macs(model, slim.groups, data.image_size)
    rng = random.Random(effort.seed)
    _train(slim, rest, effort, clock, (1 - SEARCH) * effort.share * effort.seconds)
    full = [group.width for group in slim.groups]

    def make(strength: float) -> tuple[nn.Module, float]:
        widths = slim.rounded([1 - (1 - LEAST) * strength] * len(full))
        return slim.extract(widths), macs(widths)

    allowed, _ = least(budget, model, make, what="metapruning")
    search = _Evolution(slim, macs, rest, held, effort, rng)
    limit = clock.left() - (1 - effort.share) * effort.seconds
    best, measured = None, set[Widths]()
    while best is None or clock.spent["evolution"] < limit:
        with clock.part("evolution"):
            leaders = search.generation(allowed)
        for widths in leaders[:TRIED]:
            if widths in measured or macs(widths) > allowed:
                continue
            measured.add(widths)
            reached = budget.reached(model, slim.extract(widths))
            if reached < budget.speedup:
                allowed = macs(widths) * max(0.9, reached / budget.speedup)
            elif best is None or search.losses[widths] < search.losses[best]:
                best = widths
    small = slim.extract(best)
    recalibrate_batchnorm(small, search.calibration)
    done, history = tune(small, data, model if effort.distil else None, effort, clock)
    found = {"widths": dict(zip((group.makers[0] for group in slim.groups), best, strict=True)),
             "loss": search.losses[best], "random_losses": search.first, "candidates": len(search.losses)}  # fmt: skip
    return Pruned(done, {**found, "seconds": clock.spent, "history": history})


class _Evolution:
    """Generations of widths, each within as many multiply-accumulates as are allowed."""

    def __init__(self, slim: Slim, macs: Macs, rest: Data, held: Split, effort: Effort, rng: random.Random) -> None:
        self.slim, self.macs, self.held, self.rng = slim, macs, held, rng
        some = rest.train.first(effort.images // 4, effort.seed)
        self.calibration = [images for images, _ in some.batches(effort.batch_size)]
        self.losses: dict[Widths, float] = {}
        self.first: list[float] = []

    def generation(self, allowed: float) -> list[Widths]:
        """The best widths so far within what is allowed, the best first, after another generation."""
        known = self._best(allowed)
        if len(known) < PARENTS:
            fresh = [self._within([self._share() for _ in self.slim.groups], allowed) for _ in range(FIRST)]
        else:
            fresh = [self._within(self._child(known[:PARENTS]), allowed) for _ in range(CHILDREN)]
        losses = [self._loss(widths) for widths in fresh]
        self.first = self.first or losses
        return self._best(allowed)

    def _best(self, allowed: float) -> list[Widths]:
        return sorted((w for w in self.losses if self.macs(w) <= allowed), key=self.losses.__getitem__)

    def _share(self) -> float:
        return self.rng.uniform(LEAST, 1.0)

    def _child(self, parents: Sequence[Widths]) -> list[float]:
        """Shares of a mother or a father, group by group, some of them drawn anew."""
        mother, father = self.rng.sample(list(parents), 2)
        shares = []
        for group, one, other in zip(self.slim.groups, mother, father, strict=True):
            inherited = self.rng.choice((one, other)) / group.width
            shares.append(self._share() if self.rng.random() < MUTATION else inherited)
        return shares

    def _within(self, shares: Sequence[float], allowed: float) -> Widths:
        """Widths in these proportions that fill what is allowed: all shares times one factor, none above 1."""
        low, high = 0.0, 1.0 / LEAST
        for _ in range(20):
            middle = (low + high) / 2
            if self.macs(self._times(shares, middle)) <= allowed:
                low = middle
            else:
                high = middle
        return self._times(shares, low)

    def _times(self, shares: Sequence[float], factor: float) -> Widths:
        return tuple(self.slim.rounded([min(1.0, max(LEAST, share * factor)) for share in shares]))

    def _loss(self, widths: Widths) -> float:
        """On the images held back, with the weights that are generated for these widths."""
        if widths not in self.losses:
            small = self.slim.extract(widths)
            recalibrate_batchnorm(small, self.calibration)
            self.losses[widths] = loss_of(predict(small, self.held, title="evolution"), self.held)
        return self.losses[widths]


def _train(slim: Slim, data: Data, effort: Effort, clock: Clock, seconds: float) -> None:
    """Train the weights and their generators with random widths, for so many seconds."""
    config = Finetune(lr=effort.search_lr, batch_size=effort.batch_size, seed=effort.seed)
    loss = cross_entropy(config.label_smoothing)

    def draw(progress: float) -> None:
        rng = random.Random(f"{effort.seed} {progress}")
        slim.choose(slim.rounded([rng.uniform(LEAST, 1.0) for _ in slim.groups]))

    few = replace(data, train=data.train.first(PROBE * effort.batch_size))
    with clock.part(GENERATORS):
        probe = train(slim, few, loss, replace(config, epochs=1), before_step=draw)
    part = planned(data, seconds - clock.spent[GENERATORS], probe[0]["seconds"] / len(few.train), config)
    with clock.part(GENERATORS):
        train(slim, part.data, loss, replace(config, epochs=part.epochs), before_step=draw, title=GENERATORS)
