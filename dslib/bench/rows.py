"""A benchmark's rows, kept in its record as they come: an interrupted one goes on where it stopped."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..errors import BadConfig, DslibError, first_line
from ..records import Record


class Rows:
    """The rows of a record: each says what was measured (its key), and what came out.

    Args:
        record: with the settings, without rows.
        out: the record's file; rows that stand there are not measured again. None keeps nothing.
        idle: whether rows that were measured on a busy machine are measured again.
        selecting: settings that only say which rows there are: the file may be of others; then the record is of both.
        hours: no row is begun after so many; those that are not are `missing`.
        shared: whether other processes of this machine may add rows to the file meanwhile, see `claimed`.
    Raises:
        BadConfig: if the file is a record of other settings, or of another machine; or if another process writes it,
            which it shares with none.
    """

    def __init__(
        self,
        record: Record,
        out: Path | None,
        idle: bool = False,
        selecting: Collection[str] = (),
        hours: float | None = None,
        shared: bool = False,
    ) -> None:
        self._locks = _locks(out) if shared and out is not None else None
        self._own = _claimed(out) if not shared and out is not None else None  # until this object goes
        self.record, self._out = replace(record, values={**record.values, "rows": []}), out
        self._commit, self._idle = record.commit, idle
        self._began = time.time()
        self._end = math.inf if hours is None else time.monotonic() + 3600 * hours
        self.missing: list[str] = []
        with self._alone():
            if out is not None and out.exists():
                self._take_up(record, out, selecting)
            if self._locks is not None and out is not None:
                self.record.save(out)  # at once: others learn the settings

    def _take_up(self, record: Record, out: Path, selecting: Collection[str]) -> None:
        """Go on with the rows that stand in the file."""
        before = Record.load(out)
        configs = [{k: v for k, v in _as_read(r.config).items() if k not in selecting} for r in (record, before)]
        same = configs[0] == configs[1]
        same &= all(_as_read(getattr(record, part)) == getattr(before, part) for part in ("name", "machine"))
        same &= _as_read({**record.values, "rows": []}) == {**before.values, "rows": []}
        if not same:
            raise BadConfig(f"{out} is a record of other settings or of another machine: give another file")
        commits = dict.fromkeys([*before.commit.split(", "), record.commit])
        here, there = (_as_read({name: r.config[name] for name in selecting}) for r in (record, before))
        both = _as_read({name: _both(there[name], here[name]) for name in selecting})
        command = f"{before.command}; {record.command}"  # of rows that neither asked for nothing is said
        command = record.command if both == here else before.command if both == there else command
        self.record = replace(
            record, config={**record.config, **both}, command=command, values=before.values, commit=", ".join(commits)
        )

    def add(
        self, key: dict[str, Any], make: Callable[[], dict[str, Any]], keep_errors: bool = False, short: bool = False
    ) -> dict[str, Any]:
        """The row with this key: as it stands, or made and saved at once.

        Args:
            key: what is measured.
            make: measures it.
            keep_errors: one that could not be measured then says why under `error`, and is tried again the next time.
            short: made also when the hours are over.
        Returns:
            The row; only the key if the hours are over.
        """
        key = _as_read(key)
        before = self.find(key)
        if before is not None:
            return before
        if time.monotonic() > self._end and not short:
            self.miss(key)
            return key
        try:
            row = _as_read({**key, **make(), "commit": self._commit})
        except Exception as error:  # a table's other rows are still wanted
            if not keep_errors:
                raise
            kind = "" if isinstance(error, DslibError) else f"{type(error).__name__}: "
            row = {**key, "error": kind + first_line(error)}
            if self._locks is not None:
                row["at"] = time.time()  # others that began before need not try it
        with self._alone():
            self._catch_up()
            rows: list[dict[str, Any]] = self.record.values["rows"]
            rows[:] = [*(other for other in rows if not other.items() >= key.items()), row]
            if self._out is not None:
                self.record.save(self._out)
        return row

    @contextmanager
    def claimed(self, key: Mapping[str, Any]) -> Iterator[bool]:
        """Whether this process may make the row, within the block; not while another one does."""
        if self._locks is None:
            yield True
            return
        name = sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        try:
            with FileLock(self._locks / f"{name}.lock", blocking=False):
                yield True
        except Timeout:
            yield False

    def miss(self, key: Mapping[str, Any]) -> None:
        """A row that could not be begun."""
        self.missing.append(", ".join(f"{name} {value}" for name, value in key.items()))

    def find(self, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """The row with this key, if it stands there and is not to be made again."""
        self._catch_up()
        rows = (
            row for row in self.record.values["rows"] if "error" not in row and not (self._idle and row.get("busy"))
        )
        return next((row for row in rows if row.items() >= _as_read(key).items()), None)

    def failed(self, key: Mapping[str, Any]) -> bool:
        """Whether the row could not be made since this process began, here or in another process."""
        rows = (row for row in self.record.values["rows"] if row.get("at", 0.0) >= self._began)
        return any(row.items() >= _as_read(key).items() for row in rows)

    def _alone(self) -> AbstractContextManager[object]:
        """No other process writes the file meanwhile."""
        return nullcontext() if self._locks is None else FileLock(self._locks / "record.lock")

    def _catch_up(self) -> None:
        """Read what others have added."""
        if self._locks is not None and self._out is not None and self._out.exists():
            self.record = Record.load(self._out)


def _claimed(out: Path) -> FileLock:
    """A claim to a whole record."""
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out.with_name(f".{out.name}.lock"), is_singleton=True)  # this process may open it again
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise BadConfig(f"{out} is being written by another run: wait for it, or choose another --out") from error
    return lock


def _locks(out: Path) -> Path:
    """A folder beside a record for claims to its rows."""
    folder = out.with_suffix(".locks")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _both(before: Any, now: Any) -> Any:
    """Two values of a setting that selects rows: all of two lists, the larger of two numbers."""
    return list(dict.fromkeys([*before, *now])) if isinstance(now, list) else max(before, now)


def _as_read(content: Any) -> Any:
    """As it will be read from JSON: a tuple as a list."""
    return json.loads(json.dumps(content))
