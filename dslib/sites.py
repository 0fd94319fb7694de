"""Sites: the blocks whose inner activations are kept or removed together; masks and plans say which."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, overload

import torch
from torch import nn

from . import records
from .algebra import (
    Shape,
    check_weights,
    count_of,
    dtype_of,
    input_shapes,
    merged_shape,
    removable_activations,
    shared_modules,
    single_activations,
    site_names,
    tail,
    trace,
)
from .errors import BadRecord, MaskMismatch, NotMergeable, NotTraceable

if TYPE_CHECKING:
    import pandas as pd


class Mask(Mapping[str, bool]):
    """Site name -> kept (True) or removed (False). Immutable.

    >>> Mask({"features.2": False, "features.3": True}).k
    1
    """

    def __init__(self, kept: Mapping[str, bool]) -> None:
        wrong = {name: value for name, value in kept.items() if not isinstance(value, bool)}
        if wrong:
            raise MaskMismatch(f"a mask maps site names to True (kept) or False (removed), found {wrong}")
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
        if plan.runs or plan.dropped:
            raise BadRecord(f"{path} is a plan, which does more than a mask: dslib.Plan.load reads it")
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
        if not isinstance(self.mask, Mask):
            raise MaskMismatch(f"expected a dslib.Mask, found {type(self.mask).__name__}")
        for run in self.runs:
            if isinstance(run, str) or len(run) < 2:
                raise MaskMismatch(f"a run is two or more sites that follow each other, found {run!r}")
        object.__setattr__(self, "runs", tuple(tuple(run) for run in self.runs))  # lists are welcome
        if isinstance(self.dropped, str):
            raise MaskMismatch(f"dropped: expected names of sites, found {self.dropped!r}")
        object.__setattr__(self, "dropped", tuple(self.dropped))
        names = [*(name for run in self.runs for name in run), *self.dropped]
        kept = [name for name in names if self.mask.get(name, True)]
        if kept:
            listed = ", ".join(kept[:5])
            raise MaskMismatch(f"only removed sites are merged or dropped, these are kept or unknown: {listed}")
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise MaskMismatch(f"a site can be in one run, or dropped, found twice: {', '.join(twice)}")

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
        if not isinstance(runs, list) or not all(map(_are_names, runs)):
            raise BadRecord(f"{path}: expected lists of site names under the key 'runs', found {runs!r}")
        if not _are_names(dropped):
            raise BadRecord(f"{path}: expected a list of site names under the key 'dropped', found {dropped!r}")
        return cls(Mask(mask), runs, dropped)


def _are_names(found: object) -> bool:
    return isinstance(found, list) and all(isinstance(name, str) for name in found)


@dataclass(frozen=True)
class Site:
    """One block, as `find_sites` saw it.

    Args:
        name: module path in the network, e.g. 'features.3'.
        activations: how many inner activations go if the site is removed.
        input_shape: (C, H, W) at the image size looked at, or None if its input is not one feature map.
        c_out, kernel, stride: of the merged convolution; None if not mergeable, or nothing is to be merged.
        reason: why it cannot be merged; '' if it can.
        convolutions: how many it has; 0 for a single activation outside all blocks.
        activation_at_end: whether an activation already ends the block.
    """

    name: str
    activations: int
    input_shape: Shape | None
    convolutions: int
    c_out: int | None = None
    kernel: tuple[int, int] | None = None
    stride: tuple[int, int] | None = None
    activation_at_end: bool = False
    reason: str = ""

    @property
    def mergeable(self) -> bool:
        """Whether one dense convolution can equal the block once its inner activations are out."""
        return not self.reason


class Sites(Sequence[Site]):
    """The sites of a network, in order. Printed as a table; `frame` is the same as a DataFrame.

    Args:
        found: the sites.
        foldable: names of blocks without inner activations (RepVGG, MobileOne): merging them needs no mask.
        image_size: the square image size (pixels) that the shapes are for.
    """

    def __init__(self, found: Sequence[Site], foldable: Sequence[str], image_size: int) -> None:
        self._found, self.foldable, self.image_size = tuple(found), tuple(foldable), image_size

    @overload
    def __getitem__(self, index: int) -> Site: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Site]: ...
    def __getitem__(self, index: int | slice) -> Site | Sequence[Site]:
        return self._found[index]

    def __len__(self) -> int:
        return len(self._found)

    def __repr__(self) -> str:
        lines = [self.frame.to_string() if self else "no sites"]
        if self.foldable:
            lines.append(f"foldable (no inner activation): {', '.join(self.foldable)}")
        return "\n".join(lines)

    @property
    def names(self) -> tuple[str, ...]:
        """Every site's name, in order."""
        return tuple(site.name for site in self)

    @property
    def mergeable(self) -> tuple[str, ...]:
        """Names of those that can be merged, in order."""
        return tuple(site.name for site in self if site.mergeable)

    @property
    def always_kept(self) -> tuple[str, ...]:
        """Names of those that cannot be merged, in order."""
        return tuple(site.name for site in self if not site.mergeable)

    @property
    def frame(self) -> pd.DataFrame:
        """One row per site, with input, merged convolution, whether it can be merged and why not."""
        import pandas as pd

        rows = [
            {
                "site": site.name,
                "input": "x".join(map(str, site.input_shape or ())),
                "activations": site.activations,
                "c_out": site.c_out,
                "kernel": site.kernel and "x".join(map(str, site.kernel)),
                "stride": site.stride and site.stride[0],
                "mergeable": site.mergeable,
                "reason": site.reason,
            }
            for site in self
        ]
        return pd.DataFrame(rows).set_index("site") if rows else pd.DataFrame()

    def mask(self, kept: Collection[str]) -> Mask:
        """The mask that keeps these sites, and those that cannot be merged, and removes the others.

        Raises:
            MaskMismatch: if a name is not a site's.
        """
        unknown = set(kept) - set(self.names)
        if unknown:
            raise MaskMismatch(f"not sites of this network: {sorted(unknown)}; its sites: {', '.join(self.names)}")
        return Mask({site.name: site.name in kept or not site.mergeable for site in self})

    def check_k(self, k: int) -> None:
        """Raise `MaskMismatch` unless k sites can be kept: those that cannot be merged always are."""
        low, high = len(self.always_kept), len(self)
        if not self.mergeable:
            shown = "print(dslib.find_sites(model)) shows why"
            raise MaskMismatch(f"this network has no mergeable site: nothing can be removed; {shown}")
        if not (isinstance(k, int) and low <= k <= high):
            raise MaskMismatch(f"k is the number of sites kept: expected {low} to {high} for this network, found {k}")


