"""What do boundary activations and self-distillation give: the paper's three accuracies of a mask?"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import nn

from ..baselines import PAPER_KEPT
from ..errors import BadConfig, nearest
from ..finetuning import Finetune, finetune
from ..records import Record
from ..shrinking import shrink
from ..training import evaluate
from .benchmark import Benchmark, Context, Row, Steps, Values
from .settings import BenchSettings, setting

WAYS = {"plain": (False, False), "boundary": (True, False), "distilled": (True, True)}  # boundary ReLU6, teacher


@dataclass(frozen=True)
class Ablation(BenchSettings):
    """Finetune one shrunk network plainly, with boundary activation, and with self-distillation too, over seeds.

    Activations are torn out, none fades. Source: Fu et al., ICML 2022, table 2: that its three accuracies are these is
    inferred, see data/paper/README.md.

    Args:
        mask: one of the paper's, A to F, for a network with MobileNetV2's 17 sites.
        epochs: of each finetuning.
        seeds: finetunings of each way.
    """

    mask: str = "A"
    model: str = "mobilenet_v2"
    weights: str = "default"
    model_option: dict[str, Any] | None = None
    data: str = "imagenette"
    image_size: int | None = None
    epochs: int = setting(2, "1 or more")
    lr: float = 0.1
    batch_size: int = 64
    seeds: int = setting(3, "1 or more")
    device: str = setting("auto", recorded=False)

    def __post_init__(self) -> None:
        """Check the ranges."""
        super().__post_init__()
        if self.mask not in PAPER_KEPT:
            raise BadConfig(nearest("mask", self.mask, PAPER_KEPT))


def answer(config: Ablation, context: Context[Ablation]) -> Steps:
    """The original's accuracy; then a row for each way and seed."""
    data, (network, sites) = context.data, context.trained
    network = network.to(memory_format=torch.channels_last)
    if len(sites) != 17:
        raise BadConfig(f"the paper's masks are for MobileNetV2's 17 sites, found {len(sites)} in {config.model}")
    kept = sites.mask([sites.names[i] for i in PAPER_KEPT[config.mask]])

    def tuned(way: str, seed: int) -> Values:
        boundary, teacher = WAYS[way]
        small = shrink(network, kept, nn.ReLU6 if boundary else None, data.image_size)
        before, began = evaluate(small, data.val), time.perf_counter()
        settings = Finetune(epochs=config.epochs, lr=config.lr, batch_size=config.batch_size, seed=seed)
        done = finetune(small, data, network if teacher else None, settings)
        return {
            "before": before,
            "accuracy": done.history[-1]["val_accuracy"],
            "history": done.history,
            "seconds": time.perf_counter() - began,
        }

    yield Row({"way": "original"}, lambda: {"accuracy": evaluate(network, data.val)})
    for seed in range(config.seeds):
        for way in WAYS:
            yield Row({"way": way, "seed": seed}, partial(tuned, way, seed))


def table(record: Record) -> pd.DataFrame:
    """One row a way: accuracy in percent, its mean over seeds, its standard deviation, and how many seeds."""
    frame = pd.DataFrame([row for row in record.values["rows"] if "seed" in row])
    if frame.empty:
        return frame
    found = frame.assign(accuracy=100 * frame["accuracy"]).groupby("way")["accuracy"].agg(["mean", "std", "count"])
    return found.reindex([way for way in WAYS if way in found.index]).round(2)


def _told(record: Record) -> Iterator[str]:
    yield table(record).to_string()


BENCHMARK = Benchmark("Training", Ablation, answer, _told, selecting=("seeds",))
