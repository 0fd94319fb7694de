"""The state of a training on disk: whole, checked, the one before it kept; and one run at a time in a folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from . import processes
from .checkpoints import load_tensors, save_tensors
from .errors import BadConfig, BadRecord

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
        raise BadConfig(f"{path} cannot be read ({error.strerror or error}): mend that, or remove it to start this "
                        "stage again") from error  # fmt: skip
