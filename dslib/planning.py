"""Planning: which sites to remove, by what the network loses when each is calibrated away alone. No labels."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from .blocks import in_channels
from .calibration import Calibrate, Images, calibrate, logits_of
from .errors import MaskMismatch, require
from .graphs import dtype_of
from .masks import Mask
from .measuring import measure
from .merging import merge
from .profiling import CostTable
from .searching import Found
from .shrinking import shrink
from .sites import Sites

Speedup = tuple[float, float, float]  # ratio of medians, and quartiles of the rounds' ratios
LEVELS = 2000  # to which savings are rounded (down) in `cheapest`


def rank(
    model: nn.Module, sites: Sites, images: Images, config: Calibrate | None = None, progress: bool = True
) -> Found:
    """Every removable site's importance: the divergence from the original network if it alone is calibrated away.

    Args:
        model: the network; left as it is.
        sites: of the model.
        images: unlabelled, as for `calibrate`; some hundreds are enough.
        config: settings of the calibrations; kept blocks are not adjusted.
        progress: show a bar.
    Returns:
        As from a search, with a mask for every k; `m` is the mean Kullback-Leibler divergence, in nats.
    """
    sites.check_k(len(sites) - len(sites.mergeable))
    config = replace(config or Calibrate(), refit=False)
    expected = logits_of(model, images, config.batch_size)
    found = {}
    for name in tqdm(sites.mergeable, "rank", leave=False, disable=None if progress else True):
        mask = sites.mask([other for other in sites.names if other != name])
        small = calibrate(model, mask, images, config, progress=False).model
        found[name] = divergence(logits_of(small, images, config.batch_size), expected)
    always = tuple(name for name in sites.names if name not in sites.mergeable)
    return Found(found, always, sites.names)


def divergence(logits: Tensor, expected: Tensor) -> float:
    """Mean Kullback-Leibler divergence of a softmax from the expected one, both from logits (N, classes), in nats."""
    mine, theirs = logits.double().log_softmax(1), expected.double().log_softmax(1)
    return F.kl_div(mine, theirs, log_target=True, reduction="batchmean").item()


def agreement(logits: Tensor, expected: Tensor) -> float:
    """Share of images with the same top-1, 0 to 1: stands for accuracy where there are no labels."""
    return (logits.argmax(1) == expected.argmax(1)).float().mean().item()


def cheapest(found: Found, cost: CostTable, latency: float) -> Mask:
    """The mask within a latency that removes the least importance in sum.

    A knapsack, solved exactly for savings rounded down to a `LEVELS`th of what must be saved; so the predicted latency
    is never above what was asked for.

    Args:
        found: the importances.
        cost: what each site costs on this device.
        latency: of the whole network at most, ms per batch.
    Raises:
        MaskMismatch: if removing all sites does not reach it, or sites were not measured.
    """
    useful = _savings(found, cost)
    least, need = cost.total - sum(useful.values()), cost.total - latency
    require(least <= latency, f"latency: the least that can be reached is {least:.2f} ms per batch, found {latency:g}",
            MaskMismatch)  # fmt: skip
    removed = set(useful) if latency - least < 1e-9 * cost.total else _knapsack(useful, found.m, need)
    return Mask({name: name not in removed for name in found.order})


def for_speedup(
    model: nn.Module, found: Found, cost: CostTable, speedup: float, rounds: int = 15, runtime: str = "eager"
) -> tuple[Mask, Speedup]:
    """The mask that removes the least importance and makes the merged network so many times faster, as measured.

    Predicted latencies are sums over blocks; where the whole network then falls short, more is asked of them.

    Args:
        model: the network that was ranked and profiled.
        found: the importances.
        cost: measured here; the network is timed at its batch size and image size.
        speedup: ratio of medians, BatchNorm folded on both sides.
        rounds: measurements of each network.
        runtime: that the costs were measured on.
    Returns:
        The mask; and the measured speed-up with its quartiles.
    Raises:
        MaskMismatch: if the network is not that fast without all sites whose removal saves time.
    """
    require(speedup > 1, f"speedup: expected more than 1, found {speedup:g}")
    size, device = cost.image_size, next(model.parameters()).device
    images = torch.randn(cost.batch_size, in_channels(model), size, size, device=device, dtype=dtype_of(model))
    savings = _savings(found, cost)
    least = cost.total - sum(savings.values())
    latency = max(cost.total / speedup, least)
    while True:
        mask = cheapest(found, cost, latency)
        networks = {"small": merge(shrink(model, mask, image_size=size)), "original": model}
        timing = measure(networks, images, rounds, runtime=runtime)
        reached = timing.speedup("small", over="original")
        if reached[0] >= speedup:
            return mask, reached
        require(latency > least, f"speedup: without all {len(savings)} sites whose removal saves time the network is "
                f"{reached[0]:.2f} times as fast, expected {speedup:g}", MaskMismatch)  # fmt: skip
        predicted = cost.total - sum(savings.get(name, 0.0) for name in mask.removed)
        latency = max(0.995 * predicted, least)  # another mask, and not much quicker than need be


def _savings(found: Found, cost: CostTable) -> dict[str, float]:
    """Ms saved by merging each ranked site, of those where that saves any: calibrating merges what it removes."""
    unknown = sorted(set(found.m) - set(cost.kept))
    require(not unknown, f"no measured cost for {unknown}: profile the network that was ranked", MaskMismatch)
    savings = {name: cost.kept[name] - cost.merged[name] for name in found.m}
    return {name: saving for name, saving in savings.items() if saving > 0}


def _knapsack(savings: dict[str, float], losses: dict[str, float], need: float) -> set[str]:
    """Names whose savings reach `need` (at least) for the least loss in sum."""
    if need <= 0:
        return set()
    steps = {name: int(saving / need * LEVELS) for name, saving in savings.items()}
    nothing: frozenset[str] = frozenset()
    best = [(0.0, nothing)] + [(float("inf"), nothing)] * LEVELS
    for name, step in steps.items():
        for level in range(LEVELS, 0, -1):
            before, names = best[max(level - step, 0)]
            if before + losses[name] < best[level][0]:
                best[level] = (before + losses[name], names | {name})
    loss, chosen = best[LEVELS]
    return set(savings) if loss == float("inf") else set(chosen)
