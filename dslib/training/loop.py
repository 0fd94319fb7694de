"""The one training loop. It knows nothing of sites: searching and finetuning differ in their loss and hooks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..data import Batch, Data
from . import processes
from .engine import Average, Engine
from .feeding import Feed
from .settings import Train, lr_at
from .state import History, Place, Snapshots
from .watching import Board, Enough, Log, Meter, Pulse, Stopping, write_history


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
    order, augmentation and random numbers depend on the seed, the epoch and the step only.

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
    log, device = log or Log(), next(model.parameters()).device
    optimizer = torch.optim.SGD(
        list(parameters or groups(model, config)), config.lr, config.momentum, nesterov=config.momentum > 0
    )
    engine = Engine(model, optimizer, config.precision, config.compile)
    feed = Feed(data, config, device)
    average = Average(model, config.ema) if config.ema else None
    snapshots = None
    place = Place()
    if checkpoint is not None:
        snapshots = Snapshots(checkpoint, model, optimizer, average, engine.scaler, data, config, about)
        place = snapshots.resume()
    steps, ended = feed.steps * config.epochs, [time.perf_counter()]
    pulse = Pulse(title, config.lr, device, gradients=engine.scaler is None)

    def step(micros: list[Batch]) -> None:
        progress = (place.epoch * feed.steps + place.step) / steps
        torch.manual_seed(_seed_of(config, place))
        for group in optimizer.param_groups:
            group["lr"] = lr_at(progress, config) * group.get("lr_scale", 1.0)
        if before_step:
            before_step(progress)
        value = torch.zeros((), device=device)
        for i, (images, labels) in enumerate(micros):
            with engine.alone(i + 1 < len(micros)), engine.autocast():
                part = loss(engine.network, images, labels) / len(micros)
            with engine.alone(i + 1 < len(micros)):
                engine.backward(part)
            value += part.detach()
        due = time.monotonic() - saved > 60 * config.save_minutes
        pulse.beat(place.epoch, place.step, value, engine.clip(config.clip), stopping.wanted, due)
        engine.step()
        if average is not None:
            average.update()
        place.step += 1

    def save() -> None:
        if snapshots is not None:
            pulse.flush()
            place.total, place.seconds = pulse.total, time.perf_counter() - began
            with stopping.held():
                snapshots.save(place)
                processes.wait()

    done = place.epoch * feed.steps + place.step
    if before_step and place.step == feed.steps:  # only this epoch's evaluation is left
        before_step((done - 1) / steps)
    write_history(log, title, place.history)
    with (
        Stopping(active=checkpoint is not None) as stopping,
        closing(Meter(title, steps * config.batch_size, done * config.batch_size, log, feed.remedy)) as meter,
        closing(Board(log, title, place.epoch)) as board,
    ):
        while place.epoch < config.epochs:
            began, saved, pulse.total = time.perf_counter() - place.seconds, time.monotonic(), place.total
            _train_mode(model, config)
            stopping.stepping = True
            for micros in meter.waiting(feed.epoch(place.epoch, place.step)):
                step(micros)
                meter.step(config.batch_size)
                if log.steps is not None:
                    ended.append(time.perf_counter())
                    if len(ended) > log.steps:
                        raise Enough(ended, steps)
                if pulse.stop or pulse.save:
                    save()
                    saved, pulse.save = time.monotonic(), False
                if pulse.stop:
                    raise KeyboardInterrupt
            stopping.stepping = False
            pulse.flush()
            engine.share([*model.buffers(), *(average.tensors.values() if average is not None else [])])
            save()
            if processes.any_rank(stopping.wanted):
                raise KeyboardInterrupt
            row = {"epoch": place.epoch + 1, "loss": pulse.total / feed.steps, "seconds": time.perf_counter() - began}
            with average.inside() if average is not None else nullcontext():
                row |= after_epoch(place.epoch + 1) if after_epoch else {}
            place = Place(place.epoch + 1, history=[*place.history, row])
            pulse.total, began = 0.0, time.perf_counter()
            save()
            board.add(row)
            write_history(log, title, place.history)
            log.say(meter.told(config.epochs, row))
            if processes.any_rank(stopping.wanted):
                raise KeyboardInterrupt
    if average is not None:
        average.settle()
    return place.history


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


def _train_mode(model: nn.Module, config: Train) -> None:
    model.train()
    if config.freeze_batchnorm:
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.eval()


def _seed_of(config: Train, place: Place) -> int:
    """Of a step's dropout, in this process."""
    return (((config.seed * 100_003 + place.epoch) * 1_000_003 + place.step) * 1_009 + processes.rank()) % 2**63
