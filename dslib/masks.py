"""Masks: which sites of a network are kept. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from . import records
from .errors import BadRecord, MaskMismatch, require


class Mask(Mapping[str, bool]):
    """Site name -> kept (True) or removed (False). Immutable.

    >>> Mask({"features.2": False, "features.3": True}).k
    1
    """

    def __init__(self, kept: Mapping[str, bool]) -> None:
        wrong = {name: value for name, value in kept.items() if not isinstance(value, bool)}
        require(
            not wrong,
            f"a mask maps site names to True (kept) or False (removed), found {wrong}",
            MaskMismatch,
        )
        self._kept = dict(kept)

    def __getitem__(self, name: str) -> bool:
        return self._kept[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def __hash__(self) -> int:
        return hash(frozenset(self._kept.items()))

    def __repr__(self) -> str:
        return f"Mask(k={self.k} of {len(self)}, removed: {', '.join(self.removed) or 'none'})"

    @property
    def k(self) -> int:
        """The number of sites kept."""
        return sum(self._kept.values())

    @property
    def kept(self) -> tuple[str, ...]:
        """Names of the kept sites, in order."""
        return tuple(name for name, on in self._kept.items() if on)

    @property
    def removed(self) -> tuple[str, ...]:
        """Names of the removed sites, in order."""
        return tuple(name for name, on in self._kept.items() if not on)

    def save(self, path: Path | str) -> Path:
        """Write the mask as JSON."""
        return records.write_json(path, {"mask": self._kept})

    @classmethod
    def load(cls, path: Path | str) -> Mask:
        """The mask in a JSON file that `save` wrote.

        Raises:
            BadRecord: if the file holds no mask.
        """
        found = records.read_json(path).get("mask")
        if not isinstance(found, dict):
            raise BadRecord(f"{path} holds no mask: expected an object under the key 'mask'")
        return cls(found)
