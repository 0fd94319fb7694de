"""The one training loop. It knows nothing of sites: searching and finetuning differ in their loss and hooks."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from .checkpoints import digest, load_tensors, save_tensors
from .datasets import Data
from .errors import BadRecord, DslibError, require
from .splits import FolderSplit, Split, check_batch_size

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
History = list[dict[str, Any]]


@dataclass(frozen=True)
class Train:
    """Settings of one training; defaults are the paper's on ImageNet (SGD with Nesterov momentum, cosine).

    Args:
        epochs: passes over the training split.
        lr: peak learning rate per 256 images of batch.
        batch_size: images a step.
        warmup: epochs over which the learning rate rises linearly from zero.
        final_lr: learning rate at the end.
        momentum: of SGD.
        weight_decay: on weights of two or more dimensions; never on BatchNorm, biases or gates.
        label_smoothing: of the cross-entropy with labels.
        clip: largest gradient norm.
        augment: whether training images are augmented as their dataset says.
        freeze_batchnorm: whether BatchNorm keeps its statistics and normalises by them, as in eval.
        seed: of data order, augmentation and dropout.
    """

    epochs: int = 180
    lr: float = 0.1
    batch_size: int = 256
    warmup: float = 0.0
    final_lr: float = 5e-6
    momentum: float = 0.9
    weight_decay: float = 1e-5
    label_smoothing: float = 0.1
    clip: float = 5.0
    augment: bool = True
    freeze_batchnorm: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        require(self.epochs >= 0, f"epochs: expected 0 or more, found {self.epochs}")
        require(
            self.batch_size >= 2,
            f"batch_size: expected 2 or more (BatchNorm needs them), found {self.batch_size}",
        )
        require(self.lr > 0, f"lr: expected more than 0, found {self.lr}")
        require(0 <= self.label_smoothing < 1, f"label_smoothing: expected 0 to 1, found {self.label_smoothing}")
        require(self.clip > 0, f"clip: expected more than 0, found {self.clip}")
        require(0 <= self.momentum < 1, f"momentum: expected 0 to 1, found {self.momentum}")
        for name in ("warmup", "weight_decay", "final_lr"):
            require(getattr(self, name) >= 0, f"{name}: expected 0 or more, found {getattr(self, name)}")


def lr_at(progress: float, config: Train) -> float:
    """The learning rate at `progress` (0 to 1) through training: linear warm-up, then cosine."""
    peak = config.lr * config.batch_size / 256
    warm = config.warmup / max(config.epochs, 1)
    if progress < warm:
        return peak * progress / warm
    done = (progress - warm) / max(1 - warm, 1e-9)
    return config.final_lr + (peak - config.final_lr) * (1 + math.cos(math.pi * min(done, 1.0))) / 2


def train(
    model: nn.Module,
    data: Data,
    loss: Loss,
    config: Train,
    *,
    before_step: Callable[[float], None] | None = None,
    after_epoch: Callable[[int], dict[str, Any]] | None = None,
    parameters: Iterable[dict[str, Any]] | None = None,
    checkpoint: Path | None = None,
    about: str = "",
    title: str = "train",
) -> History:
    """Train `model` in place, on its own device, and return one row an epoch.

    A run that was stopped and is started again with the same arguments goes on from the last whole epoch, and
    ends as if it had not been stopped: the data order and the random numbers of an epoch depend on the seed and the
    epoch only.

    Args:
        model: (N, 3, H, W) -> (N, classes).
        data: what to train on.
        loss: (model, images, labels) -> scalar.
        config: the settings.
        before_step: called with the progress (0 to 1) before each step.
        after_epoch: called with the number of epochs done; what it returns joins the row.
        parameters: SGD groups; a group's `lr_scale` multiplies the learning rate. Default: all, see `groups`.
        checkpoint: where to keep the state after every epoch.
        about: whatever else decides the outcome (a teacher, a cost table); a checkpoint of something else is not used.
        title: of the progress bar.
    Raises:
        DslibError: if the loss is not finite; names epoch and batch. The last checkpoint stays.
    """
    check_batch_size(config.batch_size, data.train)
    device = next(model.parameters()).device
    optimizer = torch.optim.SGD(
        list(parameters or groups(model, config)), config.lr, config.momentum, nesterov=config.momentum > 0
    )
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    identity = {"config": asdict(config), "about": _identity(model, data, about)} if checkpoint else {}
    history = _resume(checkpoint, model, optimizer, identity) if checkpoint else []
    batches = len(data.train) // config.batch_size
    for epoch in range(len(history), config.epochs):
        started, total = time.perf_counter(), 0.0
        model.train()
        if config.freeze_batchnorm:
            for module in model.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        for i, (images, labels) in enumerate(_epoch(data.train, epoch, config, f"{title} {epoch + 1}/{config.epochs}")):
            progress = (epoch * batches + i) / (batches * config.epochs)
            _set_lr(optimizer, lr_at(progress, config))
            if before_step:
                before_step(progress)
            value = loss(model, images.to(device), labels.to(device))
            number = value.item()
            if not math.isfinite(number):
                raise DslibError(f"{title}: the loss is {number} at epoch {epoch + 1}, batch {i + 1}: "
                                 f"lower the learning rate (lr {config.lr:g})")  # fmt: skip
            optimizer.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(trained, config.clip)
            optimizer.step()
            total += number
        row = {"epoch": epoch + 1, "loss": total / batches, "seconds": time.perf_counter() - started}
        history.append({**row, **(after_epoch(epoch + 1) if after_epoch else {})})
        if checkpoint:
            _save(checkpoint, model, optimizer, {**identity, "history": history})
    return history


def groups(model: nn.Module, config: Train) -> list[dict[str, Any]]:
    """SGD groups of a network's trainable parameters: with weight decay (two or more dimensions) and without."""
    own = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in own if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in own if p.ndim <= 1], "weight_decay": 0.0},
    ]


