"""What every method returns, and what those that inherit weights begin with."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

from torch import nn

from ..data import Data
from .tuning import Clock, Effort, prepare


class Pruned(NamedTuple):
    """A trained network within its budget, in eval, and what is to be known of how it came about."""

    model: nn.Module
    record: dict[str, Any]


def ready(model: nn.Module, data: Data, effort: Effort, clock: Clock) -> nn.Module:
    """The network whose weights are inherited: as it is, or trained first where it has none to give."""
    return copy.deepcopy(model).eval() if effort.pretrained else prepare(model, data, effort, clock)
