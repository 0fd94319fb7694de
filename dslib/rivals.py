"""Rivals of the search: other ways to choose which activations to keep, all with one signature.

Each gives what a search gives, `Found`: an importance for every site that can be removed, and so a mask for every k.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import structure_of
from .datasets import Data
from .errors import MaskMismatch
from .masks import Mask
from .profiling import CostTable
from .searching import Found, Gate, add_gates
from .sites import Sites
from .training import Train, train

Rival = Callable[[nn.Module, Data, Sites, CostTable, int], Found]


def at_random(model: nn.Module, data: Data, sites: Sites, cost: CostTable, seed: int = 0) -> Found:
    """Sites in a random order."""
    rng = random.Random(seed)
    return _found(model, sites, {name: rng.random() for name in sites.mergeable})


def keep_cheapest(model: nn.Module, data: Data, sites: Sites, cost: CostTable, seed: int = 0) -> Found:
    """The sites whose removal saves most go first, whatever they matter."""
    return _found(model, sites, {name: -cost.saving((name,), merged=True) for name in sites.mergeable})


def evenly_spaced(model: nn.Module, data: Data, sites: Sites, cost: CostTable, seed: int = 0) -> Found:
    """Kept sites are spread over the depth: each next one that goes is farthest from those gone before.

    With `seed` 0 the middle one goes first; else a random one.
    """
    names = list(sites.mergeable)
    gone = [-1, len(names)]  # the network's ends
    gone.append(len(names) // 2 if seed == 0 else random.Random(seed).randrange(len(names)))
    while len(gone) < len(names) + 2:
        left = [i for i in range(len(names)) if i not in gone]
        gone.append(max(left, key=lambda i: min(abs(i - j) for j in gone)))
    return _found(model, sites, {names[i]: float(place) for place, i in enumerate(gone[2:])})


class Slope(Gate):
    """An activation that can be left by degrees: y = x + m * (act(x) - x), with m its site's, from 1 down to 0."""

    def forward(self, x: Tensor) -> Tensor:
        """The blend, elementwise."""
        return torch.lerp(x, self.act(x), self.gates.m[self.index])


def learned_slopes(
    model: nn.Module, data: Data, sites: Sites, cost: CostTable, seed: int = 0, config: Train | None = None,
    weight: float = 0.1,
) -> Found:  # fmt: skip
    """Activations become linear by degrees that are trained with the weights; the most linear ones go first.

    The loss is that of the labels, and `weight` times the mean over sites of 1 - (1 - m)^2.

    Source: Dror et al., Layer Folding, 2021; here the activations of a site share one degree.
    """
    sloped, gates = add_gates(model, sites, Slope)
    gates.to(next(model.parameters()).device)
    config = replace(config or Train(epochs=2, lr=0.04, batch_size=64), seed=seed)

    def loss(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        bent = 1 - (1 - gates.m).square()
        return F.cross_entropy(network(images), labels, label_smoothing=config.label_smoothing) + weight * bent.mean()

    def settle(_: float) -> None:
        gates.m.data.clamp_(0, 1)

    train(sloped, data, loss, config, before_step=settle, title="slopes")
    settle(1.0)
    return _found(model, sites, dict(zip(gates.names, gates.m.tolist(), strict=True)))


RIVALS: dict[str, Rival] = {
    "random": at_random, "keep the cheapest": keep_cheapest, "evenly spaced": evenly_spaced,
    "learned slopes": learned_slopes,
}  # fmt: skip


def within(masks: Iterable[Mask], cost: CostTable, latency: float) -> Mask:
    """The first of several masks whose predicted latency is within a budget (ms per batch); they come best first.

    Raises:
        MaskMismatch: if none is; the quickest is named.
    """
    quickest = float("inf")
    for mask in masks:
        predicted = cost.predict(mask, merged=True)
        if predicted <= latency:
            return mask
        quickest = min(quickest, predicted)
    raise MaskMismatch(f"latency: the quickest of these masks takes {quickest:.2f} ms per batch, found {latency:g}")


def _found(model: nn.Module, sites: Sites, m: dict[str, float]) -> Found:
    sites.check_k(len(sites.always_kept))
    return Found(m, sites.always_kept, sites.names, network=structure_of(model))
