"""Running the rest of a network: what comes before a module is not computed again, but replayed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..algebra import Call, hooked
from .layers import output_at

REPLAY_BYTES = 2**29  # held at most


class Replay(nn.Module):
    """Gives what a module gave for a batch, without computing it."""

    def __init__(self, outputs: list[Tensor]) -> None:
        super().__init__()
        self.outputs, self.batch = outputs, 0

    def forward(self, *_: Any, **__: Any) -> Tensor:
        """The output of batch number `batch`; a copy, as what follows may work in place."""
        return self.outputs[self.batch].clone()


class Skip(nn.Module):
    """Gives NaN at no cost: stands for a module whose output must not matter."""

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        """NaN in the input's shape."""
        return x.new_full((), torch.nan).expand_as(x)


class Rest:
    """A network, in eval, that is run on the same batches over and over, each time further into it.

    Args:
        network: changed in place by `begin_after`.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self._replay: Replay | None = None

    def at(self, batch: int) -> nn.Module:
        """The network, ready for a batch by its number."""
        if self._replay is not None:
            self._replay.batch = batch
        return self.network

    def begin_after(self, name: str, batches: Iterator[Tensor], count: int, most: float = REPLAY_BYTES) -> bool:
        """From now on, replay what module `name` gives; its weights and those before it must not change any more.

        Nothing is changed if more than `most` bytes would have to be held, or if the network, tried on the first
        batch, needs more than that module's output. The module is called once, and gives one tensor.

        Returns:
            Whether it replays now.
        """
        first = next(batches)
        expected, output, before = self._watch(name, first)
        if output is None or output.nbytes / len(first) * count > most:
            return False
        outputs = [output, *(output_at(self.at(i), images, name) for i, images in enumerate(batches, 1))]
        replay = Replay(outputs)
        replaced = {path: self.network.get_submodule(path) for path in (*before, name)}
        for path in before:
            self.network.set_submodule(path, Skip())
        self.network.set_submodule(name, replay)
        try:
            same = torch.equal(self.network(first), expected)
        except Exception:  # the user's code runs, on inputs that it never saw
            same = False
        if not same:
            for path, module in replaced.items():
                self.network.set_submodule(path, module)
            return False
        self._replay = replay
        return True

    def _watch(self, name: str, images: Tensor) -> tuple[Tensor, Tensor | None, list[str]]:
        """The network's output for a first batch, the module's, and the outermost modules that are done before it."""
        ended: list[str] = []
        outputs: list[Any] = []

        def note(call: Call) -> None:
            ended.append(call.name)
            if call.name == name:
                outputs.append(call.output.clone() if isinstance(call.output, Tensor) else None)

        paths = [path for path, _ in self.network.named_modules() if path]
        with hooked(self.network, paths, after=note):
            expected: Tensor = self.at(0)(images)
        end = ended.index(name)
        done = {path for path in ended[:end] if path not in ended[end:] and not path.startswith(f"{name}.")}
        return expected, outputs[0], [path for path in done if not any(path.startswith(f"{other}.") for other in done)]
