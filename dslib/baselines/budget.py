"""How fast a network must become, as measured; and the least change that makes it so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, replace
from typing import TypeVar

import torch
from torch import nn

from ..algebra import dtype_of, in_channels, structure_of
from ..errors import BadConfig, Settings, ranged
from ..measuring import Timing, measure
from ..profiling import CostTable, profile
from ..sites import Sites
from .tuning import Clock

T = TypeVar("T")

TRIES = 3  # of a timing


@dataclass(frozen=True)
class Budget(Settings):
    """So many times as fast as the original, on this device.

    Args:
        speedup: ratio of median latencies at least, BatchNorm folded on both sides, measured in turns.
        image_size: side in pixels.
        batch_size: images a batch.
        runtime, precision: as for `measure`.
        rounds: measurements of each network.
        costs: of blocks, by network, as measured so far: they are the same for every method and speed-up.
    """

    speedup: float = ranged(MISSING, "more than 1")
    image_size: int = ranged(MISSING, "1 or more")
    batch_size: int = ranged(8, "1 or more")
    runtime: str = "eager"
    precision: str | None = None
    rounds: int = ranged(11, "1 or more")
    costs: dict[str, CostTable] = field(default_factory=dict, compare=False, repr=False)

    def timing(self, **networks: nn.Module) -> Timing:
        """Latencies of several networks, by name, in turns."""
        first = next(iter(networks.values()))
        shape = (self.batch_size, in_channels(first), self.image_size, self.image_size)
        images = torch.randn(*shape, device=next(first.parameters()).device, dtype=dtype_of(first))
        return measure(networks, images, self.rounds, runtime=self.runtime, precision=self.precision)

    def cost(self, model: nn.Module, sites: Sites) -> CostTable:
        """What each site costs on the device, runtime and batch of the budget; measured once for each network."""
        known = structure_of(model)
        if known not in self.costs:
            self.costs[known] = profile(model, sites, self.batch_size, runtime=self.runtime, precision=self.precision)
        return self.costs[known]

    def steady(self, original: nn.Module, network: nn.Module, quiet: bool = False) -> Timing:
        """Latencies of both, measured up to `TRIES` times while the machine changes its pace.

        Then the ratio of medians lies outside the quartiles of the rounds' ratios. With `quiet` also if it was busy.
        """
        for _ in range(TRIES):
            timing = self.timing(original=original, network=network)
            ratio, low, high = timing.speedup("network", over="original")
            if low <= ratio <= high and not (quiet and timing.busy):
                break
        return timing

    def reached(self, original: nn.Module, network: nn.Module) -> float:
        """How many times as fast as the original the network is."""
        return self.steady(original, network).speedup("network", over="original")[0]


def least(
    budget: Budget,
    original: nn.Module,
    make: Callable[[float], tuple[nn.Module, T]],
    clock: Clock,
    steps: int = 6,
    what: str = "it",
) -> T:
    """What about the smallest strength gives that meets the budget, confirmed by a second, longer measurement.

    Halves the interval of strengths; latency should fall as the strength grows.

    Args:
        make: strength, 0 (nothing) to 1 (all that the method can do) -> a network of the right shape, and a result.
        clock: whose time making takes; measuring takes none.
    Raises:
        BadConfig: if not even the strength 1 meets the budget; says how fast that is.
    """

    def made(strength: float) -> tuple[nn.Module, T]:
        with clock.part("choosing"):
            return make(strength)

    def speed_of(network: nn.Module, rounds: int = budget.rounds) -> float:
        return replace(budget, rounds=rounds).reached(original, network)

    quickest, strongest = made(1.0)
    speed = speed_of(quickest)
    if speed < budget.speedup:  # one unlucky measurement refuses nothing
        speed = speed_of(quickest, 3 * budget.rounds)
    if speed < budget.speedup:
        raise BadConfig(
            f"{what}: at its quickest the network is {speed:.2f} times as fast as the "
            f"original on {budget.runtime}, expected {budget.speedup:g}"
        )
    low, high = 0.0, 1.0
    for _ in range(steps):
        middle = (low + high) / 2
        if speed_of(made(middle)[0]) >= budget.speedup:
            high = middle
        else:
            low = middle
    while high < 1:  # one lucky measurement is not enough
        network, found = made(high)
        if speed_of(network, 3 * budget.rounds) >= budget.speedup:
            return found
        high += 2.0**-steps
    return strongest
