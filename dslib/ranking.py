"""What each site matters: how much worse the network gets when it alone is removed, with labels or without.

A ranking measures such importances, a search learns them; masks for every k follow from either (`Importances`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
from .errors import BadConfig, BadRecord, MaskMismatch, Settings, ranged
from .finetuning import Finetune, finetune
from .shrinking import possible_runs, shrink
from .sites import Mask, Plan, Sites
from .training import loss_on, recalibrate_batchnorm

if TYPE_CHECKING:
    import pandas as pd


_KEYS = {"scores": "m", "base_loss": "own", "sites": "order"}  # what files call them


@dataclass(frozen=True)
class Importances:
    """What a search learnt, or a ranking measured.

    Args:
        scores: site name -> importance, for the sites that can be removed.
        always_kept: sites that cannot be merged.
        sites: all site names, in the network's order.
        history: one row an epoch; `kept` names the sites whose gates were open, `m` the importances.
        runs: sites that follow each other, joined by '+' -> importance of all of them, merged into one convolution.
        dropped: site name -> importance of its whole block, for those that can be merged and may be dropped.
        unit: what importances are, where their sum means something; '' if they only order the sites.
        network: structure that they are of, see `structure_of`; '' if unknown.
        image_size: side in pixels of the images that they are of; 0 if unknown.
        base_loss: the network's own loss, to which importances in nats of cross-entropy add.
    """

    scores: dict[str, float]
    always_kept: tuple[str, ...]
    sites: tuple[str, ...]
    history: list[dict[str, Any]] = field(default_factory=list)
    runs: dict[str, float] = field(default_factory=dict)
    dropped: dict[str, float] = field(default_factory=dict)
    unit: str = ""
    network: str = ""
    image_size: int = 0
    base_loss: float = 0.0

    def mask(self, k: int) -> Mask:
        """The mask that keeps k sites: the most important ones (and those that cannot be merged).

        Raises:
            MaskMismatch: if k is below the number of sites that cannot be merged, or above that of all sites.
        """
        low, high = len(self.always_kept), len(self.sites)
        if not low <= k <= high:
            raise MaskMismatch(f"k is the number of sites kept: expected {low} to {high}, found {k}")
        ranked = sorted(self.scores, key=lambda name: -self.scores[name])
        kept = {*self.always_kept, *ranked[: k - low]}
        return Mask({name: name in kept for name in self.sites})

    @property
    def frame(self) -> pd.DataFrame:
        """One row a site, with its importance and its rank (1 is kept longest)."""
        import pandas as pd

        frame = pd.DataFrame({"m": self.scores})
        frame["rank"] = frame["m"].rank(ascending=False, method="first").astype(int)
        return frame

    def as_json(self) -> dict[str, Any]:
        """What files keep of it; scores are called `m` there, the base loss `own`, the sites `order`."""
        return {_KEYS.get(name, name): value for name, value in asdict(self).items()}

    def save(self, path: Path | str) -> Path:
        """Write it as JSON."""
        return records.write_json(path, self.as_json())

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Importances:
        """From what `as_json` gives.

        Raises:
            ValueError: if importances are no numbers, or of sites that it does not list.
        """
        fields = dict(content) | {key: tuple(content[key]) for key in ("always_kept", "order")}
        found = cls(**{name: fields.pop(key) for name, key in _KEYS.items() if key in fields}, **fields)
        listed = [*found.scores, *found.dropped, *found.always_kept, *(n for run in found.runs for n in run.split("+"))]
        values = (found.base_loss, *found.scores.values(), *found.runs.values(), *found.dropped.values())
        if not set(listed) <= set(found.sites) or not all(isinstance(value, int | float) for value in values):
            raise ValueError("its importances are no numbers, or of other sites than it lists")
        return found

    @classmethod
    def load(cls, path: Path | str) -> Importances:
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
class Importance(Settings):
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

    count: int = ranged(1024, "2 or more (BatchNorm needs them)")
    longest: int = ranged(1, "1 or more")
    drop: bool = False
    calibrate: Calibrate | None = None
    finetune: Finetune | None = None
    seed: int = 0


def importance(
    model: nn.Module,
    data: Data,
    sites: Sites,
    config: Importance | None = None,
    progress: bool = True,
    partial: Path | None = None,
) -> Importances:
    """By how much the loss rises when the activations of a site (or a run of sites) go, or a block, and nothing else.

    Args:
        model: trained for the data, on the device to run on; left as it is.
        data: only its training split is used: one part to recover on, another for the loss.
        sites: of the model.
        config: the settings.
        progress: show a bar.
        partial: where each value is kept as it comes, to go on from after an interruption.
    Returns:
        As from a search, with a mask for every k; differences of cross-entropies, in nats.
    Source: the importance of Kim et al., ICML 2023, with seconds of recovery in place of an epoch of finetuning; that
    layers may go as well as be merged: Kim et al., LayerMerge, ICML 2024.
    """
    config = config or Importance()
    sites.check_k(len(sites.always_kept))
    recover, held = halves(data.train, config.count, config.seed)
    if len(recover) < 2:
        raise BadConfig(f"count: expected at least two images to recover on, found {len(recover)}")

    def loss(plan: Plan) -> float:
        return loss_on(_recovered(model, plan, data, recover, held, sites.image_size, config), held)

    settings = replace(config, longest=1, drop=False)  # more or less of them are the same values
    about = f"importance of {sites.names}, {data.name}, {len(data.train)} images, {data.image_size}, {settings}"
    plans = _each_alone(model, sites, config.longest, config.drop)
    values = _values(plans, loss, "importance" if progress else "", partial, _identity(model, about))
    return _importances(model, sites, plans, values, "nats of cross-entropy", base_loss=values[""])


def _recovered(
    model: nn.Module, plan: Plan, data: Data, recover: Split, held: Split, image_size: int, config: Importance
) -> nn.Module:
    """The network with the plan carried out, after seconds of recovery."""
    if config.calibrate is not None:
        small = calibrate(model, plan, recover, config.calibrate, progress=False).model
    else:
        small = shrink(model, plan, image_size=image_size)
        size = min(64, len(recover))
        whole = torch.arange(len(recover) // size * size)
        recalibrate_batchnorm(small, (images for images, _ in recover.batches(size, whole)))
    if config.finetune is not None:
        small = finetune(small, replace(data, train=recover, val=held), model, config.finetune).model
    return small


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
) -> Importances:
    """Every removable site's importance: the divergence from the original network if it alone is calibrated away.

    Args:
        model: the network; left as it is.
        sites: of the model.
        images: unlabelled, as for `calibrate`; some hundreds are enough.
        config: settings of the calibrations.
        progress: show a bar.
        longest, drop: as in `Importance`.
        partial: as for `importance`.
        held: other images, unlabelled, to take the divergence on; default the same. With a hundred images to calibrate
            on, what they say of themselves is too good.
    Returns:
        As from a search, with a mask for every k; mean Kullback-Leibler divergences, in nats.
    """
    sites.check_k(len(sites.always_kept))
    if longest < 1:
        raise BadConfig(f"longest: expected 1 or more, found {longest}")
    config = config or Calibrate()
    seen = images if held is None else held
    expected = logits_of(model, seen, config.batch_size)

    def worse(plan: Plan) -> float:
        small = calibrate(model, plan, images, config, progress=False).model
        return divergence(logits_of(small, seen, config.batch_size), expected)

    about = f"ranking of {sites.names}, {len(images)} images, {sites.image_size}, {config}, {float(expected.sum()):.6e}"
    plans = _each_alone(model, sites, longest, drop)
    values = _values(plans, worse, "rank" if progress else "", partial, _identity(model, about))
    return _importances(model, sites, plans, values, "nats of divergence")


def divergence(logits: Tensor, expected: Tensor) -> float:
    """Mean Kullback-Leibler divergence of a softmax from the expected one, both from logits (N, classes), in nats."""
    mine, theirs = logits.double().log_softmax(1), expected.double().log_softmax(1)
    return F.kl_div(mine, theirs, log_target=True, reduction="batchmean").item()


def agreement(logits: Tensor, expected: Tensor) -> float:
    """Share of images with the same top-1, 0 to 1: stands for accuracy where there are no labels."""
    return (logits.argmax(1) == expected.argmax(1)).float().mean().item()


def _each_alone(model: nn.Module, sites: Sites, longest: int, drop: bool) -> dict[str, Plan]:
    """The plan that changes nothing (''), and of each site and run the one that removes it alone, or drops it."""
    runs = ["+".join(names) for names, _ in possible_runs(model, sites, longest)]
    blocks = droppable(model, sites.mergeable, sites.image_size) if drop else ()

    def without(*names: str) -> Mask:
        return sites.mask([name for name in sites.names if name not in names])

    plans = {"": Plan(without())} | {name: Plan(without(name)) for name in sites.mergeable}
    plans |= {run: Plan(without(*run.split("+")), [run.split("+")]) for run in runs}
    return plans | {f"{name} dropped": Plan(without(name), dropped=[name]) for name in blocks}


def _identity(model: nn.Module, about: str) -> dict[str, Any]:
    """What values kept in a file must be of, to be gone on with."""
    weights = sum(float(value.sum()) for value in model.state_dict().values())
    return {"about": about, "network": structure_of(model), "weights": weights}


def _values(
    plans: Mapping[str, Plan], value: Callable[[Plan], float], title: str, partial: Path | None, of: dict[str, Any]
) -> dict[str, float]:
    """The value of each plan, the network's as it is among them.

    With the same recovery for all, what the recovery alone does counts for nothing in a difference.
    """
    kept = records.read_json(partial) if partial is not None and partial.exists() else {}
    found: dict[str, float] = kept["values"] if kept.get("of") == of else {}
    for key, plan in tqdm(plans.items(), title, leave=False, disable=None if title else True):
        if key not in found:
            found[key] = value(plan)
            if partial is not None:
                records.write_json(partial, {"of": of, "values": found})
    return found


def _importances(
    model: nn.Module,
    sites: Sites,
    plans: Mapping[str, Plan],
    values: Mapping[str, float],
    unit: str,
    base_loss: float = 0.0,
) -> Importances:
    """How much more each plan's value is than the base's."""
    scores, runs, dropped = dict[str, float](), dict[str, float](), dict[str, float]()
    for key, plan in plans.items():
        more = values[key] - base_loss
        if plan.runs:
            runs[key] = more
        elif plan.dropped:
            dropped[plan.dropped[0]] = more
        elif key:
            scores[key] = more
    kind = {"unit": unit, "network": structure_of(model)}
    return Importances(
        scores,
        sites.always_kept,
        sites.names,
        [],
        runs,
        dropped,
        **kind,
        image_size=sites.image_size,
        base_loss=base_loss,
    )
