"""What becomes of a plan: calibrated, finetuned, evaluated; and how quick it is, in turns with the original."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from functools import partial

from torch import nn

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
from .benchmark import Row, Values, noise, speedup_of

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


def point(
    key: Values,
    make: Callable[[], Values] | None,
    planned: tuple[nn.Module, Sites, CostTable, str],
    same: Values | None = None,
    over: nn.Module | None = None,
) -> Generator[Row, Values, Values]:
    """The row of a plan, made by `judge`, with what one of its timing says; a plan that comes twice is timed once.

    Args:
        key, make: of the row.
        planned: the network, its sites and costs, and the runtime that it is timed on.
        same: what a timing's key says beside the plan.
        over: as for `timed`.
    """
    row = yield Row(key, make, keep_errors=True)
    if "accuracy" not in row:
        return row
    network, sites, cost, runtime = planned
    chosen = Plan(sites.mask(set(sites.names) - set(row["removed"])), row["runs"], row.get("dropped", ()))
    timing = partial(timed, network, chosen, cost, runtime, over)
    return {**(yield Row({"timed": row["plan"], **(same or {})}, timing, short=True)), **row}


def outcome(row: Values) -> str:
    """What a row of `point` says."""
    if "accuracy" not in row:
        return str(row.get("error", "not begun"))
    speed, before, after = row["measured_speedup"], row["accuracy_before"], row["accuracy"]
    return f"{speed:.2f} times as fast, accuracy {before:.2%}, finetuned {after:.2%}"


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
    batch = noise(network, cost.batch_size, cost.image_size, device)
    networks = {"original": over or network, "small": merge(shrink(network, chosen, image_size=cost.image_size))}
    timing = measure(networks, batch, ROUNDS, runtime=runtime)
    return {**speedup_of(timing, "small", "original", "measured_speedup"), "busy": timing.busy}