def find_sites(model: nn.Module, image_size: int = 224, single: bool = False) -> Sites:
    """The network's sites, each with its merged shape or the reason why it cannot be merged.

    A site is the innermost module that is neither a container nor the root and owns at least two
    convolutions and two BatchNorms. No class names are looked at. The model is not changed.

    Args:
        model: any CNN whose forward takes (N, C, H, W).
        image_size: side of the square input, in pixels.
        single: whether activations outside blocks (the stem's, the head's) are sites too; removing one saves its
            pass over the map, and there is nothing to be merged.
    Raises:
        BadConfig: if the network does not run at this image size.
    """
    check_weights(model)
    names = site_names(model)
    alone = single_activations(model) if single else []
    shapes = input_shapes(model, [*names, *alone], image_size)
    shared = shared_modules(model)
    looked = [_look_at(name, model.get_submodule(name), shapes.get(name)) for name in names]
    looked += [Site(name, 1, shapes[name], 0) for name in alone if name in shapes]
    places = {name: place for place, (name, _) in enumerate(model.named_modules())}
    found = [
        replace(site, reason=shared[site.name]) if site.name in shared else site
        for site in sorted(looked, key=lambda site: places[site.name])
    ]
    foldable = [site.name for site in found if site.activations == 0 and site.mergeable]
    return Sites([site for site in found if site.name not in foldable], foldable, image_size)


def _look_at(name: str, block: nn.Module, input_shape: Shape | None) -> Site:
    own = copy.deepcopy(block)
    own.eval()  # some networks' train() returns nothing
    site = Site(name, 0, input_shape, count_of(own, nn.Conv2d))
    try:
        traced = trace(own, name)
        site = replace(site, activations=len(removable_activations(traced)), activation_at_end=bool(tail(traced)))
        if input_shape is None:
            return replace(site, reason="its input is not one feature map of one size")
        _check_graph(own, traced, input_shape, name)
        whole = merged_shape([own], [name], [input_shape])
    except (NotMergeable, NotTraceable) as error:
        return replace(site, reason=str(error))
    (k_v, k_h), (s_v, s_h) = whole.kernel, whole.stride
    return replace(site, c_out=len(whole.weight), kernel=(k_v, k_h), stride=(s_v, s_h))


def _check_graph(block: nn.Module, traced: nn.Module, input_shape: Shape, name: str) -> None:
    """Raise `NotTraceable` unless a block's graph computes what its code does, and leaves its input as it is.

    A graph does not show every write in place (`z = y; y += 1`), nor what a block remembers between calls.
    """
    parameter = next(block.parameters(), None)
    if parameter is None or parameter.is_meta:
        return
    x = torch.randn(1, *input_shape, generator=torch.Generator().manual_seed(0)).to(parameter.device, dtype_of(block))
    given = x.clone()
    with torch.no_grad():
        found, expected = traced(x.clone()), block(given)
    if not torch.equal(x, given):
        raise NotTraceable(f"{name}: {type(block).__name__}.forward writes into its input")
    same = found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-3, atol=1e-3, equal_nan=True)
    if not same:
        raise NotTraceable(
            f"{name}: the graph of {type(block).__name__}.forward computes something else than its code: "
            "does it write in place into what it reads again?"
        )
