"""Masks, which sites of a network are kept, and plans, which also say what is merged together. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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
        plan = Plan.load(path)
        require(
            not plan.runs and not plan.dropped,
            f"{path} is a plan, which does more than a mask: dslib.Plan.load reads it",
            BadRecord,
        )
        return plan.mask


@dataclass(frozen=True)
class Plan:
    """All that is to be done to a network's sites. A mask is the simplest plan.

    >>> Plan(Mask({"a": False, "b": False, "c": False}), runs=(("a", "b"),), dropped=["c"]).groups
    (('a', 'b'),)

    Args:
        mask: which sites are kept.
        runs: removed sites that follow each other and become one convolution together, in order; the
            activations between them go too.
        dropped: removed sites whose whole block goes: what comes in goes out.
    """

    mask: Mask
    runs: Sequence[Sequence[str]] = ()
    dropped: Sequence[str] = ()

    def __post_init__(self) -> None:
        require(isinstance(self.mask, Mask), f"expected a dslib.Mask, found {type(self.mask).__name__}", MaskMismatch)
        wrong = next((run for run in self.runs if isinstance(run, str) or len(run) < 2), None)
        require(wrong is None, f"a run is two or more sites that follow each other, found {wrong!r}", MaskMismatch)
        object.__setattr__(self, "runs", tuple(tuple(run) for run in self.runs))  # lists are welcome
        require(not isinstance(self.dropped, str), f"dropped: expected names of sites, found {self.dropped!r}",
                MaskMismatch)  # fmt: skip
        object.__setattr__(self, "dropped", tuple(self.dropped))
        names = [*(name for run in self.runs for name in run), *self.dropped]
        kept = [name for name in names if self.mask.get(name, True)]
        require(not kept, f"only removed sites are merged or dropped, these are kept or unknown: {', '.join(kept[:5])}",
                MaskMismatch)  # fmt: skip
        twice = sorted({name for name in names if names.count(name) > 1})
        require(not twice, f"a site can be in one run, or dropped, found twice: {', '.join(twice)}", MaskMismatch)

    def __str__(self) -> str:
        """What is done, in a line: removed sites, runs joined by '+', then the dropped ones."""
        merged = ", ".join(map("+".join, self.groups)) or "nothing"
        return f"{merged}; dropped: {', '.join(self.dropped)}" if self.dropped else merged

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """Removed sites that become convolutions, those merged together in one tuple, in the order of the network."""
        run_of = {run[0]: tuple(run) for run in self.runs}
        others = {*self.dropped, *(name for run in self.runs for name in run[1:])}
        return tuple(run_of.get(name, (name,)) for name in self.mask.removed if name not in others)

    def save(self, path: Path | str) -> Path:
        """Write the plan as JSON."""
        return records.write_json(path, {"mask": dict(self.mask), "runs": self.runs, "dropped": self.dropped})

    @classmethod
    def load(cls, path: Path | str) -> Plan:
        """The plan (or the mask) in a JSON file that `save` wrote.

        Raises:
            BadRecord: if the file holds neither.
        """
        found = records.read_json(path)
        mask, runs, dropped = found.get("mask"), found.get("runs", []), found.get("dropped", [])
        if not isinstance(mask, dict):
            raise BadRecord(f"{path} holds no mask: expected an object under the key 'mask'")
        names = [name for run in runs for name in run] if isinstance(runs, list) and all(
            isinstance(run, list) for run in runs
        ) else [None]  # fmt: skip
        if not all(isinstance(name, str) for name in names):
            raise BadRecord(f"{path}: expected lists of site names under the key 'runs', found {runs!r}")
        if not isinstance(dropped, list) or not all(isinstance(name, str) for name in dropped):
            raise BadRecord(f"{path}: expected a list of site names under the key 'dropped', found {dropped!r}")
        return cls(Mask(mask), runs, dropped)
