"""What does a step of the search cost over a plain training step?"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..measuring import Timing, interleaved, tune_allocator, use_precision
from ..models import load_model
from ..searching import add_gates, latency_decay
from ..sites import find_sites
from .benchmark import Benchmark, Context, Values, in_turns_values, noise
from .settings import OneTiming, setting


@dataclass(frozen=True)
class Steps(OneTiming):
    """Forward, backward and SGD step of a network as it is and in a search, half or more of its gates open, in turns.

    Args:
        compiled: both by torch.compile.
    """

    image_size: int = 128
    batch_size: int = setting(32, "2 or more")
    rounds: int = setting(20, "1 or more")
    device: str = "auto"
    compiled: bool = False


def answer(config: Steps, context: Context[Steps]) -> Values:
    """How many times as long a search's step takes."""
    where = context.device
    tune_allocator()
    network = load_model(config.model).model.to(where)
    gated, gates = add_gates(network, find_sites(network, config.image_size))
    gates.to(where)
    ks = itertools.cycle(range(len(gates.names) // 2, len(gates.names)))
    savings = torch.ones(len(gates.names), device=where)
    images = noise(network, config.batch_size, config.image_size, where)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (config.batch_size,), device=where)

    def nothing() -> Tensor:
        return torch.zeros((), device=where)

    def decay() -> Tensor:
        return 0.03 * latency_decay(gates.m, savings)

    runs = {
        "plain": _step(network, images, labels, config.compiled, lambda: None, nothing),
        "search": _step(gated, images, labels, config.compiled, lambda: gates.keep(next(ks)), decay),
    }
    with use_precision(None):
        ms, others = interleaved(runs, where, config.rounds)
    runtime = "compile, float32" if config.compiled else "eager, channels_last, float32"
    timing = Timing(ms, config.batch_size, str(where), runtime, others)
    return in_turns_values(timing, "plain", "search", "search_over_plain")


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


TOLD = (
    "a search step takes {search_over_plain:.2f} times as long as a plain one "
    "(quartiles {q25:.2f} to {q75:.2f}; {runtime})"
)
BENCHMARK = Benchmark("Which activations?", Steps, answer, TOLD)
