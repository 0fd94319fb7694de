"""The few kinds of error that a user can meet; the command line prints each as one line and exits 2.

A message says what was expected, what was found, where, and what to do next.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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


def require(condition: bool, message: str, error: type[DslibError] = BadConfig) -> None:
    """Raise `error` with `message` unless `condition` holds."""
    if not condition:
        raise error(message)


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its kind if it has none."""
    return (str(error).splitlines() or [""])[0] or type(error).__name__
