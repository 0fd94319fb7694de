"""What runs a step: Lightning Fabric on one device or many, in a precision; and the moving average of weights."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import BadConfig
from . import processes
from .settings import PRECISIONS


def launched(model: nn.Module, precision: str) -> Any:
    """Lightning Fabric, with which all processes of the job train a network on its device.

    Args:
        model: the network.
        precision: a key of `PRECISIONS`.
    Raises:
        BadConfig: for float16 without a GPU.
    """
    from lightning_fabric import Fabric
    from lightning_fabric.strategies import DDPStrategy

    device = next(model.parameters()).device
    if precision == "float16" and device.type != "cuda":
        raise BadConfig("precision float16 needs a GPU: use bfloat16")
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    settings: dict[str, Any] = {"devices": [device.index or 0] if device.type == "cuda" else 1}
    if processes.count() > 1:
        slopes = any(isinstance(m, nn.PReLU) for m in model.modules())  # no gradient where a gate is closed
        settings = {
            "devices": int(os.environ.get("LOCAL_WORLD_SIZE", processes.count())),
            "num_nodes": int(os.environ.get("GROUP_WORLD_SIZE", 1)),
            "strategy": DDPStrategy(find_unused_parameters=slopes),
        }
    fabric = Fabric(accelerator=device.type, precision=PRECISIONS[precision], **settings)  # type: ignore[arg-type]
    fabric.launch()
    return fabric


class Average:
    """The exponential moving average of a network's parameters and statistics, quicker at first.

    Args:
        model: the network.
        decay: share of the average that a step keeps; in step n at most (1 + n) / (10 + n).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay, self.steps = decay, 0
        self._own = model.state_dict()
        self.tensors = {name: tensor.clone() for name, tensor in self._own.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move towards the network as it is now."""
        self.steps += 1
        decay = min(self._decay, (1 + self.steps) / (10 + self.steps))
        floating = [name for name, tensor in self._own.items() if tensor.is_floating_point()]
        torch._foreach_lerp_([self.tensors[n] for n in floating], [self._own[n] for n in floating], 1 - decay)
        for name in self._own.keys() - floating:
            self.tensors[name].copy_(self._own[name])

    @contextmanager
    def inside(self) -> Iterator[None]:
        """The network holds the average within the block, and what it held after."""
        kept = {name: tensor.clone() for name, tensor in self._own.items()}
        self.settle()
        try:
            yield
        finally:
            for name, tensor in self._own.items():
                tensor.copy_(kept[name])

    def settle(self) -> None:
        """Put the average into the network for good."""
        for name, tensor in self._own.items():
            tensor.copy_(self.tensors[name])
