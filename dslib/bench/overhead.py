"""What a step of the training loop costs over a bare loop written by hand: `dslib bench overhead`."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..data import Split, load_data, normalise
from ..errors import BadConfig
from ..measuring import Others, Timing, pick_device, this_machine, tune_allocator, use_precision, wait_for
from ..models import load_model
from ..records import Record, as_words, commit
from ..training import Enough, Log, Train, cross_entropy, resident, train

WARMUP = 5  # steps of each that are not counted


def record_overhead(
    model: str = "mobilenet_v2", data: str = "imagenette", batch_size: int = 32, rounds: int = 40, device: str = "auto"
) -> Record:
    """A step of `train` and one of a bare loop, on networks and batches that are alike, in turns.

    Both take images from memory, not augmented, normalise them on the device, clip the gradient and step by SGD; the
    bare loop reads its loss after every step, as any does that adds it up.

    Args:
        model: name, as for `load_model`; random weights.
        data: as for `load_data`; must fit into memory.
        batch_size: images a step.
        rounds: steps of each that are measured.
        device: to measure.
    """
    if not (rounds > 0 and batch_size > 1):
        raise BadConfig(f"expected rounds, and two images or more, found {rounds} and {batch_size}")
    where = pick_device(device)
    tune_allocator()
    loaded = load_data(data)
    split, steps = loaded.train, rounds + WARMUP + 1
    if not isinstance(split, Split):
        raise BadConfig(f"data: expected images that fit into memory, {data} is read from disk")
    assert isinstance(split, Split)
    if not len(split) >= steps * batch_size:
        raise BadConfig(f"expected {steps} batches, found {len(split)} images in {data}")
    config = Train(epochs=1, lr=0.01, batch_size=batch_size, augment=False)
    own, bare = (load_model(model, loaded.classes).model.to(where, memory_format=torch.channels_last) for _ in range(2))  # type: ignore[call-overload]
    hand = _bare_steps(bare.train(), split, config, where)
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

    others = Others()
    with use_precision(None), contextlib.suppress(Enough):
        train(own, loaded, cross_entropy(config.label_smoothing), config, before_step=between, log=Log(steps=steps))
    timing = Timing(
        {name: np.array(values[WARMUP:]) for name, values in ms.items()},
        batch_size,
        str(where),
        "eager, channels_last, float32",
        others.cores(),
    )
    ratio, low, high = timing.speedup("bare", over="dslib")
    values = {
        "networks": timing.frame.T.to_dict(),
        "dslib_over_bare": ratio,
        "q25": low,
        "q75": high,
        "busy": timing.busy,
        "others": timing.others,
        "runtime": timing.runtime,
    }
    settings = {"model": model, "data": data, "batch_size": batch_size, "rounds": rounds, "device": str(where)}
    command = f"dslib bench overhead {as_words(settings)}"
    return Record("overhead", command, settings, values, this_machine(where), commit())


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
