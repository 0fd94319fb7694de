"""What a network says of a split: logits and accuracies, for any number of processes; BatchNorms' statistics."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from functools import partial

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from ..algebra import NO_PADDING, InteriorBatchNorm2d
from ..data import FolderSplit, Split
from . import processes


@torch.inference_mode()
def predict(model: nn.Module, split: Split | FolderSplit, batch_size: int = 64, title: str = "evaluate") -> Tensor:
    """The network's logits in eval over a split, (N, classes) float32 on the CPU; its train flags are put back.

    Several processes take its batches in turns, each image once, and all get all logits.
    """
    device, training = next(model.parameters()).device, [module for module in model.modules() if module.training]
    model.eval()
    batches = torch.arange(len(split)).split(batch_size)
    mine = batches[processes.rank() :: processes.count()]
    order = torch.cat(mine or batches[:1])  # who has none computes the first again
    hidden = True if processes.rank() else None
    steps = tqdm(split.batches(batch_size, order), title, len(mine), leave=False, disable=hidden)
    found = torch.cat([model(images.to(device)).float().cpu() for images, _ in steps])
    for module in training:
        module.training = True
    logits = torch.zeros(len(split), found.shape[1])
    if mine:
        logits[order] = found
    return processes.all_reduce_sum(logits)


def evaluate(model: nn.Module, split: Split | FolderSplit, batch_size: int = 64) -> float:
    """Top-1 accuracy over a split, 0 to 1."""
    return top1(predict(model, split, batch_size), split)


def top1(logits: Tensor, split: Split | FolderSplit) -> float:
    """Top-1 accuracy of logits (N, classes) over a split of N images, 0 to 1."""
    return (logits.argmax(1) == labels_of(split)).float().mean().item()


def loss_of(logits: Tensor, split: Split | FolderSplit) -> float:
    """Mean cross-entropy (nats) of logits (N, classes) over a split of N images."""
    return F.cross_entropy(logits, labels_of(split)).item()


def loss_on(model: nn.Module, split: Split | FolderSplit) -> float:
    """Mean cross-entropy (nats) of a network over a split."""
    return loss_of(predict(model, split), split)


def labels_of(split: Split | FolderSplit) -> Tensor:
    """The labels of a split, (N,) int64."""
    return split.labels if isinstance(split, Split) else torch.tensor(split.folder.targets)


@torch.no_grad()
def recalibrate_batchnorm(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Gather all BatchNorms' statistics anew, in place: the mean over batches of images; the network is in eval after.

    Args:
        model: the network; weights and BatchNorms' factors stay.
        batches: each (N, C, H, W), N two or more.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    momenta, device = [norm.momentum for norm in norms], next(model.parameters()).device
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
        norm.train()
    for images in batches:
        model(images.to(device))
    model.eval()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


@torch.no_grad()
def batchnorm_drift(model: nn.Module, images: Tensor) -> pd.DataFrame:
    """How far the inputs of each BatchNorm are, in eval, from the statistics that it has stored.

    Args:
        model: the network; left as it is, its train flags too.
        images: (N, 3, H, W).

    Returns:
        One row a BatchNorm of maps, in the order of the calls (the last one of each): `mean`, the distance of channels'
        means from the stored ones, in stored standard deviations (median over channels), and `spread`, the standard
        deviation over the stored one (geometric mean over channels). 0 and 1 where nothing drifts.
    """
    found: dict[str, dict[str, float]] = {}

    def look(name: str, norm: _BatchNorm, given: tuple[Tensor, ...]) -> None:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        ring = norm.ring if type(norm) is InteriorBatchNorm2d else NO_PADDING  # hoisted padding is not counted
        var, mean = torch.var_mean(F.pad(given[0], [-side for side in ring]), (0, 2, 3))
        stored = (norm.running_var + norm.eps).sqrt()
        found[name] = {
            "mean": ((mean - norm.running_mean) / stored).abs().median().item(),
            "spread": ((var + norm.eps).sqrt() / stored).log().mean().exp().item(),
        }

    model = copy.deepcopy(model).eval()
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d) and module.track_running_stats:
            module.register_forward_pre_hook(partial(look, name))
    model(images.to(next(model.parameters()).device))
    return pd.DataFrame.from_dict(found, orient="index", columns=["mean", "spread"])
