"""Rivals, each a function (model, data, budget, effort) -> trained network within the budget, and its record.

All spend the same time, search included; latencies are measured by the same harness.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ..data import Data
from .blocks import layers
from .budget import Budget
from .channels import magnitude, taylor, uniform
from .choosing import CHOICES, PAPER_KEPT, masks_of, within
from .depth import depthshrinker, given_masks, layer_folding, narrow_and_shrunk, planner
from .evolution import metapruning
from .result import Pruned, seed_means
from .tuning import Effort

#: (network, data, budget, effort) -> what is made of it
Method = Callable[[nn.Module, Data, Budget, Effort], Pruned]
#: name -> method
METHODS: dict[str, Method] = {
    "uniform": uniform,
    "magnitude": magnitude,
    "taylor": taylor,
    "layers": layers,
    "metapruning": metapruning,
    "layer-folding": layer_folding,
    "depthshrinker": depthshrinker,
    "given-masks": given_masks,
    "planner": planner,
    "narrow-and-shrunk": narrow_and_shrunk,
}

__all__ = [
    "CHOICES",
    "METHODS",
    "PAPER_KEPT",
    "Budget",
    "Effort",
    "Method",
    "Pruned",
    "masks_of",
    "seed_means",
    "within",
]
