"""MetaPruning: generated weights for any widths, and an evolutionary search among them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn

from ..data import Data, Split, cut
from ..errors import BadConfig
from ..finetuning import Finetune
from ..training import Trained, cross_entropy, loss_on, recalibrate_batchnorm, train
from .coupling import Macs
from .slim import Slim
from .trial import Pruned, Trial
from .tuning import timed

Widths = tuple[int, ...]

LEAST = 0.1  # share of a group's channels
FIRST, PARENTS, CHILDREN = 20, 6, 10  # random configurations to begin with; of each generation
MUTATION = 0.1  # probability of a group's share to be drawn anew
GENERATORS, EVOLUTION = "generators", "evolution"  # what the time before the final training is spent as
SEARCH = 0.3  # of that time, for evolution


def metapruning(trial: Trial) -> Pruned:
    """A network that generates weights for any widths is trained with random ones; the best widths are evolved.

    Candidates fill the multiply-accumulates that the budget corresponds to, and are judged by their cross-entropy on
    training images held back, BatchNorm's statistics gathered anew. The best of each generation is measured; what is
    allowed follows from that. The record has the losses of the best and of the first, random ones on other images.

    Source: Liu et al., MetaPruning, ICCV 2019. Departs: see `Slim`; generators see widths within the budget; the
    network that is found goes on with the weights generated for it, as there is no time to train it from nothing.
    """
    effort, size = trial.effort, trial.data.image_size
    limit = effort.share * effort.seconds
    train_split, held = cut(trial.data.train, 2 * effort.few)
    others, held = cut(held, effort.few)
    with trial.clock.part(GENERATORS):
        slim = Slim(trial.original, size, ordered=effort.pretrained, seed=effort.seed)
        macs = Macs(trial.original, slim.groups, size)

    def make(strength: float) -> tuple[nn.Module, float]:
        widths = slim.rounded([1 - (1 - LEAST) * strength] * len(slim.groups))
        return slim.extract(widths), macs(widths)

    allowed = trial.least(make, "metapruning")
    some = train_split.first(max(2, effort.images // 8), effort.seed)
    search = _Evolution(slim, macs, [images for images, _ in some.batches(effort.batch_size)], held, effort.seed)
    _train_generators(trial, search, replace(trial.data, train=train_split), allowed, (1 - SEARCH) * limit)
    best = _evolve(trial, search, allowed, limit)
    losses = [search.loss_of(widths, others) for widths in (best, *search.first)]  # no part of the method: not timed
    with trial.clock.part(EVOLUTION):
        small = search.network(best)
    return trial.finish(
        small,
        widths=dict(zip((group.makers[0] for group in slim.groups), best, strict=True)),
        loss=losses[0],
        random_losses=losses[1:],
        random_macs=[macs(widths) for widths in search.first],
        candidates=len(search.losses),
    )


class _Evolution:
    """Generations of widths, each within as many multiply-accumulates as are allowed."""

    def __init__(self, slim: Slim, macs: Macs, calibration: list[Tensor], held: Split, seed: int) -> None:
        self.slim, self.macs, self.calibration, self.held = slim, macs, calibration, held
        self._rng = random.Random(seed)
        self.losses: dict[Widths, float] = {}
        self.first: list[Widths] = []

    def generation(self, allowed: float) -> list[Widths]:
        """The best widths so far within what is allowed, the best first, after another generation."""
        known = self._best(allowed)
        if len(known) < PARENTS:
            fresh = [self.drawn(self._rng, allowed) for _ in range(FIRST)]
        else:
            fresh = [self._within(self._child(known[:PARENTS]), allowed) for _ in range(CHILDREN)]
        for widths in fresh:
            if widths not in self.losses:
                self.losses[widths] = self.loss_of(widths, self.held)
        self.first = self.first or fresh
        return self._best(allowed)

    def network(self, widths: Widths) -> nn.Module:
        """With the weights that are generated for these widths."""
        small = self.slim.extract(widths)
        recalibrate_batchnorm(small, self.calibration)
        return small

    def loss_of(self, widths: Widths, images: Split) -> float:
        """Cross-entropy of that network on some images."""
        return loss_on(self.network(widths), images)

    def drawn(self, rng: random.Random, allowed: float) -> Widths:
        """Random widths that fill what is allowed."""
        return self._within([rng.uniform(LEAST, 1.0) for _ in self.slim.groups], allowed)

    def _best(self, allowed: float) -> list[Widths]:
        return sorted((w for w in self.losses if self.macs(w) <= allowed), key=self.losses.__getitem__)

    def _child(self, parents: Sequence[Widths]) -> list[float]:
        """Shares of a mother or a father, group by group, some of them drawn anew."""
        mother, father = self._rng.sample(list(parents), 2)
        shares = []
        for group, one, other in zip(self.slim.groups, mother, father, strict=True):
            inherited = self._rng.choice((one, other)) / group.width
            shares.append(self._rng.uniform(LEAST, 1.0) if self._rng.random() < MUTATION else inherited)
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


def _evolve(trial: Trial, search: _Evolution, allowed: float, limit: float) -> Widths:
    """The best widths that are quick enough as measured, when `limit` seconds of the clock are spent.

    Raises:
        BadConfig: if the narrowest widths are not quick enough.
    """
    best, measured = None, set[Widths]()
    slim, macs, clock = search.slim, search.macs, trial.clock
    narrowest = macs(slim.rounded([LEAST] * len(slim.groups)))
    while best is None or sum(clock.spent.values()) < limit:
        known = len(search.losses)
        with clock.part(EVOLUTION):
            leaders = [widths for widths in search.generation(allowed) if widths not in measured]
        if best is not None and len(search.losses) == known:
            break  # all children have been seen
        for widths in leaders[:1]:
            measured.add(widths)
            share = trial.budget.reached(trial.original, slim.extract(widths)) / trial.budget.speedup
            if share >= 1 and (best is None or search.losses[widths] < search.losses[best]):
                best = widths
            allowed = macs(widths) * min(1.05, max(0.9, share))
        if not leaders:
            allowed *= 0.95
        if best is None and allowed < 0.9 * narrowest:
            raise BadConfig("metapruning: no widths are as quick as asked for, the narrowest are not either")
    return best


def _train_generators(trial: Trial, search: _Evolution, data: Data, allowed: float, seconds: float) -> None:
    """Train the weights and their generators with random widths within what is allowed, for so many seconds."""
    slim, loss = search.slim, cross_entropy(trial.effort.search_config.label_smoothing)

    def draw(progress: float) -> None:
        slim.choose(search.drawn(random.Random(f"{trial.effort.seed} {progress}"), allowed))

    def training(data: Data, config: Finetune) -> Trained:
        return Trained(slim, train(slim, data, loss, config, before_step=draw, title=GENERATORS))

    left = seconds - trial.clock.spent[GENERATORS]
    timed(training, data, trial.effort.search_config, trial.clock, GENERATORS, left)
