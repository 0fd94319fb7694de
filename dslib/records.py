"""Result records and other JSON files: written whole or not at all, read with a clear error. No torch."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from .errors import BadConfig, BadRecord

LIBRARIES = ("dslib", "torch", "torchvision", "timm", "numpy")


@dataclass(frozen=True)
class Record:
    """One result: what was run, on what, and what came out.

    Args:
        name: what was measured, e.g. 'run'.
        command: what to type to get it again.
        config: every setting, seed included.
        machine: device, runtime, threads, library versions; see `machine`.
        values: the results; a key ends in its unit where it has one (`latency_ms`, `seconds`).
        commit: git commit of the code, empty if unknown.
        date: ISO 8601, UTC.
    """

    name: str
    command: str
    config: dict[str, Any]
    values: dict[str, Any]
    machine: dict[str, Any]
    commit: str = ""
    date: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))

    @property
    def machine_name(self) -> str:
        """What to call its machine in a table."""
        threads = f"{self.machine['threads']} thread{'' if self.machine['threads'] == 1 else 's'}"
        return str(self.machine.get("gpu") or f"{self.machine['processor']}, {threads}")

    def save(self, path: Path | str) -> Path:
        """Write the record as JSON and return the path."""
        return write_json(path, asdict(self))

    @classmethod
    def load(cls, path: Path | str) -> Record:
        """The record in a file.

        Raises:
            BadRecord: if the file is no record; it names the file and the missing or unknown keys.
        """
        found = read_json(path)
        try:
            return cls(**found)
        except TypeError as error:
            raise BadRecord(f"{path} is not a result record: {error}") from error


def machine(**extra: Any) -> dict[str, Any]:
    """This machine and its libraries, for a record: processor, cores, versions; `extra` is added."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: _version(name) for name in LIBRARIES},
        **extra,
    }


def commit() -> str:
    """The git commit of the source tree that dslib runs from, with '+' if it was changed; '' if unknown."""
    here = Path(__file__).parent
    try:
        head = _git(here, "rev-parse", "--short=12", "HEAD")
        return head + ("+" if _git(here, "status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def as_words(settings: dict[str, Any]) -> str:
    """Settings as a command's options, quoted for a shell; a tuple's are given one after another."""
    pairs = ((key, one) for key, value in settings.items() for one in (value if isinstance(value, tuple) else [value]))
    return " ".join(f"--{key.replace('_', '-')} {shlex.quote(str(one))}" for key, one in pairs)


def as_options(options: Mapping[str, Any] | None) -> tuple[str, ...]:
    """A model's keyword arguments as values of `--model-option`: NAME=JSON."""
    return tuple(f"{key}={json.dumps(value)}" for key, value in (options or {}).items())


def write_json(path: Path | str, content: Any) -> Path:
    """Write `content` as JSON under `path`, whole or not at all, and return the path."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return Path(path)


def read_json(path: Path | str) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        BadRecord: if the file is missing, not JSON, or not an object.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BadRecord(f"no file {path}: give the path of an existing JSON file") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BadRecord(f"{path} is not readable JSON: {error}") from error
    if not isinstance(found, dict):
        raise BadRecord(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found


@contextmanager
def whole_file(path: Path | str) -> Iterator[Path]:
    """A path beside `path` to write to; it takes the final name only once the block has ended well.

    Raises:
        BadConfig: if the folder cannot be written or the disk is full; nothing is left under `path`.
    """
    path = Path(path)
    partial = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=f".partial{path.suffix}", dir=path.parent)
        os.close(handle)
        partial = Path(name)
        yield partial
        partial.chmod(0o644)
        partial.replace(path)
    except OSError as error:
        raise BadConfig(f"cannot write {path}: {error.strerror or error}: choose another folder") from error
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()


def _version(library: str) -> str:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return "source"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
