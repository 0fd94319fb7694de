"""What a step of the search costs over a plain training step: `dslib bench steps`."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..algebra import in_channels
from ..errors import BadConfig
from ..measuring import Timing, interleaved, pick_device, this_machine, tune_allocator, use_precision
from ..models import load_model
from ..records import Record, as_words, commit
from ..searching import add_gates, latency_decay
from ..sites import find_sites


def record_steps(
    model: str = "mobilenet_v2",
    image_size: int = 128,
    batch_size: int = 32,
    rounds: int = 20,
    device: str = "auto",
    compiled: bool = False,
) -> Record:
    """Forward, backward and SGD step of a network as it is and in a search, half or more of its gates open, in turns.

    Args:
        model: name, as for `load_model`; random weights.
        image_size: side in pixels.
        batch_size: images a step.
        rounds: measurements of each.
        device: to measure.
        compiled: whether both are compiled by `torch.compile`.
    """
    if not (rounds > 0 and batch_size > 1):
        raise BadConfig(f"expected rounds, and two images or more, found {rounds} and {batch_size}")
    where = pick_device(device)
    tune_allocator()
    network = load_model(model).model.to(where)
    gated, gates = add_gates(network, find_sites(network, image_size))
    gates.to(where)
    ks = itertools.cycle(range(len(gates.names) // 2, len(gates.names)))
    savings = torch.ones(len(gates.names), device=where)
    images = torch.randn(batch_size, in_channels(network), image_size, image_size, device=where)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (batch_size,), device=where)
    runs = {
        "plain": _step(network, images, labels, compiled, lambda: None, lambda: torch.zeros((), device=where)),
        "search": _step(
            gated,
            images,
            labels,
            compiled,
            lambda: gates.keep(next(ks)),
            lambda: 0.03 * latency_decay(gates.m, savings),
        ),
    }
    with use_precision(None):
        ms, others = interleaved(runs, where, rounds)
    runtime = "compile, float32" if compiled else "eager, channels_last, float32"
    timing = Timing(ms, batch_size, str(where), runtime, others)
    ratio, low, high = timing.speedup("plain", over="search")
    values = {
        "networks": timing.frame.T.to_dict(),
        "search_over_plain": ratio,
        "q25": low,
        "q75": high,
        "busy": timing.busy,
        "others": others,
        "runtime": runtime,
    }
    settings = {
        "model": model,
        "image_size": image_size,
        "batch_size": batch_size,
        "rounds": rounds,
        "device": str(where),
    }
    words = as_words(settings) + (" --compiled" if compiled else "")
    return Record(
        "steps", f"dslib bench steps {words}", {**settings, "compiled": compiled}, values, this_machine(where), commit()
    )


def _step(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    compiled: bool,
    before: Callable[[], None],
    more: Callable[[], Tensor],
) -> Callable[[], None]:
    model = model.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9, nesterov=True)
    forward = torch.compile(model) if compiled else model

    def run() -> None:
        before()
        optimizer.zero_grad()
        (F.cross_entropy(forward(images), labels) + more()).backward()
        optimizer.step()

    return run
