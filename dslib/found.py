"""Importances of sites: what a search learns and a ranking measures, and the masks that follow from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import records
from .errors import BadRecord, MaskMismatch, require
from .masks import Mask

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Found:
    """What a search learnt, or a ranking measured.

    Args:
        m: site name -> importance, for the sites that can be removed.
        always_kept: sites that cannot be merged.
        order: all site names, in the network's order.
        history: one row an epoch; `kept` names the sites whose gates were open, `m` the importances.
        runs: sites that follow each other, joined by '+' -> importance of all of them, merged into one convolution.
        dropped: site name -> importance of its whole block, for those that can be merged and may be dropped.
        unit: what importances are, where their sum means something; '' if they only order the sites.
        network: structure that they are of, see `blocks.structure_of`; '' if unknown.
        image_size: side in pixels of the images that they are of; 0 if unknown.
        own: the network's own loss, to which importances in nats of cross-entropy add.
    """

    m: dict[str, float]
    always_kept: tuple[str, ...]
    order: tuple[str, ...]
    history: list[dict[str, Any]] = field(default_factory=list)
    runs: dict[str, float] = field(default_factory=dict)
    dropped: dict[str, float] = field(default_factory=dict)
    unit: str = ""
    network: str = ""
    image_size: int = 0
    own: float = 0.0

    def mask(self, k: int) -> Mask:
        """The mask that keeps k sites: the most important ones (and those that cannot be merged).

        Raises:
            MaskMismatch: if k is below the number of sites that cannot be merged, or above that of all sites.
        """
        low, high = len(self.always_kept), len(self.order)
        require(
            low <= k <= high,
            f"k is the number of sites kept: expected {low} to {high}, found {k}",
            MaskMismatch,
        )
        ranked = sorted(self.m, key=lambda name: -self.m[name])
        kept = {*self.always_kept, *ranked[: k - low]}
        return Mask({name: name in kept for name in self.order})

    @property
    def frame(self) -> pd.DataFrame:
        """One row a site, with its importance and its rank (1 is kept longest)."""
        import pandas as pd

        frame = pd.DataFrame({"m": self.m})
        frame["rank"] = frame["m"].rank(ascending=False, method="first").astype(int)
        return frame

    def save(self, path: Path | str) -> Path:
        """Write it as JSON."""
        return records.write_json(path, asdict(self))

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Found:
        """From its fields, as JSON keeps them.

        Raises:
            ValueError: if importances are no numbers, or of sites that it does not list.
        """
        found = cls(**{**content, "always_kept": tuple(content["always_kept"]), "order": tuple(content["order"])})
        names = {*found.m, *found.dropped, *found.always_kept, *(name for run in found.runs for name in run.split("+"))}
        values = (found.own, *found.m.values(), *found.runs.values(), *found.dropped.values())
        if not names <= set(found.order) or not all(isinstance(value, int | float) for value in values):
            raise ValueError("its importances are no numbers, or of other sites than it lists")
        return found

    @classmethod
    def load(cls, path: Path | str) -> Found:
        """What `save` wrote, or `dslib importance`.

        Raises:
            BadRecord: if the file is something else.
        """
        found = records.read_json(path)
        try:
            return cls.of(found["values"] if found.get("name") == "importance" else found)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise BadRecord(f"{path} is not a search result: {error}") from error