@torch.inference_mode()
def predict(model: nn.Module, split: Split | FolderSplit, batch_size: int = 64, title: str = "evaluate") -> Tensor:
    """The network's logits in eval over a split, (N, classes) float32 on the CPU; its train flags are put back."""
    device, training = next(model.parameters()).device, [module for module in model.modules() if module.training]
    model.eval()
    steps = tqdm(split.batches(batch_size), title, math.ceil(len(split) / batch_size), leave=False, disable=None)
    logits = torch.cat([model(images.to(device)).float().cpu() for images, _ in steps])
    for module in training:
        module.training = True
    return logits


def evaluate(model: nn.Module, split: Split | FolderSplit, batch_size: int = 64) -> float:
    """Top-1 accuracy over a split, 0 to 1."""
    return top1(predict(model, split, batch_size), split)


def top1(logits: Tensor, split: Split | FolderSplit) -> float:
    """Top-1 accuracy of logits (N, classes) over a split of N images, 0 to 1."""
    return (logits.argmax(1) == labels_of(split)).float().mean().item()


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


def _epoch(split: Split | FolderSplit, epoch: int, config: Train, title: str) -> Iterable[tuple[Tensor, Tensor]]:
    """One shuffled pass in whole batches; its random numbers depend on seed and epoch only."""
    seed = config.seed * 100_003 + epoch
    torch.manual_seed(seed)
    whole = len(split) // config.batch_size * config.batch_size
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))[:whole]
    batches = split.batches(config.batch_size, order, config.augment)
    return tqdm(batches, title, whole // config.batch_size, leave=False, disable=None)


def _identity(model: nn.Module, data: Data, about: str) -> str:
    """A hash of the network (structure and values before training), the data's name and size, and `about`."""
    whole = hashlib.sha256(repr(model).encode())
    for part in (digest(model.state_dict()), data.name, str(len(data.train)), str(data.image_size), about):
        whole.update(part.encode())
    return whole.hexdigest()


def _set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def _save(path: Path, model: nn.Module, optimizer: torch.optim.SGD, meta: dict[str, Any]) -> None:
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        if state.get("momentum_buffer") is not None:
            tensors[f"momentum.{index}"] = state["momentum_buffer"]
    save_tensors(path, tensors, meta)


def _resume(path: Path, model: nn.Module, optimizer: torch.optim.SGD, identity: dict[str, Any]) -> History:
    """Take up the state in `path`, if it is there, whole, and of the same training; returns its history."""
    if not path.exists():
        return []
    try:
        tensors, meta = load_tensors(path)
        same = all(meta.get(key) == value for key, value in identity.items())
        require(same, f"{path} is of a training with other settings, network or data", BadRecord)
    except BadRecord as error:
        print(f"warning: {error}; starting this stage again")
        return []
    state = optimizer.state_dict()
    state["state"] = {
        int(name.split(".")[1]): {"momentum_buffer": tensor}
        for name, tensor in tensors.items()
        if name.startswith("momentum.")
    }
    model.load_state_dict({n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")})
    optimizer.load_state_dict(state)
    return list(meta["history"])
