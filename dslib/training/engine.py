"""What runs a step: Lightning Fabric on one device or many, in a precision; and the moving average of weights."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from ..errors import BadConfig
from . import processes
from .settings import PRECISIONS


class Engine:
    """Backward, clipping and step of a network, over all processes of the job.

    Args:
        model: on the device that trains it; stays the caller's own module.
        optimizer: of its parameters.
        precision: a key of `PRECISIONS`.
        compiled: whether the network is compiled.
    Raises:
        BadConfig: for float16 without a GPU.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, precision: str, compiled: bool) -> None:
        from lightning_fabric import Fabric
        from lightning_fabric.strategies import DDPStrategy

        device = next(model.parameters()).device
        if precision == "float16" and device.type != "cuda":
            raise BadConfig("precision float16 needs a GPU: use bfloat16")
        logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
        settings: dict[str, Any] = {"devices": [device.index or 0] if device.type == "cuda" else 1}
        if processes.count() > 1:
            slopes = any(isinstance(m, nn.PReLU) for m in model.modules())  # no gradient where a gate is closed
            nodes, local = (
                int(os.environ.get(f"{kind}_WORLD_SIZE", usual))
                for kind, usual in (("GROUP", 1), ("LOCAL", processes.count()))
            )
            settings = {"devices": local, "num_nodes": nodes, "strategy": DDPStrategy(find_unused_parameters=slopes)}
        self._fabric = Fabric(accelerator=device.type, precision=PRECISIONS[precision], **settings)  # type: ignore[arg-type]
        self._fabric.launch()
        network: Any = torch.compile(model) if compiled else model
        self.network, self._optimizer = self._fabric.setup(network, optimizer, move_to_device=False)

    @property
    def scaler(self) -> Any:
        """The gradient scaler of float16, or None."""
        return getattr(self._fabric.strategy.precision, "scaler", None)

    def alone(self, enabled: bool) -> AbstractContextManager[Any]:
        """Gradients within the block stay this process's own: others of the same step follow."""
        return self._fabric.no_backward_sync(self.network, enabled=enabled and processes.count() > 1)

    def autocast(self) -> AbstractContextManager[Any]:
        """Within the block all networks compute in the engine's precision, a teacher too."""
        return self._fabric.autocast()

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Give all processes the first one's tensors, in place: each has statistics of its own images until then."""
        if processes.count() > 1:
            for tensor in tensors:
                if tensor.is_floating_point():
                    dist.broadcast(tensor, 0)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss, averaged over processes."""
        self._fabric.backward(loss)

    def clip(self, most: float) -> Tensor:
        """Scale the gradients so that their norm is at most this; returns the norm before, ()."""
        norm = self._fabric.clip_gradients(self.network, self._optimizer, max_norm=most, error_if_nonfinite=False)
        assert norm is not None
        return norm

    def step(self) -> None:
        """Change the weights by the gradients, and forget these."""
        self._optimizer.step()
        self._optimizer.zero_grad()


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
        try:
            self.settle()
            yield
        finally:
            self._fill(kept)

    def settle(self) -> None:
        """Put the average into the network for good."""
        self._fill(self.tensors)

    @torch.no_grad()
    def _fill(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in self._own.items():
            tensor.copy_(tensors[name])
