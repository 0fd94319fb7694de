"""How fast are a frontier's networks with nothing else running, or on another runtime?"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from ..baselines import Budget, rebuilt
from ..data import load_data
from ..errors import BadConfig, BadRecord
from ..measuring import Timing, pick_device, this_machine
from ..models import load_model
from ..records import Record
from .benchmark import Benchmark, Context, Values, speedup_of
from .settings import ON_RUNTIMES, BenchSettings, argument, setting

ROUNDS = 31  # of each network


@dataclass(frozen=True)
class Retime(BenchSettings):
    """The record with the latency of each point measured anew, in turns with the original's; accuracies stay.

    Weights do not change a latency: networks are built again from what the record says of them. A point whose record
    does not say what is left of the network has no latency then.

    Args:
        record: of `dslib bench frontier`.
        runtime: default the record's. Budgets were met on the record's.
        device: default the record's.
    """

    record: Path = argument()
    runtime: str | None = setting(None, ON_RUNTIMES)
    device: str | None = None


def answer(config: Retime, context: Context[Retime]) -> Record:
    """The new record.

    Raises:
        BadRecord: if the file is of another benchmark.
        BadConfig: if this process has another number of threads, on a CPU.
    """
    path, record = config.record, Record.load(config.record)
    if record.name != "frontier":
        raise BadRecord(f"{path}: expected a record of frontier, found one of {record.name}")
    device = str(pick_device(config.device or record.config["device"]))
    settings = {**record.config, "runtime": config.runtime or record.config["runtime"], "device": device}
    threads, own = record.machine.get("threads"), torch.get_num_threads()
    if device == "cpu" and threads != own:
        raise BadConfig(
            f"{path}: its budgets were met with {threads} threads, these are {own}: set OMP_NUM_THREADS={threads}"
        )
    data = load_data(settings["data"], settings["image_size"])
    options = {name: json.loads(value) for name, _, value in (one.partition("=") for one in settings["options"])}
    model = load_model(settings["model"], data.classes, options=options).model.to(device).eval()
    budget = Budget(2.0, data.image_size, settings["latency_batch"], settings["runtime"], settings["precision"], ROUNDS)
    rows = [
        _retimed(row, model, budget, context.echo) if "found" in row and "seed" in row else row
        for row in record.values["rows"]
    ]
    made = record.command.partition("; dslib bench retime ")[0]  # latencies of an earlier time are gone
    command = f"{made}; dslib bench retime FRONTIER --runtime {settings['runtime']} --device {device}"
    values, machine = {**record.values, "rows": rows}, this_machine(device)
    return replace(record, config=settings, values=values, command=command, machine=machine)


def _retimed(row: Values, model: nn.Module, budget: Budget, echo: Callable[[str], object]) -> Values:
    network = rebuilt(row["method"], model, budget.image_size, row["found"])
    rest = {name: value for name, value in row.items() if name not in LATENCY}
    what = f"{row['method']}, asked for {row['speedup']:g} times, seed {row['seed']}"
    if network is None:
        echo(f"{what}: its record does not say which channels are left: no latency")
        return rest
    found = latency(budget.steady(model, network, quiet=True), row["speedup"])
    echo(f"{what}: {found['measured_speedup']:.2f} times{', on a busy machine' if found['timing_busy'] else ''}")
    return {**rest, **found}


def latency(timing: Timing, asked: float) -> Values:
    """The part of a point's row about its latency, from a measurement of `original` and `network` in turns.

    `meets` says whether the network is as quick as asked for (2 % short are allowed).
    """
    times = speedup_of(timing, "network", "original", "measured_speedup")
    return {
        "meets": times["measured_speedup"] >= 0.98 * asked,
        "ms": timing.median("network"),
        "original_ms": timing.median("original"),
        **times,
        "timing_busy": timing.busy,
        "runtime": timing.runtime,
    }


LATENCY = ("meets", "ms", "original_ms", "measured_speedup", "q25", "q75", "timing_busy", "runtime")
BENCHMARK = Benchmark("Against rivals", Retime, answer, out="required")
