"""What each site costs on this device: kept, linear (activations out) and merged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from .blocks import in_channels
from .devices import this_machine
from .errors import BadRecord, MaskMismatch, require
from .graphs import dtype_of
from .masks import Mask
from .measuring import measure
from .merging import merge_blocks, shrunk_blocks
from .records import Record, commit
from .shrinking import shrink
from .sites import Sites

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class CostTable:
    """Latency of every mergeable site in its three states, and of the whole network.

    Args:
        kept, linear, merged: site name -> median latency, ms per batch, BatchNorm folded.
        total: the whole network's, ms per batch, all sites kept.
        batch_size, image_size: what it was measured at.
        device, runtime: where.
        busy: whether the machine had more to do meanwhile.
    """

    kept: dict[str, float]
    linear: dict[str, float]
    merged: dict[str, float]
    total: float
    batch_size: int
    image_size: int
    device: str
    runtime: str
    busy: bool = False

    @property
    def savings(self) -> dict[str, float]:
        """Site name -> ms per batch saved by removing it, merged or left linear, whichever is quicker."""
        return {name: self.kept[name] - min(self.merged[name], self.linear[name]) for name in self.kept}

    @property
    def frame(self) -> pd.DataFrame:
        """One row a site, in ms per batch."""
        import pandas as pd

        columns = {
            "kept_ms": self.kept,
            "linear_ms": self.linear,
            "merged_ms": self.merged,
            "saving_ms": self.savings,
        }
        return pd.DataFrame(columns)

    def predict(self, mask: Mask) -> float:
        """Predicted latency of the merged network, ms per batch: the whole network's less the savings.

        Raises:
            MaskMismatch: if the mask removes a site that was not measured.
        """
        unknown = set(mask.removed) - set(self.kept)
        require(
            not unknown,
            f"no measured cost for {sorted(unknown)}: profile the network the mask is for",
            MaskMismatch,
        )
        return self.total - sum(self.savings[name] for name in mask.removed)

    def worth_merging(self, mask: Mask) -> tuple[str, ...]:
        """Removed sites that are quicker merged than linear: the others are better left as they are."""
        return tuple(name for name in mask.removed if self.merged[name] <= self.linear[name])

    def save(self, path: Path | str) -> Path:
        """Write it as a record."""
        given = f"--model MODEL --image-size {self.image_size} --batch-size {self.batch_size}"
        record = Record("profile", f"dslib profile {given}", {}, asdict(self), this_machine(self.device), commit())
        return record.save(path)

    @classmethod
    def load(cls, path: Path | str) -> CostTable:
        """What `save` wrote.

        Raises:
            BadRecord: if the file is something else.
        """
        found = Record.load(path)
        require(found.name == "profile", f"{path} is no cost table but a record of {found.name}", BadRecord)
        try:
            return cls(**found.values)
        except TypeError as error:
            raise BadRecord(f"{path} is not a cost table: {error}") from error


def profile(
    model: nn.Module,
    sites: Sites,
    batch_size: int = 32,
    boundary: Callable[[], nn.Module] | None = None,
    rounds: int = 15,
    runtime: str = "eager",
    precision: str | None = None,
) -> CostTable:
    """Measure every mergeable site, kept, linear and merged in turns, on the model's device.

    Args:
        model: the network; left as it is.
        sites: of the model; their image size is what is measured at.
        batch_size: images a batch; halved until the memory suffices.
        boundary: activation after removed blocks, counted as part of them.
        rounds: measurements of each.
        runtime, precision: what runs them, as for `measure`.
    """
    require(batch_size > 0, f"batch_size: expected 1 or more, found {batch_size}")
    sites.check_k(len(sites) - len(sites.mergeable))
    device, dtype = next(model.parameters()).device, dtype_of(model)
    shrunk = shrunk_blocks(shrink(model, sites.mask([]), boundary, sites.image_size))
    costs: dict[str, dict[str, float]] = {"kept": {}, "linear": {}, "merged": {}}
    busy = False
    for site in sites:
        if not site.mergeable or site.input_shape is None:
            continue
        images = torch.randn(batch_size, *site.input_shape, device=device, dtype=dtype)
        states = {
            "kept": model.get_submodule(site.name),
            "linear": shrunk[site.name],
            "merged": merge_blocks([shrunk[site.name]], site.name),
        }
        timing = measure(states, images, rounds, runtime=runtime, precision=precision)
        if timing.batch_size < batch_size:  # that much fits
            return profile(model, sites, timing.batch_size, boundary, rounds, runtime, precision)
        busy = busy or timing.busy
        for state in states:
            costs[state][site.name] = timing.median(state)
    images = torch.randn(batch_size, in_channels(model), *[sites.image_size] * 2, device=device, dtype=dtype)
    whole = measure({"all": model}, images, rounds, runtime=runtime, precision=precision)
    if whole.batch_size < batch_size:
        return profile(model, sites, whole.batch_size, boundary, rounds, runtime, precision)
    return CostTable(**costs, total=whole.median("all"), batch_size=batch_size, image_size=sites.image_size,
                     device=str(device), runtime=whole.runtime, busy=busy or whole.busy)  # fmt: skip
