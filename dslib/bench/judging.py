"""What becomes of a plan: calibrated, finetuned, evaluated, and measured in turns with the original."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn

from ..blocks import in_channels
from ..calibration import Calibrate, calibrate
from ..datasets import Data
from ..finetuning import Finetune, finetune
from ..importance import loss_on
from ..masks import Plan
from ..measuring import measure
from ..profiling import CostTable
from ..splits import Split
from ..training import evaluate


def judge(
    network: nn.Module, chosen: Plan, data: Data, cost: CostTable, config: Finetune, images: Split, runtime: str,
    over: nn.Module | None = None, held: Split | None = None,
) -> dict[str, Any]:  # fmt: skip
    """A row about a plan.

    Args:
        network: the original.
        chosen: the plan.
        data: to finetune and evaluate on.
        cost: of the network; latency is measured at its batch size.
        config: of the finetuning; its seed is the calibration's too.
        images: to calibrate on.
        runtime: that latency is measured on.
        over: what the speed-up is over; default the original.
        held: images on which the calibrated network's cross-entropy is taken, `held_loss`.
    """
    began = time.perf_counter()
    small = calibrate(network, chosen, images, Calibrate(seed=config.seed), progress=False).model
    done = finetune(small, data, network, config).model
    device = next(network.parameters()).device
    batch = torch.randn(cost.batch_size, in_channels(network), cost.image_size, cost.image_size, device=device)
    timing = measure({"original": network if over is None else over, "small": done}, batch, 15, runtime=runtime)
    ratio, low, high = timing.speedup("small", over="original")
    return {
        "removed": list(chosen.mask.removed), "runs": chosen.runs, "k": chosen.mask.k,
        "predicted_ms": cost.predict(chosen, merged=True), "measured_speedup": ratio, "q25": low, "q75": high,
        "busy": timing.busy, **({} if held is None else {"held_loss": loss_on(small, held)}),
        "accuracy_before": evaluate(small, data.val), "accuracy": evaluate(done, data.val),
        "seconds": time.perf_counter() - began,
    }  # fmt: skip
