"""Rivals of the search: other ways to choose which activations to keep, all with one signature.

Each gives masks, those that keep most first: one for every k, but for the paper's own, which are six.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from ..data import Data
from ..errors import MaskMismatch
from ..profiling import CostTable
from ..ranking import Importances
from ..searching import Gate, add_gates, gate_groups
from ..sites import Mask, Sites
from ..training import Train, cross_entropy, train

Rival = Callable[[nn.Module, Data, Sites, CostTable, int], list[Mask]]
PAPER_KEPT = {
    "A": (0, 3, 4, 6, 8, 10, 11, 13, 14, 15, 16),
    "B": (3, 4, 10, 11, 13, 14, 15, 16),
    "C": (0, 3, 10, 11, 13, 14, 15, 16),
    "D": (3, 4, 13, 14, 15, 16),
    "E": (0, 3, 13, 14, 15, 16),
    "F": (),
}


def at_random(model: nn.Module, data: Data, sites: Sites, cost: CostTable, seed: int = 0) -> list[Mask]:
    """Sites in a random order."""
    rng = random.Random(seed)
    return masks_of(sites, {name: rng.random() for name in sites.mergeable})


def keep_cheapest(model: nn.Module, data: Data, sites: Sites, cost: CostTable, seed: int = 0) -> list[Mask]:
    """The sites whose removal saves most go first, whatever they matter."""
    cost.check(sites.mergeable)
    return masks_of(sites, {name: -cost.saving((name,), merged=True) for name in sites.mergeable})


def paper_masks(model: nn.Module, data: Data, sites: Sites, cost: CostTable, seed: int = 0) -> list[Mask]:
    """DepthShrinker's masks A to F of MobileNetV2-1.4, for any network with MobileNetV2's 17 sites.

    Raises:
        MaskMismatch: if the network has another number of sites.
    Source: Fu et al., ICML 2022; the stem's activation, which A, D and E take out too, stays.
    """
    if len(sites) != 17:
        raise MaskMismatch(f"the paper's masks are for MobileNetV2's 17 sites, found {len(sites)}")
    return [sites.mask([sites.names[i] for i in kept]) for kept in PAPER_KEPT.values()]


def evenly_spaced(model: nn.Module, data: Data, sites: Sites, cost: CostTable, seed: int = 0) -> list[Mask]:
    """Kept sites are spread evenly over the depth, for each k anew; shifted by chance where `seed` is not 0."""
    sites.check_k(len(sites.always_kept))
    names, shift = list(sites.mergeable), 0.5 if seed == 0 else random.Random(seed).random()
    counts = range(len(names), -1, -1)
    spread = ({names[int((i + shift) * len(names) / count)] for i in range(count)} for count in counts)
    return [sites.mask(kept) for kept in spread]


class Slope(Gate):
    """An activation that can be left by degrees: y = x + m * (act(x) - x), with m its site's, from 1 down to 0."""

    def forward(self, x: Tensor) -> Tensor:
        """The blend, elementwise."""
        return torch.lerp(x, self.act(x), self.gates.m[self.index])


def learned_slopes(model: nn.Module, data: Data, sites: Sites, cost: CostTable, seed: int = 0) -> list[Mask]:
    """Activations become linear by degrees that are trained with the weights; the most linear ones go first.

    Source: Dror et al., Layer Folding, 2021; here the activations of a site share one degree.
    """
    return masks_of(sites, train_slopes(model, data, sites, Train(epochs=2, lr=0.04, batch_size=64, seed=seed))[0])


def train_slopes(
    model: nn.Module, data: Data, sites: Sites, config: Train, weight: float = 0.1, lr_scale: float = 10.0
) -> tuple[dict[str, float], nn.Module]:
    """How much of each site's activations is left, from 0 on, 1 at first; and a copy with the weights trained for it.

    The loss is that of the labels, and `weight` times the mean of what is left (the paper's term has no gradient where
    all is left). What is left moves `lr_scale` times as quickly as the weights.
    """
    sloped, gates = add_gates(model, sites, Slope)
    plain = cross_entropy(config.label_smoothing)

    def loss(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        return plain(network, images, labels) + weight * gates.m.mean()

    def settle(_: float) -> None:
        gates.m.data.clamp_(min=0)

    train(
        sloped,
        data,
        loss,
        config,
        before_step=settle,
        parameters=gate_groups(sloped, gates, config, lr_scale),
        title="slopes",
    )
    settle(1.0)
    trained, state = copy.deepcopy(model), sloped.state_dict()
    trained.load_state_dict({name: state[name] for name in trained.state_dict()})
    return dict(zip(gates.names, gates.m.tolist(), strict=True)), trained


CHOICES: dict[str, Rival] = {
    "random": at_random,
    "keep the cheapest": keep_cheapest,
    "evenly spaced": evenly_spaced,
    "learned slopes": learned_slopes,
    "the paper's masks": paper_masks,
}


def masks_of(sites: Sites, m: Mapping[str, float]) -> list[Mask]:
    """The mask for every k, the largest k first, that importances (site name -> m) give."""
    sites.check_k(len(sites.always_kept))
    found = Importances(dict(m), sites.always_kept, sites.names)
    return [found.mask(k) for k in range(len(sites), len(sites.always_kept) - 1, -1)]


def useful(masks: Iterable[Mask], cost: CostTable) -> Iterator[Mask]:
    """The masks, but that a site whose removal costs time is kept all the same."""
    for mask in masks:
        yield Mask({name: on or cost.saving((name,), merged=True) <= 0 for name, on in mask.items()})


def within(masks: Iterable[Mask], cost: CostTable, latency: float) -> Mask:
    """The first of several masks whose predicted latency is within a budget (ms per batch); they come best first.

    A site whose removal costs time is kept all the same.

    Raises:
        MaskMismatch: if none is; the quickest is named.
    """
    quickest = float("inf")
    for mask in useful(masks, cost):
        predicted = cost.predict(mask, merged=True)
        if predicted <= latency:
            return mask
        quickest = min(quickest, predicted)
    raise MaskMismatch(f"latency: the quickest of these masks takes {quickest:.2f} ms per batch, found {latency:g}")
