"""The stages of a run, kept in files: what was made once is loaded ever after."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from . import processes, recipes, records
from .recipes import Recipe

T = TypeVar("T")


class Stages:
    """Results kept in files of a folder.

    Args:
        out: the folder.
        echo: is told of every stage.
        model: name of the network that they are of.
    """

    def __init__(self, out: Path, echo: Callable[[str], None], model: str) -> None:
        self.out, self.echo, self._model = out, echo, model

    def file(self, name: str, load: Callable[[Path], Any], make: Callable[[], Any], together: bool = False) -> Any:
        """What `load` reads from <name>.json; made, and saved by its own `save`, if it is not there.

        `together`: all processes make it, and all the same; else the first does.
        """
        return self._once(name, load, make, lambda path, made: made.save(path), together)

    def network(
        self, name: str, make: Callable[[], tuple[nn.Module, Recipe]], together: bool = False
    ) -> tuple[nn.Module, Recipe]:
        """The same for a network and its recipe."""
        load = partial(recipes.load, trust=self._model)
        model, recipe = self._once(name, load, make, lambda path, made: recipes.save(path, *made), together)
        return model.eval(), recipe

    def seconds(self) -> dict[str, float]:
        """Stage -> wall time in seconds of the call that ended it."""
        path = self.out / "seconds.json"
        return records.read_json(path) if path.exists() else {}

    def _once(
        self,
        name: str,
        load: Callable[[Path], T],
        make: Callable[[], T],
        save: Callable[[Path, T], Any],
        together: bool,
    ) -> T:
        path = self.out / f"{name}.json"
        if processes.agreed(path.exists):
            self.echo(f"{name}: taken from {path}")
            return load(path)
        self.echo(f"{name} ...")
        started = time.perf_counter()

        def keep(made: T) -> None:
            records.write_json(self.out / "seconds.json", self.seconds() | {name: time.perf_counter() - started})
            save(path, made)

        if together or processes.count() == 1:
            made = make()
            processes.agreed(lambda: keep(made))
            return made
        processes.agreed(lambda: keep(make()))
        return load(path)
