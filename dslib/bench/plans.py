"""What becomes of a plan: calibrated, finetuned, evaluated; and how quick it is, in turns with the original."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ..algebra import in_channels
from ..calibrating import Calibrate, Images, calibrate, logits_of
from ..data import Data, Split
from ..finetuning import Finetune, finetune
from ..measuring import measure
from ..merging import merge
from ..profiling import CostTable
from ..ranking import agreement
from ..shrinking import shrink
from ..sites import Mask, Plan, Sites
from ..training import evaluate, loss_on
from .benchmark import Values, speedup_of

ROUNDS = 21  # of each timing


def calibrated_row(
    network: nn.Module, mask: Mask, images: Images, data: Data, config: Calibrate
) -> tuple[nn.Module, Values]:
    """A mask calibrated, and its row: seconds, agreement with the original on the images, errors, accuracy."""
    started = time.perf_counter()
    done = calibrate(network, mask, images, config, progress=False)
    seconds = time.perf_counter() - started
    return done.model, {
        "removed": list(mask.removed),
        "seconds": seconds,
        "agreement": agreement(logits_of(done.model, images), logits_of(network, images)),
        "errors": done.errors,
        "accuracy": evaluate(done.model, data.val),
    }


def judge(
    network: nn.Module,
    chosen: Plan,
    data: Data,
    cost: CostTable,
    config: Finetune,
    images: Split,
    held: Split | None = None,
) -> Values:
    """A row about a plan.

    Args:
        network: the original.
        chosen: the plan.
        data: to finetune and evaluate on.
        cost: of the network.
        config: of the finetuning; its seed is the calibration's too.
        images: to calibrate on.
        held: images on which the calibrated network's accuracy and cross-entropy are taken, and the finetuned one's
            accuracy.
    """
    began = time.perf_counter()
    small = calibrate(network, chosen, images, Calibrate(seed=config.seed), progress=False).model
    done = finetune(small, data, network, config).model
    row = {
        "plan": str(chosen),
        "removed": list(chosen.mask.removed),
        "runs": chosen.runs,
        "dropped": chosen.dropped,
        "k": chosen.mask.k,
        "predicted_ms": cost.predict(chosen, merged=True),
    }
    if held is not None:
        row["held_accuracy"], row["held_loss"] = evaluate(small, held), loss_on(small, held)
        row["held_finetuned"] = evaluate(done, held)
    row["accuracy_before"], row["accuracy"] = evaluate(small, data.val), evaluate(done, data.val)
    return {**row, "seconds": time.perf_counter() - began}


def plan_of(row: Mapping[str, Any], sites: Sites) -> Plan:
    """The plan that a row of `judge` is about."""
    return Plan(sites.mask(set(sites.names) - set(row["removed"])), row["runs"], row.get("dropped", ()))


def quiet(measured: Callable[[], CostTable], echo: Callable[[str], object]) -> CostTable:
    """Costs, measured again while the machine is busy, thrice at most: budgets rest on them."""
    for _ in range(3):
        table = measured()
        if not table.busy:
            return table
    echo("the machine was busy while costs were measured: budgets are of these")
    return table


def timed(network: nn.Module, chosen: Plan, cost: CostTable, runtime: str, over: nn.Module | None = None) -> Values:
    """How many times as fast the merged network is as the original, or `over` another; weights do not matter.

    In turns, at the costs' batch size, BatchNorm folded on both sides.
    """
    device = next(network.parameters()).device
    batch = torch.randn(cost.batch_size, in_channels(network), cost.image_size, cost.image_size, device=device)
    networks = {"original": over or network, "small": merge(shrink(network, chosen, image_size=cost.image_size))}
    timing = measure(networks, batch, ROUNDS, runtime=runtime)
    return {**speedup_of(timing, "small", "original", "measured_speedup"), "busy": timing.busy}
