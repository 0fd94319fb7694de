"""What every method returns, and what those that inherit weights begin with."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

from torch import nn

from ..datasets import Data
from .tuning import Clock, Effort, tune


class Pruned(NamedTuple):
    """A trained network within its budget, in eval, and what is to be known of how it came about."""

    model: nn.Module
    record: dict[str, Any]


def ready(model: nn.Module, data: Data, effort: Effort, clock: Clock) -> nn.Module:
    """The network whose weights are inherited: as it is, or trained first where it has none to give."""
    if effort.pretrained:
        return copy.deepcopy(model).eval()
    return tune(model, data, None, effort, clock, "pretraining", effort.share * clock.limit, lr=effort.search_lr)[0]
