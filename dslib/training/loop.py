"""The one training loop. It knows nothing of sites: searching and finetuning differ in their loss and hooks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..data import Batch, Data
from . import processes
from .engine import Average, launched
from .feeding import Feed
from .settings import Train, lr_at
from .state import History, Place, TrainingState
from .watching import Log, Pulse, Reporter, Stopping


class Trained(NamedTuple):
    """A trained network in eval, and one row an epoch."""

    model: nn.Module
    history: History


Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


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
    log: Log | None = None,
) -> History:
    """Train `model` in place, on its own device, and return one row an epoch.

    Several processes (`processes.start`) train it together. A run that was stopped at any step and is started again
    with the same arguments goes on from its last state, and ends as if it had not been stopped: every step's
    order, augmentation and random numbers depend on the seed, the epoch and the step only. PyTorch's own generators
    are put back.

    Args:
        model: (N, 3, H, W) -> (N, classes).
        data: what to train on.
        loss: (model, images, labels) -> scalar; with mixup the labels are probabilities (N, classes).
        config: the settings.
        before_step: called with the progress (0 to 1) before each step.
        after_epoch: called with the number of epochs done, in every process; what it returns joins the row. With
            `ema` the network then holds the average.
        parameters: SGD groups; a group's `lr_scale` multiplies the learning rate. Default: all, see `groups`.
        checkpoint: where to keep the state, see `save_minutes`; SIGTERM and SIGINT then save it too.
        about: whatever else decides the outcome (a teacher, a cost table); a state of something else is refused.
        title: of the progress bar, the history's file and messages.
        log: where to tell how it goes.
    Raises:
        DslibError: if the loss is not finite; names epoch and batch. The last state stays.
        BadConfig: if the state under `checkpoint` is of other settings, or cannot be written.
        KeyboardInterrupt: after SIGTERM or SIGINT.
    """
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        optimizer = torch.optim.SGD(
            list(parameters or groups(model, config)), config.lr, config.momentum, nesterov=config.momentum > 0
        )
        trainer = Trainer(model, optimizer, Feed(data, config, device), loss, config, before_step, after_epoch)
        if checkpoint is not None:
            trainer.resume(checkpoint, data, about)
        return trainer.run(title, log or Log())


@dataclass
class Trainer:
    """One training: `run` makes epochs of steps, and saves after each epoch, every so many minutes and when stopped."""

    model: nn.Module
    optimizer: torch.optim.SGD
    feed: Feed
    loss: Loss
    config: Train
    before_step: Callable[[float], None] | None = None
    after_epoch: Callable[[int], dict[str, Any]] | None = None

    def __post_init__(self) -> None:
        """Make what trains: the network in its precision, its average, the place that the training is at."""
        self.fabric = launched(self.model, self.config.precision)
        network = torch.compile(self.model) if self.config.compile else self.model
        self.network, self.optimizer = self.fabric.setup(network, self.optimizer, move_to_device=False)
        self.scaler = getattr(self.fabric.strategy.precision, "scaler", None)  # of float16's gradients
        self.average = Average(self.model, self.config.ema) if self.config.ema else None
        self.state: TrainingState | None = None
        self.place, self.steps = Place(), self.feed.steps * self.config.epochs

    @property
    def done(self) -> int:
        """Steps that are done, of all epochs."""
        return self.place.epoch * self.feed.steps + self.place.step

    def resume(self, path: Path, data: Data, about: str) -> None:
        """Keep the state under `path`, and begin with what stands there."""
        own = self.model, self.optimizer, self.average, self.scaler
        self.state = TrainingState(path, *own, data, self.config, about)
        self.place = self.state.resume()
        if self.before_step and self.place.step == self.feed.steps:  # only this epoch's evaluation is left
            self.before_step((self.done - 1) / self.steps)

    def run(self, title: str, log: Log) -> History:
        """All epochs that are not done yet; the network then holds the average, if there is one."""
        self.pulse = Pulse(title, self.config.lr, self.feed.device, gradients=self.scaler is None)
        self.stopping = Stopping(active=self.state is not None)
        self.reporter = Reporter(log, title, self.config, self.feed, self.place.history, self.done)
        with self.stopping, closing(self.reporter):
            while self.place.epoch < self.config.epochs:
                self.epoch()
        if self.average is not None:
            self.average.settle()
        return self.place.history

    def epoch(self) -> None:
        """The steps that are left of an epoch, and its evaluation; a state is saved after each of the two."""
        self.began, self.saved = time.perf_counter() - self.place.seconds, time.monotonic()
        self.pulse.total = self.place.total
        self._to_train_mode()
        self.stopping.stepping = True
        for micros in self.reporter.waiting(self.feed.epoch(self.place.epoch, self.place.step)):
            self.step(micros)
            self.reporter.step()
            if self.pulse.stop or self.pulse.save:
                self.save()
            if self.pulse.stop:
                raise KeyboardInterrupt
        self.stopping.stepping = False
        self.pulse.flush()
        processes.broadcast([*self.model.buffers(), *(self.average.tensors.values() if self.average else [])])
        self.save()
        self._heed()
        seconds = time.perf_counter() - self.began
        row = {"epoch": self.place.epoch + 1, "loss": self.pulse.total / self.feed.steps, "seconds": seconds}
        with self.average.inside() if self.average else nullcontext():
            row |= self.after_epoch(self.place.epoch + 1) if self.after_epoch else {}
        self.place = Place(self.place.epoch + 1, history=[*self.place.history, row])
        self.began, self.pulse.total = time.perf_counter(), 0.0
        self.save()
        self.reporter.epoch(self.place.history)
        self._heed()

    def step(self, micros: list[Batch]) -> None:
        """One step on its micro-batches."""
        config, place, progress = self.config, self.place, self.done / self.steps
        torch.manual_seed(_seed_of(config, place))
        for group in self.optimizer.param_groups:
            group["lr"] = lr_at(progress, config) * group.get("lr_scale", 1.0)
        if self.before_step:
            self.before_step(progress)
        value = self._backward(micros)
        norm = self.fabric.clip_gradients(self.network, self.optimizer, max_norm=config.clip, error_if_nonfinite=False)
        due = time.monotonic() - self.saved > 60 * config.save_minutes
        self.pulse.beat(place.epoch, place.step, value, norm, self.stopping.wanted, due)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update()
        place.step += 1

    def save(self) -> None:
        """Write the state, if one is kept; a signal waits meanwhile."""
        if self.state is not None:
            self.pulse.flush()
            self.place.total, self.place.seconds = self.pulse.total, time.perf_counter() - self.began
            with self.stopping.held():
                self.state.save(self.place)
                processes.wait()
        self.pulse.save, self.saved = False, time.monotonic()

    def _backward(self, micros: list[Batch]) -> Tensor:
        """Add the gradients of all micro-batches; their mean loss, ()."""
        value = torch.zeros((), device=self.feed.device)
        for i, (images, labels) in enumerate(micros):
            with self.fabric.no_backward_sync(self.network, enabled=i + 1 < len(micros)):
                with self.fabric.autocast():  # a teacher too
                    part = self.loss(self.network, images, labels) / len(micros)
                self.fabric.backward(part)
            value += part.detach()
        return value

    def _heed(self) -> None:
        """End the training if any process was told to."""
        if processes.any_rank(self.stopping.wanted):
            raise KeyboardInterrupt

    def _to_train_mode(self) -> None:
        self.model.train()
        if self.config.freeze_batchnorm:
            for module in self.model.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()


def cross_entropy(label_smoothing: float = 0.0) -> Loss:
    """A loss for `train`: the network's cross-entropy with labels."""

    def loss(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(network(images), labels, label_smoothing=label_smoothing)

    return loss


def groups(model: nn.Module, config: Train) -> list[dict[str, Any]]:
    """SGD groups of a network's trainable parameters: with weight decay (two or more dimensions) and without."""
    own = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in own if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in own if p.ndim <= 1], "weight_decay": 0.0},
    ]


def _seed_of(config: Train, place: Place) -> int:
    """Of a step's dropout, in this process."""
    return (((config.seed * 100_003 + place.epoch) * 1_000_003 + place.step) * 1_009 + processes.rank()) % 2**63
