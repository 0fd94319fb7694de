"""The few kinds of error that a user can meet, and the check of settings, which raises one of them.

The command line prints each as one line and exits 2. A message says what was expected, what was found, where, and
what to do next.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from typing import Any


class DslibError(Exception):
    """Base of every error that dslib raises on purpose."""


class NotTraceable(DslibError):
    """A block's forward cannot be recorded as a graph."""


class NotMergeable(DslibError):
    """A block is not affine, or not at its border, so that no single convolution equals it."""


class MaskMismatch(DslibError):
    """A mask or a k does not fit the network's sites."""


class BadModel(DslibError):
    """A network or its weights cannot be built or loaded."""


class BadData(DslibError):
    """A dataset is missing, empty or corrupt."""


class BadConfig(DslibError):
    """A setting is out of its range."""


class BadRecord(DslibError):
    """A JSON file or a checkpoint is not what it claims to be."""


def nearest(kind: str, name: str, known: Iterable[str]) -> str:
    """The sentence for an unknown name: what was given, and the nearest known ones."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3) or known[:5]
    return f"unknown {kind} {name!r}: the nearest known are {', '.join(close)}"


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its kind if it has none."""
    return (str(error).splitlines() or [""])[0] or type(error).__name__


@dataclass(frozen=True)
class Settings:
    """Base of the settings classes: made, each value is checked against the range that its field declares.

    >>> @dataclass(frozen=True)
    ... class Painting(Settings):
    ...     coats: int = ranged(2, "1 or more")
    >>> Painting(coats=0)
    Traceback (most recent call last):
    dslib.errors.BadConfig: coats: expected 1 or more, found 0
    """

    def __post_init__(self) -> None:
        """Raise `BadConfig` for the first value that is out of its range; None is always allowed."""
        for each in fields(self):
            expected, value = each.metadata.get("expected"), getattr(self, each.name)
            if expected is None or value is None:
                continue
            for one in value if isinstance(value, (tuple, list)) else (value,):
                if not _is_within(one, expected):
                    raise BadConfig(f"{each.name}: expected {expected}, found {one!r}")


def ranged(default: Any, expected: str) -> Any:
    """A field of a settings class whose value, or each of whose values, must be as `expected` says in words.

    Args:
        default: the field's default; `MISSING` for none.
        expected: 'LOW or more', 'more than LOW', 'more than LOW, HIGH at most', 'LOW to HIGH', 'LOW to less than HIGH',
            'between LOW and HIGH' (both excluded) or 'one of WORD, WORD'; what stands in parentheses behind is a
            reason, for the message.
    """
    return field(default=default, metadata={"expected": expected})


_RANGES: dict[str, Callable[..., bool]] = {
    r"(\S+) or more": lambda x, low: x >= low,
    r"more than (\S+)": lambda x, low: x > low,
    r"more than (\S+), (\S+) at most": lambda x, low, high: low < x <= high,
    r"(\S+) to less than (\S+)": lambda x, low, high: low <= x < high,
    r"(\S+) to (\S+)": lambda x, low, high: low <= x <= high,
    r"between (\S+) and (\S+)": lambda x, low, high: low < x < high,
}


def _is_within(value: Any, expected: str) -> bool:
    if expected.startswith("one of "):
        return value in expected.removeprefix("one of ").split(", ")
    for pattern, holds in _RANGES.items():
        found = re.fullmatch(pattern, expected.partition(" (")[0])
        if found:
            return isinstance(value, (int, float)) and holds(value, *map(float, found.groups()))
    raise ValueError(f"no range: {expected!r}")
