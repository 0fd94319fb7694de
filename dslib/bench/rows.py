"""A benchmark's rows, kept in its record as they come: an interrupted one goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import BadConfig, DslibError, first_line, require
from ..records import Record


class Rows:
    """The rows of a record: each says what was measured (its key), and what came out.

    Args:
        record: with the settings, without rows.
        out: the record's file; rows that stand there are not measured again. None keeps nothing.
        idle: whether rows that were measured on a busy machine are measured again.
    Raises:
        BadConfig: if the file is a record of other settings, or of another machine.
    """

    def __init__(self, record: Record, out: Path | None, idle: bool = False) -> None:
        self.record, self._out = replace(record, values={**record.values, "rows": []}), out
        self._commit, self._idle = record.commit, idle
        if out is None or not out.exists():
            return
        before = Record.load(out)
        same = all(_as_read(getattr(record, part)) == getattr(before, part) for part in ("name", "config", "machine"))
        same &= _as_read({**record.values, "rows": []}) == {**before.values, "rows": []}
        require(same, f"{out} is a record of other settings or of another machine: give another file", BadConfig)
        commits = dict.fromkeys([*before.commit.split(", "), record.commit])
        self.record = replace(before, commit=", ".join(commits))

    def add(self, key: dict[str, Any], make: Callable[[], dict[str, Any]], keep_errors: bool = False) -> dict[str, Any]:
        """The row with this key: as it stands, or made and saved at once.

        Args:
            key: what is measured.
            make: measures it.
            keep_errors: one that could not be measured then says why under `error`, and is tried again the next time.
        """
        rows: list[dict[str, Any]] = self.record.values["rows"]
        key = _as_read(key)
        for row in rows:
            if row.items() >= key.items() and "error" not in row and not (self._idle and row.get("busy")):
                return row
        try:
            row = {**key, **make(), "commit": self._commit}
        except Exception as error:  # a table's other rows are still wanted
            if not keep_errors:
                raise
            kind = "" if isinstance(error, DslibError) else f"{type(error).__name__}: "
            row = {**key, "error": kind + first_line(error)}
        rows[:] = [*(other for other in rows if not other.items() >= key.items()), row]
        if self._out is not None:
            self.record.save(self._out)
        return row


def _as_read(content: Any) -> Any:
    """As it will be read from JSON: a tuple as a list."""
    return json.loads(json.dumps(content))
