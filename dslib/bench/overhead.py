"""What does a step of the training loop cost over a bare loop written by hand?"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..data import Split, normalise
from ..errors import BadConfig
from ..measuring import Others, Timing, tune_allocator, use_precision, wait_for
from ..models import load_model
from ..training import Enough, Log, Train, cross_entropy, resident, train
from .benchmark import Benchmark, Context, Values, in_turns_values
from .settings import BenchSettings, setting

WARMUP = 5  # steps of each that are not counted


@dataclass(frozen=True)
class Overhead(BenchSettings):
    """A step of `train` and one of a bare loop, on networks and batches that are alike, in turns.

    Both take images from memory, not augmented, normalise them on the device, clip the gradient and step by SGD; the
    bare loop reads its loss after every step, as any does that adds it up.

    Args:
        model: its name; weights are random.
        data: must fit into memory.
        rounds: steps of each that are measured.
    """

    model: str = "mobilenet_v2"
    data: str = "imagenette"
    batch_size: int = setting(32, "2 or more")
    rounds: int = setting(40, "1 or more")
    device: str = "auto"


def answer(config: Overhead, context: Context[Overhead]) -> Values:
    """How many times as long a step of `train` takes."""
    where, loaded, split = context.device, context.data, context.data.train
    tune_allocator()
    steps = config.rounds + WARMUP + 1
    if not isinstance(split, Split):
        raise BadConfig(f"data: expected images that fit into memory, {config.data} is read from disk")
    if len(split) < steps * config.batch_size:
        raise BadConfig(f"expected {steps} batches, found {len(split)} images in {config.data}")
    train_config = Train(epochs=1, lr=0.01, batch_size=config.batch_size, augment=False)
    own, bare = (load_model(config.model, loaded.classes).model for _ in range(2))
    for network in (own, bare):
        network.to(where, memory_format=torch.channels_last)  # type: ignore[call-overload]
    hand = _bare_steps(bare.train(), split, train_config, where)
    ms: dict[str, list[float]] = {"dslib": [], "bare": []}
    returned = 0.0

    def between(_: float) -> None:
        """One step of the bare loop between two of dslib's; a whole round of each loop is timed."""
        nonlocal returned
        wait_for(where)
        began = time.perf_counter()
        next(hand)
        wait_for(where)
        ended = time.perf_counter()
        if returned:
            ms["dslib"].append(1000 * (began - returned))
            ms["bare"].append(1000 * (ended - began))
        returned = time.perf_counter()

    others, loss = Others(), cross_entropy(train_config.label_smoothing)
    with use_precision(None), contextlib.suppress(Enough):
        train(own, loaded, loss, train_config, before_step=between, log=Log(steps=steps))
    counted = {name: np.array(values[WARMUP:]) for name, values in ms.items()}
    timing = Timing(counted, config.batch_size, str(where), "eager, channels_last, float32", others.cores())
    return in_turns_values(timing, "bare", "dslib", "dslib_over_bare")


def _bare_steps(model: nn.Module, split: Split, config: Train, device: torch.device) -> Iterator[float]:
    """A loop as one would write it for this network alone; each item is a step's loss."""
    decayed, rest = ([p for p in model.parameters() if (p.ndim > 1) == two] for two in (True, False))
    groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": rest}]
    optimizer = torch.optim.SGD(groups, config.lr * config.batch_size / 256, config.momentum, nesterov=True)
    held, labelled = resident(split, device), split.labels.to(device)
    for epoch in itertools.count():
        order = torch.randperm(len(split), generator=torch.Generator().manual_seed(epoch))
        for chosen in order[: len(order) // config.batch_size * config.batch_size].split(config.batch_size):
            chosen = chosen.to(device)
            images, labels = normalise(held[chosen.to(held.device)].to(device)), labelled[chosen]
            loss = F.cross_entropy(model(images), labels, label_smoothing=config.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            optimizer.step()
            yield loss.item()


TOLD = (
    "a step takes {dslib_over_bare:.3f} times as long as the bare loop's (quartiles {q25:.3f} to {q75:.3f}; {runtime})"
)
BENCHMARK = Benchmark("Training", Overhead, answer, TOLD)
