"""What each site matters: how much worse the network gets when it alone is removed, with labels or without.

A ranking measures such importances, a search learns them; masks for every k follow from either (`Found`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from . import records
from .algebra import droppable, structure_of
from .calibrating import Calibrate, Images, calibrate, logits_of
from .data import Data, FolderSplit, Split
from .errors import BadConfig, BadRecord, MaskMismatch
from .finetuning import Finetune, finetune
from .shrinking import possible_runs, shrink
from .sites import Mask, Plan, Sites
from .training import loss_on, recalibrate_batchnorm

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
        if not low <= k <= high:
            raise MaskMismatch(f"k is the number of sites kept: expected {low} to {high}, found {k}")
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


@dataclass(frozen=True)
class Importance:
    """Settings of `importance`.

    Args:
        count: training images that the network recovers on, and as many others that its loss is taken on.
        longest: the most sites that follow each other to be looked at as one convolution too; 1 is none.
        drop: whether to look at what dropping does too, of those blocks that can be merged and dropped.
        calibrate: how to calibrate what is removed, and to adjust what is kept; None takes the activations out and
            gathers BatchNorm's statistics anew.
        finetune: how to finetune before the loss is taken; None does not.
        seed: of the choice of images.
    """

    count: int = 1024
    longest: int = 1
    drop: bool = False
    calibrate: Calibrate | None = None
    finetune: Finetune | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not self.count >= 2:
            raise BadConfig(f"count: expected 2 or more (BatchNorm needs them), found {self.count}")
        if not self.longest >= 1:
            raise BadConfig(f"longest: expected 1 or more, found {self.longest}")


def importance(
    model: nn.Module,
    data: Data,
    sites: Sites,
    config: Importance | None = None,
    progress: bool = True,
    partial: Path | None = None,
) -> Found:
    """By how much the loss rises when the activations of a site (or a run of sites) go, or a block, and nothing else.

    Args:
        model: trained for the data, on the device to run on; left as it is.
        data: only its training split is used: one part to recover on, another for the loss.
        sites: of the model.
        config: the settings.
        progress: show a bar.
        partial: where each value is kept as it comes, to go on from after an interruption.
    Returns:
        As from a search, with a mask for every k; `m`, `runs`, `dropped` are differences of cross-entropies, in nats.
    Source: the importance of Kim et al., ICML 2023, with seconds of recovery in place of an epoch of finetuning; that
    layers may go as well as be merged: Kim et al., LayerMerge, ICML 2024.
    """
    config = config or Importance()
    sites.check_k(len(sites.always_kept))
    recover, held = halves(data.train, config.count, config.seed)
    if not len(recover) > 1:
        raise BadConfig(f"count: expected at least two images to recover on, found {len(recover)}")
    size = min(64, len(recover))
    whole = torch.arange(len(recover) // size * size)

    def loss(plan: Plan) -> float:
        if config.calibrate is not None:
            small = calibrate(model, plan, recover, config.calibrate, progress=False).model
        else:
            small = shrink(model, plan, image_size=sites.image_size)
            recalibrate_batchnorm(small, (images for images, _ in recover.batches(size, whole)))
        if config.finetune is not None:
            small = finetune(small, replace(data, train=recover, val=held), model, config.finetune).model
        return loss_on(small, held)

    settings = replace(config, longest=1, drop=False)  # more or less of them are the same values
    about = f"importance of {sites.names}, {data.name}, {len(data.train)} images, {data.image_size}, {settings}"
    title = "importance" if progress else ""
    own, found = _of_each(model, sites, config.longest, config.drop, loss, title, partial, about)
    m, runs, dropped = (
        {name: value - own for name, value in part.items()} for part in (found.m, found.runs, found.dropped)
    )
    return replace(found, m=m, runs=runs, dropped=dropped, unit="nats of cross-entropy", own=own)


def halves(train: Split | FolderSplit, count: int, seed: int) -> tuple[Split, Split]:
    """Training images to recover on, and as many others for the loss, `count` of each where there are as many."""
    part = train.first(2 * count, seed)
    half = len(part) // 2
    first, second = (
        replace(part, images=part.images[s], labels=part.labels[s]) for s in (slice(half), slice(half, None))
    )
    return first, second


def rank(
    model: nn.Module,
    sites: Sites,
    images: Images,
    config: Calibrate | None = None,
    progress: bool = True,
    longest: int = 1,
    partial: Path | None = None,
    drop: bool = False,
    held: Images | None = None,
) -> Found:
    """Every removable site's importance: the divergence from the original network if it alone is calibrated away.

    Args:
        model: the network; left as it is.
        sites: of the model.
        images: unlabelled, as for `calibrate`; some hundreds are enough.
        config: settings of the calibrations.
        progress: show a bar.
        longest: the most sites that follow each other to be looked at as one convolution too; 1 is none.
        partial: as for `importance`.
        drop: whether to look at what dropping does too, of those blocks that can be merged and dropped.
        held: other images, unlabelled, to take the divergence on; default the same. With a hundred images to calibrate
            on, what they say of themselves is too good.
    Returns:
        As from a search, with a mask for every k; `m`, `runs`, `dropped` are mean Kullback-Leibler divergences (nats).
    """
    sites.check_k(len(sites.always_kept))
    if not longest >= 1:
        raise BadConfig(f"longest: expected 1 or more, found {longest}")
    config = config or Calibrate()
    seen = images if held is None else held
    expected = logits_of(model, seen, config.batch_size)

    def worse(plan: Plan) -> float:
        small = calibrate(model, plan, images, config, progress=False).model
        return divergence(logits_of(small, seen, config.batch_size), expected)

    about = f"ranking of {sites.names}, {len(images)} images, {sites.image_size}, {config}, {float(expected.sum()):.6e}"
    _, found = _of_each(model, sites, longest, drop, worse, "rank" if progress else "", partial, about)
    return replace(found, unit="nats of divergence")


def divergence(logits: Tensor, expected: Tensor) -> float:
    """Mean Kullback-Leibler divergence of a softmax from the expected one, both from logits (N, classes), in nats."""
    mine, theirs = logits.double().log_softmax(1), expected.double().log_softmax(1)
    return F.kl_div(mine, theirs, log_target=True, reduction="batchmean").item()


def agreement(logits: Tensor, expected: Tensor) -> float:
    """Share of images with the same top-1, 0 to 1: stands for accuracy where there are no labels."""
    return (logits.argmax(1) == expected.argmax(1)).float().mean().item()


def _of_each(
    model: nn.Module,
    sites: Sites,
    longest: int,
    drop: bool,
    value: Callable[[Plan], float],
    title: str,
    partial: Path | None,
    about: str,
) -> tuple[float, Found]:
    """The value of the network as it is, and of each plan that removes or drops one site, or merges one run.

    With the same recovery for all, what the recovery alone does counts for nothing in a difference.
    """
    of = {
        "about": about,
        "network": structure_of(model),
        "weights": sum(float(value.sum()) for value in model.state_dict().values()),
    }
    kept = records.read_json(partial) if partial is not None and partial.exists() else {}
    found: dict[str, float] = kept["values"] if kept.get("of") == of else {}
    joined = ["+".join(names) for names, _ in possible_runs(model, sites, longest)]
    blocks = droppable(model, sites.mergeable, sites.image_size) if drop else ()
    plans = {"": Plan(sites.mask(sites.names)), **{name: Plan(_without(sites, [name])) for name in sites.mergeable}}
    plans |= {run: Plan(_without(sites, run.split("+")), [run.split("+")]) for run in joined}
    plans |= {f"{name} dropped": Plan(_without(sites, [name]), dropped=[name]) for name in blocks}
    for key, plan in tqdm(plans.items(), title, leave=False, disable=None if title else True):
        if key not in found:
            found[key] = value(plan)
            if partial is not None:
                records.write_json(partial, {"of": of, "values": found})
    own = found[""]
    m = {name: found[name] for name in sites.mergeable}
    runs = {run: found[run] for run in joined}
    dropped = {name: found[f"{name} dropped"] for name in blocks}
    return own, Found(
        m,
        sites.always_kept,
        sites.names,
        runs=runs,
        dropped=dropped,
        network=structure_of(model),
        image_size=sites.image_size,
    )


def _without(sites: Sites, names: Sequence[str]) -> Mask:
    return sites.mask([name for name in sites.names if name not in names])
