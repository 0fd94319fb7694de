"""The state of a training on disk: whole, checked, the one before it kept, and taken up again at any step.

One run at a time writes into a folder (`claimed`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
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


@dataclass
class TrainingState:
    """What a training consists of, and the file that keeps it; `about` is whatever else decides the outcome."""

    path: Path
    model: nn.Module
    optimizer: torch.optim.SGD
    average: Average | None
    scaler: Any  # of float16's gradients, or None
    data: Data
    config: Train
    about: str

    def __post_init__(self) -> None:
        """Note what the training begins with: a state of another is refused."""
        self._parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        begun = hashlib.sha256(repr(self.model).encode())  # the network's structure and its values before training
        of = self.data.name, str(len(self.data.train)), str(self.data.image_size)
        for part in (digest(self.model.state_dict()), *of, self.about):
            begun.update(part.encode())
        self._settings = {key: value for key, value in asdict(self.config).items() if key not in FREE}
        self._identity = begun.hexdigest()

    def save(self, place: Place) -> None:
        """Write everything; the first process does, for all.

        Raises:
            BadConfig: if it cannot be written; the state before stands.
        """
        if not processes.rank():
            save_state(self.path, self._tensors(), self._meta(place))

    def resume(self) -> Place:
        """Take up the newest whole state, if there is one.

        Raises:
            BadConfig: if it is of a training with other settings, or cannot be read just now.
        """
        found = processes.on_rank_zero(lambda: load_state(self.path, self._check))
        if found is None:
            return Place()
        tensors, meta = found
        self.model.load_state_dict(_part("model", tensors))
        for index, tensor in _part("momentum", tensors).items():
            parameter = self._parameters[int(index)]  # whose layout in memory the momentum has too
            self.optimizer.state[parameter]["momentum_buffer"] = torch.empty_like(parameter).copy_(tensor)
        if self.average is not None:
            self.average.steps = meta["average_steps"]
            for name, tensor in _part("average", tensors).items():
                self.average.tensors[name].copy_(tensor)
        if self.scaler is not None:
            self.scaler.load_state_dict(meta["scaler"])
        return Place(**meta["place"])

    def _tensors(self) -> Tensors:
        momenta = {i: self.optimizer.state.get(p, {}).get("momentum_buffer") for i, p in enumerate(self._parameters)}
        return {
            **_named("model", self.model.state_dict()),
            **_named("momentum", {i: momentum for i, momentum in momenta.items() if momentum is not None}),
            **_named("average", self.average.tensors if self.average is not None else {}),
        }

    def _meta(self, place: Place) -> dict[str, Any]:
        meta: dict[str, Any] = {"config": self._settings, "about": self._identity, "place": asdict(place)}
        if self.average is not None:
            meta["average_steps"] = self.average.steps
        if self.scaler is not None:
            meta["scaler"] = self.scaler.state_dict()
        return meta

    def _check(self, tensors: Tensors, meta: dict[str, Any]) -> None:
        """Raise `BadRecord` unless this is a state of a training, `BadConfig` if it is another's."""
        damaged = BadRecord(f"{self.path} is no state of a training that can be taken up")
        config, own, about = meta.get("config"), self._settings, meta.get("about")
        if not isinstance(config, dict) or not isinstance(about, str):
            raise damaged
        other = [
            f"{key} {config.get(key)!r} there, {own.get(key)!r} here"
            for key in sorted({*config, *own})
            if config.get(key) != own.get(key)
        ]
        if not other and about != self._identity:
            other = ["another network, dataset, teacher or cost table"]
        if other:
            raise BadConfig(
                f"{self.path} is of a training with other settings ({'; '.join(other)}): give the same, "
                "or choose another --out"
            )
        if not _is_like({**meta, "config": own}, self._meta(Place())):
            raise damaged
        place = Place(**meta["place"])
        if min(place.epoch, place.step) < 0 or len(place.history) > place.epoch + 1:
            raise damaged
        least, found = _forms(self._tensors()), _forms(tensors)  # a training that has made no step has no momentum
        most = least | _forms(_named("momentum", dict(enumerate(self._parameters))))
        if not least.items() <= found.items() <= most.items():
            raise BadRecord(f"{self.path} holds other tensors than this training")


def _named(kind: str, tensors: Mapping[Any, Tensor]) -> Tensors:
    return {f"{kind}.{name}": tensor for name, tensor in tensors.items()}


def _part(kind: str, tensors: Tensors) -> Tensors:
    return {name.removeprefix(f"{kind}."): t for name, t in tensors.items() if name.startswith(f"{kind}.")}


def _forms(tensors: Tensors) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def _is_like(found: Any, own: Any) -> bool:
    """Whether two values have the same type; of dicts, the same keys, and values alike."""
    if type(found) is not type(own):
        return False
    return not isinstance(own, dict) or (found.keys() == own.keys() and all(_is_like(found[k], own[k]) for k in own))


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
    found = [one for one in (_new(path), path, before_last(path)) if _is_readable(one)]
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


def before_last(path: Path) -> Path:
    """Where the state before the last one is kept."""
    return path.with_name(f"{path.stem}.before{path.suffix}")


def _new(path: Path) -> Path:
    """Where a state is, whole, just before it becomes the last."""
    return path.with_name(f"{path.stem}.new{path.suffix}")


def _sweep(path: Path) -> None:
    """Remove what a kill left in the middle of a write."""
    for half in path.parent.glob(f".{_new(path).stem}.*.partial{path.suffix}"):
        half.unlink(missing_ok=True)


def _is_readable(path: Path) -> bool:
    """Whether a file stands there; raises `BadConfig` if it stands, but cannot be read."""
    try:
        with path.open("rb") as file:
            file.read(1)
        return True
    except FileNotFoundError:
        return False
    except OSError as error:
        raise BadConfig(
            f"{path} cannot be read ({error.strerror or error}): mend that, or remove it to start this stage again"
        ) from error


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
