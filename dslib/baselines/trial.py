"""One method at work: what it is given, what it has spent, and what came of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from torch import nn

from ..data import Data
from ..finetuning import RECIPES, Finetune, finetune
from ..shrinking import Fade
from ..training import Trained, recalibrate_batchnorm
from .budget import Budget, least
from .tuning import Clock, Effort, timed

if TYPE_CHECKING:
    import pandas as pd

T = TypeVar("T")


class Pruned(NamedTuple):
    """A trained network within its budget, in eval, and what is to be known of how it came about."""

    model: nn.Module
    record: dict[str, Any]


class Trial:
    """What a method works with, and the clock of what it has spent. The original is left as it is."""

    def __init__(self, original: nn.Module, data: Data, budget: Budget, effort: Effort) -> None:
        self.original, self.data, self.budget, self.effort = original, data, budget, effort
        self.clock = Clock(effort.seconds, next(original.parameters()).device)
        self.teacher = original if effort.distil else None

    def trained(self) -> nn.Module:
        """The network whose weights are inherited: the original, or trained first where it has none to give."""
        return copy.deepcopy(self.original).eval() if self.effort.pretrained else self.pretrain(self.original)

    def pretrain(self, network: nn.Module, name: str = "pretraining", teacher: nn.Module | None = None) -> nn.Module:
        """A copy of a network, trained as usual for its share of the time that is left; on labels, or taught too."""
        training, seconds = partial(_finetuned, network, teacher), self.effort.share * self.clock.left()
        return timed(training, self.data, self.effort.search_config, self.clock, name, seconds).model

    def least(self, make: Callable[[float], tuple[nn.Module, T]], what: str, steps: int = 6) -> T:
        """What about the smallest strength gives that meets the budget; see `budget.least`."""
        return least(self.budget, self.original, make, self.clock, steps, what)

    def with_new_statistics(self, network: nn.Module) -> nn.Module:
        """The network with BatchNorm's statistics gathered anew, in place: what was taken out has changed them."""
        with self.clock.part("statistics"):
            images = self.data.train.first(self.effort.few, self.effort.seed)
            batches = (batch for batch, _ in images.batches(self.effort.batch_size))
            recalibrate_batchnorm(network, (batch for batch in batches if len(batch) > 1))  # one has no spread
        return network

    def finish(self, network: nn.Module, **found: Any) -> Pruned:
        """A copy of the network, finetuned in all the time that is left; the record has what was found, and seconds.

        BatchNorm's statistics are not frozen, in any recipe, while activations fade: they are of what is no longer
        there.
        """
        effort = self.effort
        config = Finetune(lr=effort.lr, batch_size=effort.batch_size, seed=effort.seed, **RECIPES[effort.recipe])
        if any(isinstance(module, Fade) for module in network.modules()):
            config = replace(config, freeze_batchnorm=False)
        training = partial(_finetuned, network, self.teacher)
        done = timed(training, self.data, config, self.clock, "training", self.clock.left())
        return Pruned(done.model, {**found, "seconds": self.clock.spent, "history": done.history})


def _finetuned(network: nn.Module, teacher: nn.Module | None, data: Data, config: Finetune) -> Trained:
    return finetune(network, data, teacher, config)


def seed_means(frame: pd.DataFrame) -> pd.DataFrame:
    """Each method at each budget: mean and standard deviation of accuracy and throughput over seeds, and their number.

    Args:
        frame: columns `method`, `speedup` (the budget), `images_per_s` and `accuracy` (0 to 1), one row a network; rows
            without accuracy failed, and those without throughput could not be timed: they are left out.
    Returns:
        Columns `method`, `speedup`, `accuracy`, `accuracy_std`, `images_per_s`, `images_per_s_std`, `seeds`.
    """
    import pandas as pd

    grouped = frame.dropna(subset=["accuracy", "images_per_s"]).groupby(["method", "speedup"], sort=False)
    parts = {name: grouped[name].agg(["mean", "std"]) for name in ("accuracy", "images_per_s")}
    columns = {f"{name}{end}": part[of] for name, part in parts.items() for of, end in (("mean", ""), ("std", "_std"))}
    return pd.DataFrame({**columns, "seeds": grouped.size()}).reset_index()
