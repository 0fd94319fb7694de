"""Is a small network better trained as a larger one and shrunk back, or as it is for the same time?"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import pandas as pd
import torch
from torch import nn

from ..data import Data
from ..measuring import Others, tune_allocator
from ..models import load_model
from ..records import Record
from ..training import Boost, Enough, Log, Train, boost, cross_entropy, evaluate, train
from .benchmark import Benchmark, Context, Row, Steps, Values
from .settings import BenchSettings, setting

TRIED = 24  # steps of each that are timed, in turns of a few
FADED = {"fading": 1.0, "linear": 1e-9}  # where the activations are out in such a trial
WAYS: dict[str, type[Train]] = {"expanded": Boost, "as it is": Train}


@dataclass(frozen=True)
class Expand(BenchSettings):
    """A small network from nothing: expanded for `epochs`, and as it is for as many epochs as take the same time.

    How much longer a step of the expanded one takes is measured first, in turns, and kept with the rows.

    Args:
        ratio: inner channels over input channels, while expanded.
        epochs: of the expanded network.
        lr: per 256 images of batch, of both.
        batch_size: images a step, of both.
    """

    model: str = "mobilenet_v2"
    model_option: dict[str, Any] | None = None
    data: str = "cifar10"
    image_size: int | None = None
    ratio: float = 2.0
    epochs: int = setting(6, "1 or more")
    lr: float = 0.1
    batch_size: int = 128
    seeds: int = setting(3, "1 or more")
    device: str = setting("auto", recorded=False)


def answer(config: Expand, context: Context[Expand]) -> Steps:
    """How long a step of each takes; then a row for each way and seed."""
    tune_allocator()
    trainer = _Trainer(config, context.data, context.device)
    slower = (yield Row({"timing": "ms a step"}, trainer.speeds, short=True))["slower"]
    for seed in range(config.seeds):
        for way in WAYS:
            longer = 1.0 if way == "expanded" else slower
            yield Row({"way": way, "seed": seed}, partial(trainer.row, way, seed, longer))


class _Trainer:
    """Trains a network in either way."""

    def __init__(self, config: Expand, data: Data, device: torch.device) -> None:
        self.config, self.data, self.device = config, data, device

    def settings(self, way: str, **more: Any) -> Train:
        more |= {"ratio": self.config.ratio} if way == "expanded" else {}
        return WAYS[way](lr=self.config.lr, batch_size=self.config.batch_size, warmup=0.5, **more)

    def trained(self, settings: Train, log: Log | None = None) -> nn.Module:
        options = self.config.model_option
        network = load_model(self.config.model, self.data.classes, options=options, seed=settings.seed).model
        network = network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if isinstance(settings, Boost):
            return boost(network, self.data, settings, log=log).model

        def note(_: int) -> Values:
            return {"val_accuracy": evaluate(network, self.data.val)}

        loss = cross_entropy(settings.label_smoothing)
        train(network, self.data, loss, settings, after_epoch=note, title="as it is", log=log)
        return network.eval()

    def speeds(self) -> Values:
        """Median milliseconds of a step, in turns: as it is; expanded with activations, fading, and without."""
        cases = {name: ("expanded", {"fade_from": 0.0, "fade_to": to}) for name, to in FADED.items()}
        cases |= {"whole": ("expanded", {"fade_from": 0.9, "fade_to": 1.0}), "as it is": ("as it is", {})}
        ms: dict[str, list[float]] = {case: [] for case in cases}
        others = Others()
        for _ in range(3):
            for case, (way, more) in cases.items():
                try:
                    self.trained(self.settings(way, epochs=self.config.epochs, **more), Log(steps=TRIED // 3 + 2))
                except Enough as trial:
                    ms[case] += [1000 * (after - before) for before, after in pairwise(trial.ended[2:])]
        medians = {case: statistics.median(found) for case, found in ms.items()}
        first, last = Boost.fade_from, 1 - Boost.fade_to
        expanded = first * medians["whole"] + (1 - first - last) * medians["fading"] + last * medians["linear"]
        return {"ms": medians, "slower": expanded / medians["as it is"], "others": others.cores()}

    def row(self, way: str, seed: int, longer: float) -> Values:
        """One training."""
        began = time.perf_counter()
        settings = self.settings(way, epochs=round(self.config.epochs * longer), seed=seed)
        network = self.trained(settings)
        return {
            "epochs": settings.epochs,
            "seconds": time.perf_counter() - began,
            "accuracy": evaluate(network, self.data.val),
            "config": asdict(settings),
        }


def table(record: Record) -> pd.DataFrame:
    """One row a way: epochs, mean seconds, accuracy in percent: its mean over seeds and its standard deviation."""
    frame = pd.DataFrame([row for row in record.values["rows"] if "seed" in row and "accuracy" in row])
    if frame.empty:
        return frame
    grouped = frame.assign(accuracy=100 * frame["accuracy"]).groupby("way")
    found = grouped["accuracy"].agg(["mean", "std", "count"])
    found.insert(0, "epochs", grouped["epochs"].first())
    found.insert(1, "seconds", grouped["seconds"].mean())
    return found.round(2)


def _told(record: Record) -> Iterator[str]:
    yield table(record).to_string()


BENCHMARK = Benchmark("Training", Expand, answer, _told, selecting=("seeds",))
