"""Latencies of a frontier's points once more, with nothing else running, or on another runtime: `dslib bench retime`.

Weights do not change a latency: networks are built again from what the record says of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..baselines import Budget, rebuilt
from ..data import load_data
from ..errors import BadConfig, BadRecord
from ..measuring import Timing, pick_device, this_machine
from ..models import load_model
from ..records import Record

ROUNDS = 31  # of each network


def record_retimed(
    path: Path, runtime: str | None = None, device: str | None = None, echo: Callable[[str], object] = print
) -> Record:
    """The record with the latency of each point measured anew, in turns with the original's; accuracies stay.

    A point whose record does not say what is left of the network has no latency then.

    Args:
        path: of a record of `dslib bench frontier`.
        runtime, device: to measure on; default the record's. Budgets were met on the record's.
        echo: is told each point.
    Raises:
        BadRecord: if the file is of another benchmark.
        BadConfig: if this process has another number of threads, on a CPU.
    """
    record = Record.load(path)
    if record.name != "frontier":
        raise BadRecord(f"{path}: expected a record of frontier, found one of {record.name}")
    config = {
        **record.config,
        "runtime": runtime or record.config["runtime"],
        "device": str(pick_device(device or record.config["device"])),
    }
    threads, own = record.machine.get("threads"), torch.get_num_threads()
    if config["device"] == "cpu" and threads != own:
        raise BadConfig(
            f"{path}: its budgets were met with {threads} threads, these are {own}: set OMP_NUM_THREADS={threads}"
        )
    data = load_data(config["data"], config["image_size"])
    options = {name: json.loads(value) for name, _, value in (one.partition("=") for one in config["options"])}
    model = load_model(config["model"], data.classes, options=options).model.to(config["device"]).eval()
    budget = Budget(2.0, data.image_size, config["latency_batch"], config["runtime"], config["precision"], ROUNDS)
    rows = [
        _retimed(row, model, budget, echo) if "found" in row and "seed" in row else row for row in record.values["rows"]
    ]
    words = f"dslib bench retime FRONTIER --runtime {config['runtime']} --device {config['device']}"
    made = record.command.partition("; dslib bench retime ")[0]  # latencies of an earlier time are gone
    return replace(
        record,
        config=config,
        values={**record.values, "rows": rows},
        command=f"{made}; {words}",
        machine=this_machine(config["device"]),
    )


def _retimed(row: dict[str, Any], model: nn.Module, budget: Budget, echo: Callable[[str], object]) -> dict[str, Any]:
    network = rebuilt(row["method"], model, budget.image_size, row["found"])
    rest = {name: value for name, value in row.items() if name not in LATENCY}
    what = f"{row['method']}, asked for {row['speedup']:g} times, seed {row['seed']}"
    if network is None:
        echo(f"{what}: its record does not say which channels are left: no latency")
        return rest
    found = latency(budget.steady(model, network, quiet=True), row["speedup"])
    echo(f"{what}: {found['measured_speedup']:.2f} times{', on a busy machine' if found['timing_busy'] else ''}")
    return {**rest, **found}


def latency(timing: Timing, asked: float) -> dict[str, Any]:
    """The part of a point's row about its latency, from a measurement of `original` and `network` in turns.

    `meets` says whether the network is as quick as asked for (2 % short are allowed).
    """
    ratio, low, high = timing.speedup("network", over="original")
    return {
        "meets": ratio >= 0.98 * asked,
        "ms": timing.median("network"),
        "original_ms": timing.median("original"),
        "measured_speedup": ratio,
        "q25": low,
        "q75": high,
        "timing_busy": timing.busy,
        "runtime": timing.runtime,
    }


LATENCY = ("meets", "ms", "original_ms", "measured_speedup", "q25", "q75", "timing_busy", "runtime")
