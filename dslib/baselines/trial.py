"""One method at work: what it is given, what it has spent, and what came of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from torch import nn

from ..data import Data
from .budget import Budget, least
from .tuning import Effort, pretrain, start, tune, with_new_statistics

if TYPE_CHECKING:
    import pandas as pd

T = TypeVar("T")


class Pruned(NamedTuple):
    """A trained network within its budget, in eval, and what is to be known of how it came about."""

    model: nn.Module
    record: dict[str, Any]


class Trial:
    """What a method works with, and the clock of what it has spent; the clock starts when this is made.

    Args:
        original: the network that all methods begin with; left as it is.
        data: to train on.
        budget: how fast the network must become.
        effort: what may be spent.
    """

    def __init__(self, original: nn.Module, data: Data, budget: Budget, effort: Effort) -> None:
        self.original, self.data, self.budget, self.effort = original, data, budget, effort
        self.clock = start(original, effort)
        self.teacher = original if effort.distil else None

    def trained(self) -> nn.Module:
        """The network whose weights are inherited: the original, or trained first where it has none to give."""
        if self.effort.pretrained:
            return copy.deepcopy(self.original).eval()
        return pretrain(self.original, self.data, self.effort, self.clock)

    def least(self, make: Callable[[float], tuple[nn.Module, T]], what: str, steps: int = 6) -> T:
        """What the smallest strength gives that meets the budget; see `budget.least`."""
        return least(self.budget, self.original, make, self.clock, steps, what)

    def with_new_statistics(self, network: nn.Module) -> nn.Module:
        """The network with BatchNorm's statistics gathered anew, in place: what was taken out has changed them."""
        return with_new_statistics(network, self.data, self.effort, self.clock)

    def finish(self, network: nn.Module, **found: Any) -> Pruned:
        """The network finetuned in all the time that is left; its record has what was found, and the seconds."""
        done, history = tune(network, self.data, self.teacher, self.effort, self.clock)
        return Pruned(done, {**found, "seconds": self.clock.spent, "history": history})


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
