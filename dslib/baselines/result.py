"""What every method returns, and what those that inherit weights begin with."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from ..data import Data
from .tuning import Clock, Effort, pretrain

if TYPE_CHECKING:
    import pandas as pd


class Pruned(NamedTuple):
    """A trained network within its budget, in eval, and what is to be known of how it came about."""

    model: nn.Module
    record: dict[str, Any]


def ready(model: nn.Module, data: Data, effort: Effort, clock: Clock) -> nn.Module:
    """The network whose weights are inherited: as it is, or trained first where it has none to give."""
    return copy.deepcopy(model).eval() if effort.pretrained else pretrain(model, data, effort, clock)


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
