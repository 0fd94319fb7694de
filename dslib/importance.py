"""What each site matters: how much worse the network gets when it alone is removed, with labels or without."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from .blocks import structure_of
from .calibration import Calibrate, Images, calibrate, logits_of
from .datasets import Data
from .errors import require
from .finetuning import Finetune, finetune
from .masks import Plan
from .searching import Found
from .shrinking import possible_runs, shrink
from .sites import Sites
from .splits import FolderSplit, Split
from .training import labels_of, predict, recalibrate_batchnorm


@dataclass(frozen=True)
class Importance:
    """Settings of `importance`.

    Args:
        count: training images that the network recovers on, and as many others that its loss is taken on.
        longest: the most sites that follow each other to be looked at as one convolution too; 1 is none.
        calibrate: how to calibrate what is removed; None takes the activations out and gathers BatchNorm's
            statistics anew.
        finetune: how to finetune before the loss is taken; None does not.
        seed: of the choice of images.
    """

    count: int = 1024
    longest: int = 1
    calibrate: Calibrate | None = None
    finetune: Finetune | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        require(self.count >= 2, f"count: expected 2 or more (BatchNorm needs them), found {self.count}")
        require(self.longest >= 1, f"longest: expected 1 or more, found {self.longest}")


def importance(
    model: nn.Module, data: Data, sites: Sites, config: Importance | None = None, progress: bool = True
) -> Found:
    """By how much the loss rises when the activations of a site (or of a run of sites) go, and nothing else.

    Args:
        model: trained for the data, on the device to run on; left as it is.
        data: only its training split is used: one part to recover on, another for the loss.
        sites: of the model.
        config: the settings.
        progress: show a bar.
    Returns:
        As from a search, with a mask for every k; `m` and `runs` are differences of cross-entropies, in nats.
    Source: the importance of Kim et al., ICML 2023, with seconds of recovery in place of an epoch of finetuning.
    """
    config = config or Importance()
    sites.check_k(len(sites.always_kept))
    recover, held = halves(data.train, config.count, config.seed)
    size = min(64, len(recover))
    whole = torch.arange(len(recover) // size * size)

    def loss(plan: Plan) -> float:
        if config.calibrate is not None:
            small = calibrate(model, plan, recover, config.calibrate, progress=False).model
        else:
            small = shrink(model, plan, image_size=sites.image_size)
        if config.finetune is not None:
            small = finetune(small, replace(data, train=recover, val=held), model, config.finetune).model
        elif config.calibrate is None:
            recalibrate_batchnorm(small, (images for images, _ in recover.batches(size, whole)))
        return loss_on(small, held)

    before = loss(Plan(sites.mask(sites.names)))  # the same recovery, so that it counts for nothing
    found = _of_each(model, sites, config.longest, lambda plan: loss(plan) - before, "importance" if progress else "")
    return replace(found, unit="nats of cross-entropy", own=before)


def halves(train: Split | FolderSplit, count: int, seed: int) -> tuple[Split, Split]:
    """Training images to recover on, and as many others for the loss, `count` of each where there are as many."""
    part = train.first(2 * count, seed)
    half = len(part) // 2
    first, second = (replace(part, images=part.images[s], labels=part.labels[s])
                     for s in (slice(half), slice(half, None)))  # fmt: skip
    return first, second


def loss_on(model: nn.Module, held: Split) -> float:
    """Mean cross-entropy of the labels, in nats."""
    return F.cross_entropy(predict(model, held), labels_of(held)).item()


def rank(
    model: nn.Module, sites: Sites, images: Images, config: Calibrate | None = None, progress: bool = True,
    longest: int = 1,
) -> Found:  # fmt: skip
    """Every removable site's importance: the divergence from the original network if it alone is calibrated away.

    Args:
        model: the network; left as it is.
        sites: of the model.
        images: unlabelled, as for `calibrate`; some hundreds are enough.
        config: settings of the calibrations; kept blocks are not adjusted.
        progress: show a bar.
        longest: the most sites that follow each other to be looked at as one convolution too; 1 is none.
    Returns:
        As from a search, with a mask for every k; `m` and `runs` are mean Kullback-Leibler divergences, in nats.
    """
    sites.check_k(len(sites.always_kept))
    config = replace(config or Calibrate(), refit=False)
    expected = logits_of(model, images, config.batch_size)

    def worse(plan: Plan) -> float:
        small = calibrate(model, plan, images, config, progress=False).model
        return divergence(logits_of(small, images, config.batch_size), expected)

    return replace(_of_each(model, sites, longest, worse, "rank" if progress else ""), unit="nats of divergence")


def divergence(logits: Tensor, expected: Tensor) -> float:
    """Mean Kullback-Leibler divergence of a softmax from the expected one, both from logits (N, classes), in nats."""
    mine, theirs = logits.double().log_softmax(1), expected.double().log_softmax(1)
    return F.kl_div(mine, theirs, log_target=True, reduction="batchmean").item()


def agreement(logits: Tensor, expected: Tensor) -> float:
    """Share of images with the same top-1, 0 to 1: stands for accuracy where there are no labels."""
    return (logits.argmax(1) == expected.argmax(1)).float().mean().item()


def _of_each(model: nn.Module, sites: Sites, longest: int, value: Callable[[Plan], float], title: str) -> Found:
    """The value of each plan that removes one site, or merges one run, and keeps all others."""
    options = [(name,) for name in sites.mergeable] + [names for names, _ in possible_runs(model, sites, longest)]
    found = {}
    for names in tqdm(options, title, leave=False, disable=None if title else True):
        mask = sites.mask([name for name in sites.names if name not in names])
        found["+".join(names)] = value(Plan(mask, [names] if len(names) > 1 else []))
    m = {name: found.pop(name) for name in sites.mergeable}
    return Found(m, sites.always_kept, sites.names, runs=found, network=structure_of(model))
