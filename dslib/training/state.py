"""The state of a training on disk: whole, checked, the one before it kept, and taken up again at any step.

One run at a time writes into a folder (`claimed`).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Data
from ..errors import BadConfig, BadRecord
from ..models import digest, load_tensors, save_tensors
from . import processes
from .engine import Average
from .settings import Train

Tensors = dict[str, Tensor]


def before_last(path: Path) -> Path:
    """Where the state before the last one is kept."""
    return path.with_name(f"{path.stem}.before{path.suffix}")


def save_state(path: Path, tensors: Tensors, meta: dict[str, Any]) -> None:
    """Write a state under `path`; the one that stood there is kept as `before_last`.

    Killed at any moment, or stopped by a full disk, at least one whole state stands.
    """
    new = _new(path)
    save_tensors(new, tensors, meta)
    if path.exists():
        path.replace(before_last(path))
    new.replace(path)


def load_state(path: Path, check: Callable[[Tensors, dict[str, Any]], None]) -> tuple[Tensors, dict[str, Any]] | None:
    """Tensors and meta of the newest whole state; None if there is none.

    A state that is damaged, or that `check` refuses with `BadRecord`, is named in one line and the one before it used.

    Args:
        path: as given to `save_state`.
        check: looks at tensors and meta.
    Raises:
        BadConfig: if a state cannot be read just now: it may be whole.
    """
    _sweep(path)
    found = [one for one in (_new(path), path, before_last(path)) if _readable(one)]
    for one in found:
        try:
            tensors, meta = load_tensors(one)
            check(tensors, meta)
            return tensors, meta
        except BadRecord as error:
            rest = "the one before is used" if one != found[-1] else "this stage starts again"
            print(f"warning: {error}; {rest}")
            one.unlink()  # the next save would put it in the place of a whole one
    return None


def remove_state(path: Path) -> None:
    """Take away all states of a training that ended."""
    _sweep(path)
    for one in (path, before_last(path), _new(path)):
        one.unlink(missing_ok=True)


def _new(path: Path) -> Path:
    """Where a state is, whole, just before it becomes the last."""
    return path.with_name(f"{path.stem}.new{path.suffix}")


def _sweep(path: Path) -> None:
    """Remove what a kill left in the middle of a write."""
    for one in path.parent.glob(f".{_new(path).stem}.*.partial{path.suffix}"):
        one.unlink(missing_ok=True)


@contextmanager
def claimed(path: Path, folder: bool = False) -> Iterator[None]:
    """Nobody else writes what stands at `path`, a file's name or a folder, within the block.

    The claim ends with the process, however that ends; its file stays. Of a job of several the first process claims.

    Raises:
        BadConfig: if another process has it.
    """
    if processes.rank():
        yield
        return
    from filelock import FileLock, Timeout

    file = path / ".lock" if folder else path.with_name(f".{path.name}.lock")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(file)
        lock.acquire(blocking=False)
    except Timeout as error:
        raise BadConfig(f"{path} is being written by another run: wait for it, or choose another --out") from error
    except OSError as error:
        raise BadConfig(f"cannot write {path}: {error.strerror or error}: choose another folder") from error
    try:
        yield
    finally:
        lock.release()


def _readable(path: Path) -> bool:
    """Whether a file stands there and can be opened and read."""
    try:
        with path.open("rb") as file:
            os.fstat(file.fileno())
            file.read(1)
        return True
    except FileNotFoundError:
        return False
    except OSError as error:
        raise BadConfig(
            f"{path} cannot be read ({error.strerror or error}): mend that, or remove it to start this stage again"
        ) from error


History = list[dict[str, Any]]
FREE = ("workers", "save_minutes", "compile", "accumulate")  # settings that may differ when a training is taken up


@dataclass
class Place:
    """How far a training is: `step` steps of `epoch` (from 0) are done, with losses of sum `total`."""

    epoch: int = 0
    step: int = 0
    total: float = 0.0
    seconds: float = 0.0
    history: History = field(default_factory=list)


class Snapshots:
    """What a training consists of, and the file that keeps it.

    Args:
        path: of the file.
        model, optimizer, average, scaler: what is trained; the last two may be None.
        data: what it is trained on.
        config: its settings.
        about: whatever else decides the outcome.
    """

    def __init__(
        self,
        path: Path,
        model: nn.Module,
        optimizer: torch.optim.SGD,
        average: Average | None,
        scaler: Any,
        data: Data,
        config: Train,
        about: str,
    ) -> None:
        self._path, self._optimizer, self._average, self._scaler = path, optimizer, average, scaler
        self._model = model
        settings = {key: value for key, value in asdict(config).items() if key not in FREE}
        self._identity = {"config": settings, "about": _identity(model, data, about)}

    def save(self, place: Place) -> None:
        """Write everything; the first process does, for all.

        Raises:
            BadConfig: if it cannot be written; the state before stands.
        """
        if processes.rank():
            return
        tensors = {f"model.{name}": tensor for name, tensor in self._model.state_dict().items()}
        for index, state in self._optimizer.state_dict()["state"].items():
            if state.get("momentum_buffer") is not None:
                tensors[f"momentum.{index}"] = state["momentum_buffer"]
        meta: dict[str, Any] = {**self._identity, "place": asdict(place)}
        if self._average is not None:
            tensors |= {f"average.{name}": tensor for name, tensor in self._average.tensors.items()}
            meta["average_steps"] = self._average.steps
        if self._scaler is not None:
            meta["scaler"] = self._scaler.state_dict()
        save_state(self._path, tensors, meta)

    def resume(self) -> Place:
        """Take up the newest whole state, if there is one.

        Raises:
            BadConfig: if it is of a training with other settings, or cannot be read just now.
        """
        found = processes.on_rank_zero(lambda: load_state(self._path, self._check))
        if found is None:
            return Place()
        tensors, meta = found
        self._model.load_state_dict(_part("model", tensors))
        state = self._optimizer.state_dict()
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        momenta = {int(i): tensor for i, tensor in _part("momentum", tensors).items()}  # in the parameters' own layout
        state["state"] = {i: {"momentum_buffer": torch.empty_like(parameters[i]).copy_(t)} for i, t in momenta.items()}
        self._optimizer.load_state_dict(state)
        if self._average is not None:
            for name, tensor in _part("average", tensors).items():
                self._average.tensors[name].copy_(tensor)
            self._average.steps = meta["average_steps"]
        if self._scaler is not None:
            self._scaler.load_state_dict(meta["scaler"])
        return Place(**meta["place"])

    def _check(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Raise `BadRecord` unless this is a state of a training, `BadConfig` if it is another's."""
        damaged = f"{self._path} is no state of a training that can be taken up"
        config, place = meta.get("config"), meta.get("place")
        if not (isinstance(config, dict) and isinstance(place, dict) and isinstance(meta.get("about"), str)):
            raise BadRecord(damaged)
        own = self._identity["config"]
        assert isinstance(config, dict)
        assert isinstance(own, dict)
        other = [
            f"{key} {config.get(key)!r} there, {own.get(key)!r} here"
            for key in sorted({*config, *own})
            if config.get(key) != own.get(key)
        ]
        if not other and meta["about"] != self._identity["about"]:
            other = ["another network, dataset, teacher or cost table"]
        if other:
            raise BadConfig(
                f"{self._path} is of a training with other settings ({'; '.join(other)}): give the same, "
                "or choose another --out"
            )
        try:
            self._check_tensors(tensors)
            own_place = Place(**place)
            whole = [own_place.epoch, own_place.step, len(own_place.history)]
            if not (all(isinstance(n, int) and n >= 0 for n in whole) and whole[2] <= whole[0] + 1):
                raise BadRecord(damaged)
            if self._average is not None and not isinstance(meta["average_steps"], int):
                raise BadRecord(damaged)
            if self._scaler is not None and not isinstance(meta["scaler"], dict):
                raise BadRecord(damaged)
            float(own_place.total), float(own_place.seconds)
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise BadRecord(damaged) from error

    def _check_tensors(self, tensors: dict[str, Tensor]) -> None:
        own, parameters = self._model.state_dict(), [p for g in self._optimizer.param_groups for p in g["params"]]
        wanted = {f"model.{name}": tensor for name, tensor in own.items()}
        if self._average is not None:
            wanted |= {f"average.{name}": tensor for name, tensor in own.items()}
        wanted |= {f"momentum.{i}": p for i, p in enumerate(parameters) if f"momentum.{i}" in tensors}
        same = tensors.keys() == wanted.keys() and all(
            tensors[name].shape == tensor.shape and tensors[name].dtype == tensor.dtype
            for name, tensor in wanted.items()
        )
        if not same:
            raise BadRecord(f"{self._path} holds other tensors than this training")


def _part(kind: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(f"{kind}."): t for name, t in tensors.items() if name.startswith(f"{kind}.")}


def _identity(model: nn.Module, data: Data, about: str) -> str:
    """A hash of the network (structure and values before training), the data's name and size, and `about`."""
    whole = hashlib.sha256(repr(model).encode())
    for part in (digest(model.state_dict()), data.name, str(len(data.train)), str(data.image_size), about):
        whole.update(part.encode())
    return whole.hexdigest()
