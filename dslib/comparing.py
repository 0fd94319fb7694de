"""What a whole run gained: the original beside the merged network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .datasets import Data
from .evaluating import predict, top1
from .folding import fold
from .measuring import count_macs, count_parameters, measure
from .runtimes import use_precision


def compare(networks: Mapping[str, nn.Module], data: Data, batch_size: int, rounds: int) -> dict[str, Any]:
    """Accuracy, cost and latency of the original and the merged network, and how well merged equals shrunk.

    Latency is measured in turns, with BatchNorm folded on both sides.

    Args:
        networks: named original, shrunk and merged.
        data: its validation split gives the accuracies.
        batch_size: at which latency is measured.
        rounds: measurements of each.
    """
    shape = (3, data.image_size, data.image_size)
    device = next(networks["original"].parameters()).device
    images = torch.randn(batch_size, *shape, device=device).contiguous(memory_format=torch.channels_last)
    with use_precision(None):  # what is called fp32 here is fp32
        logits = {name: predict(network, data.val) for name, network in networks.items()}
        folded = {name: fold(networks[name], images) for name in ("original", "merged")}
        timing = measure(folded, images, rounds)
    rows = {
        name: {
            "accuracy": top1(logits[name], data.val),
            "macs": count_macs(network, shape),
            "parameters": count_parameters(network),
            **timing.frame.loc[name].to_dict(),
        }
        for name, network in folded.items()
    }
    ratio, low, high = timing.speedup("merged", over="original")
    return {
        "networks": rows,
        "speedup": {"ratio_of_medians": ratio, "q25": low, "q75": high, "rounds": rounds},
        "batch_size": timing.batch_size, "image_size": data.image_size, "runtime": timing.runtime,
        "val_images": len(data.val),
        "shrunk_accuracy": top1(logits["shrunk"], data.val),
        **difference(logits["shrunk"], logits["merged"]),
    }  # fmt: skip


def difference(a: Tensor, b: Tensor) -> dict[str, float]:
    """How far two networks' logits (N, classes) differ: relative to the largest, and in top-1.

    An image whose two best logits are closer than 1e-4 in `a` has no clear top-1 and is not counted.
    """
    best = a.topk(2, dim=1).values
    clear = best[:, 0] - best[:, 1] >= 1e-4
    return {
        "largest_relative_difference": ((a - b).abs().max() / a.abs().max()).item(),
        "top1_differences": int((a.argmax(1) != b.argmax(1))[clear].sum()),
        "top1_unclear": int((~clear).sum()),
    }
