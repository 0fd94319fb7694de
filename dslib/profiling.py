"""What each site costs on this device: kept, linear (activations out) and merged."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from .algebra import dtype_of, in_channels, is_activation_module, structure_of
from .errors import BadConfig, BadRecord, MaskMismatch
from .measuring import measure, this_machine
from .merging import merge_blocks, shrunk_blocks
from .records import Record, commit
from .shrinking import possible_runs, shrink
from .sites import Mask, Plan, Sites

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
        runs: sites that follow each other, joined by '+' -> latency of the one convolution that they become together.
        network: structure that it is of, see `structure_of`; '' if unknown.
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
    runs: dict[str, float] = field(default_factory=dict)
    network: str = ""

    @property
    def savings(self) -> dict[str, float]:
        """Site name -> ms per batch saved by removing it, merged or left linear, whichever is quicker."""
        return {name: self.kept[name] - min(self.merged[name], self.linear[name]) for name in self.kept}

    @property
    def frame(self) -> pd.DataFrame:
        """One row a site, in ms per batch."""
        import pandas as pd

        columns = {"kept_ms": self.kept, "linear_ms": self.linear, "merged_ms": self.merged, "saving_ms": self.savings}
        return pd.DataFrame(columns)

    def saving(self, names: Sequence[str], merged: bool = True) -> float:
        """Ms per batch saved by removing a site, or by merging a run of several into one convolution.

        Args:
            names: of the site, or of the run's sites in order.
            merged: whether every removed site is merged, as `merge` does; else it stays linear where that is quicker.
        """
        kept = sum(self.kept[name] for name in names)
        if len(names) > 1:
            return kept - self.runs["+".join(names)]
        return kept - (self.merged[names[0]] if merged else min(self.merged[names[0]], self.linear[names[0]]))

    def predict(self, plan: Mask | Plan, merged: bool = True) -> float:
        """Predicted latency of the shrunk and merged network, ms per batch: the whole network's less the savings.

        Args:
            plan: what is removed, and merged together.
            merged: as for `saving`.
        Raises:
            MaskMismatch: if it removes a site, or merges a run, that was not measured.
        """
        plan = plan if isinstance(plan, Plan) else Plan(plan)
        self.check(plan.mask.removed)
        unknown = [run for run in map("+".join, plan.runs) if run not in self.runs]
        if unknown:
            raise MaskMismatch(f"no measured cost for the runs {unknown}: profile with longest=2 or more")
        saved = sum(self.saving(group, merged) for group in plan.groups)
        return self.total - saved - sum(self.kept[name] for name in plan.dropped)

    def check(self, names: Iterable[str]) -> None:
        """Raise `MaskMismatch` unless each of these sites was measured, and no cost is negative or NaN."""
        unknown = sorted(set(names) - set(self.kept))
        if unknown:
            raise MaskMismatch(f"no measured cost for {unknown}: profile the network that the mask or importance is of")
        if not self.kept.keys() == self.merged.keys() == self.linear.keys():
            raise MaskMismatch("the sites whose costs are kept, linear and merged differ: profile again")
        for state in (self.kept, self.linear, self.merged, self.runs, {"the whole network": self.total}):
            wrong = {name: ms for name, ms in state.items() if not (isinstance(ms, int | float) and 0 <= ms < math.inf)}
            if wrong:
                raise MaskMismatch(f"costs are milliseconds, 0 or more, found {wrong}: profile again")

    def worth_merging(self, mask: Mask) -> tuple[str, ...]:
        """Removed blocks that are quicker merged than linear: the others are better left as they are.

        A single activation that is removed takes 0 ms either way: there is nothing to merge.
        """
        return tuple(name for name in mask.removed if 0 < self.merged[name] <= self.linear[name])

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
        if found.name != "profile":
            raise BadRecord(f"{path} is no cost table but a record of {found.name}")
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
    longest: int = 1,
) -> CostTable:
    """Measure every mergeable site, kept, linear and merged in turns, on the model's device.

    Args:
        model: the network; left as it is.
        sites: of the model; their image size is what is measured at.
        batch_size: images a batch; halved until the memory suffices.
        boundary: activation after removed blocks, counted as part of them.
        rounds: measurements of each.
        runtime, precision: what runs them, as for `measure`.
        longest: the most sites that follow each other to be measured as one convolution too; 1 is none.
    """
    if min(batch_size, longest) < 1:
        raise BadConfig(f"expected a batch and runs of 1 or more, found {batch_size} and {longest}")
    sites.check_k(len(sites.always_kept))
    watch = _Stopwatch(model, batch_size, rounds, runtime, precision)
    whole = (in_channels(model), sites.image_size, sites.image_size)
    try:
        costs = _costs_of_sites(model, sites, boundary, watch, whole)
        runs = _costs_of_runs(model, sites, boundary, watch, longest, costs["kept"])
        total = watch.medians({"all": model}, whole)["all"]
    except _Halved as halved:  # all of a table is of one batch size
        return profile(model, sites, halved.size, boundary, rounds, runtime, precision, longest)
    return CostTable(
        **costs,
        total=total,
        batch_size=batch_size,
        image_size=sites.image_size,
        device=str(watch.device),
        runtime=watch.described,
        busy=watch.busy,
        runs=runs,
        network=structure_of(model),
    )


class _Halved(Exception):
    """What fits is a smaller batch."""

    def __init__(self, size: int) -> None:
        super().__init__(f"batch of {size}")
        self.size = size


class _Stopwatch:
    """Times parts of a network, all on one device, at one batch size; remembers whether the machine was ever busy."""

    def __init__(self, model: nn.Module, batch_size: int, rounds: int, runtime: str, precision: str | None) -> None:
        self.device, self._dtype, self._batch_size = next(model.parameters()).device, dtype_of(model), batch_size
        self._how = {"rounds": rounds, "runtime": runtime, "precision": precision}
        self.busy, self.described = False, ""

    def medians(self, parts: Mapping[str, nn.Module], shape: Sequence[int]) -> dict[str, float]:
        """Name -> ms per batch of maps of one shape (C, H, W), measured in turns."""
        images = torch.randn(self._batch_size, *shape, device=self.device, dtype=self._dtype)
        timing = measure(parts, images, **self._how)  # type: ignore[arg-type]
        if timing.batch_size < self._batch_size:
            raise _Halved(timing.batch_size)
        self.busy, self.described = self.busy or timing.busy, timing.runtime
        return {name: timing.median(name) for name in parts}


def _costs_of_sites(
    model: nn.Module,
    sites: Sites,
    boundary: Callable[[], nn.Module] | None,
    watch: _Stopwatch,
    whole: tuple[int, int, int],
) -> dict[str, dict[str, float]]:
    """'kept', 'linear' and 'merged', each site name -> ms per batch."""
    costs: dict[str, dict[str, float]] = {"kept": {}, "linear": {}, "merged": {}}
    shrunk = shrunk_blocks(shrink(model, sites.mask([]), boundary, sites.image_size))
    for site in (site for site in sites if site.mergeable):
        block = model.get_submodule(site.name)
        if is_activation_module(block):  # alone: a runtime may do it along with the layer before
            without = shrink(model, sites.mask([name for name in sites.names if name != site.name]))
            both = watch.medians({"with": model, "without": without}, whole)
            states = {"kept": max(0.0, both["with"] - both["without"]), "linear": 0.0, "merged": 0.0}
        else:
            linear = shrunk[site.name]
            merged = merge_blocks([linear], site.name)
            states = watch.medians({"kept": block, "linear": linear, "merged": merged}, site.input_shape or ())
        for state, ms in states.items():
            costs[state][site.name] = ms
    return costs


def _costs_of_runs(
    model: nn.Module,
    sites: Sites,
    boundary: Callable[[], nn.Module] | None,
    watch: _Stopwatch,
    longest: int,
    kept: Mapping[str, float],
) -> dict[str, float]:
    """Run -> ms per batch of its one convolution, as a share of what its blocks, one by one, cost."""
    shapes = {site.name: site.input_shape or () for site in sites}
    runs = {}
    for names, small in possible_runs(model, sites, longest, boundary):
        run = "+".join(names)
        blocks = nn.Sequential(*(model.get_submodule(name) for name in names))
        merged = merge_blocks(list(shrunk_blocks(small).values()), run)
        both = watch.medians({"kept": blocks, "merged": merged}, shapes[names[0]])  # in turns
        runs[run] = sum(kept[name] for name in names) * both["merged"] / both["kept"]
    return runs
