"""What the tables of measurements share: which cases there are, and one case measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..blocks import in_channels
from ..errors import BadRecord, require
from ..measuring import count_macs, count_parameters, measure, working_memory_mib
from ..records import Record
from ..roofline import Peaks, find_peaks, utilisation
from ..runtimes import dtype_for
from .rows import Rows

if TYPE_CHECKING:
    import pandas as pd


SHOWN = ("images_per_s", "speedup", "speedup_q25", "speedup_q75")


class Case(NamedTuple):
    """What a row is measured at."""

    runtime: str
    precision: str
    batch_size: int


_CPU = (("eager", "float32"), ("eager", "bfloat16"), ("onnxruntime", "float32"), ("openvino", "float32"),
        ("openvino", "bfloat16"))  # fmt: skip
_GPU = (("eager", "float32"), ("eager", "tf32"), ("eager", "float16"), ("eager", "bfloat16"), ("compile", "float16"),
        ("cudagraph", "float16"))  # fmt: skip


def cases(
    device: torch.device, batch_sizes: Sequence[int] = (), runtimes: Sequence[str] = (), precisions: Sequence[str] = ()
) -> list[Case]:
    """What to measure on a device: every combination of what is given, else what is worth it there.

    On a CPU batches of 1 and 8, `torch.compile` at 8 alone, as it takes long; elsewhere batches of 128 and 256.
    """
    sizes = tuple(batch_sizes) or ((1, 8) if device.type == "cpu" else (128, 256))
    if runtimes or precisions:
        return [Case(r, p, b) for b in sizes for r in runtimes or ("eager",) for p in precisions or ("float32",)]
    if device.type == "cpu":
        found = [Case(*way, size) for size in sizes for way in _CPU]
        return found + [Case("compile", "float32", size) for size in sizes if size == 8]
    ways = _GPU if device.type == "cuda" else (("eager", "float32"), ("eager", "float16"))
    return [Case(*way, size) for size in sizes for way in ways]


def add_peaks(rows: Rows, device: torch.device, precisions: Iterable[str]) -> dict[str, Peaks]:
    """The device's peaks, a row for each precision."""
    found = {}
    for precision in dict.fromkeys(precisions):
        row = rows.add({"peaks": precision}, partial(_peaks, device, precision), keep_errors=True)
        if "error" not in row:
            found[precision] = Peaks(**{field.name: row[field.name] for field in fields(Peaks)})
    return found


def _peaks(device: torch.device, precision: str) -> dict[str, Any]:
    return asdict(find_peaks(device, precision))


def add_sizes(rows: Rows, model: str, networks: Mapping[str, nn.Module], image_size: int, **more: Any) -> None:
    """A row of what does not depend on the device: MACs, parameters (BatchNorm's counted), and what else is given."""

    def sizes() -> dict[str, Any]:
        shape = (in_channels(next(iter(networks.values()))), image_size, image_size)
        return {
            "networks": {
                name: {"macs": count_macs(network, shape), "parameters": count_parameters(network)}
                for name, network in networks.items()
            },
            **more,
        }

    rows.add({"sizes": model}, sizes)


def add_case(
    rows: Rows, model: str, networks: Mapping[str, nn.Module], image_size: int, case: Case, device: torch.device,
    peaks: Mapping[str, Peaks], rounds: int,
) -> dict[str, Any]:  # fmt: skip
    """A row: all networks at one case, in turns; speed-ups are over the first. One that fails says why."""

    def measured() -> dict[str, Any]:
        first = next(iter(networks))
        shape = (in_channels(networks[first]), image_size, image_size)
        images = torch.randn(case.batch_size, *shape, generator=torch.Generator().manual_seed(0)).to(device)
        placed = {name: network.to(device) for name, network in networks.items()}
        timing = measure(placed, images, rounds, runtime=case.runtime, precision=case.precision)
        found = timing.frame
        for name in networks:
            found.loc[name, ["speedup", "speedup_q25", "speedup_q75"]] = timing.speedup(name, over=first)
        if case.precision in peaks:
            found = found.join(utilisation(networks, shape, timing, peaks[case.precision]))
        if case.runtime == "eager":
            part = images[: timing.batch_size].to(dtype_for(case.precision))
            found["working_memory_mib"] = [working_memory_mib(network, part) for network in placed.values()]
        return {
            "networks": found.T.to_dict(), "measured_batch_size": timing.batch_size, "as_run": timing.runtime,
            "busy": timing.busy, "others": timing.others,
        }  # fmt: skip

    return rows.add({"model": model, **case._asdict()}, measured, keep_errors=True)


def say(row: Mapping[str, Any]) -> str:
    """One line about a row of `add_case`."""
    case = f"{row['model']}, {row['runtime']} {row['precision']}, batch {row['batch_size']}"
    if "error" in row:
        return f"{case}: {row['error']}"
    found = ", ".join(f"{name} {values['images_per_s']:.0f}/s ({values['speedup']:.2f} x)"
                      for name, values in row["networks"].items())  # fmt: skip
    halved = f" (batch {row['measured_batch_size']}: more did not fit)" * (
        row["measured_batch_size"] != row["batch_size"]
    )
    return f"{case}{halved}: {found}{' (the machine was busy)' if row['busy'] else ''}"


@torch.no_grad()
def settle_batchnorm(model: nn.Module, image_size: int) -> None:
    """Give random weights statistics to go with them, in place: unnormalised maps of deep networks overflow float16."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.reset_running_stats()
            module.momentum = None  # the mean over all batches
    model.train()
    model(torch.randn(8, in_channels(model), image_size, image_size, generator=torch.Generator().manual_seed(0)))
    model.eval()


def machine_name(record: Record) -> str:
    """What to call a record's machine in a table."""
    machine = record.machine
    return str(machine.get("gpu") or f"{machine['processor']}, {machine['threads']} threads")


def side_by_side(records: Sequence[Record]) -> pd.DataFrame:
    """Images per second and speed-ups of several records, one column each a machine."""
    import pandas as pd

    parts = []
    for record in records:
        known = record.name in ("table1", "masks")
        require(known, f"expected records of table1 or masks, found one of {record.name}", BadRecord)
        lines = [
            {
                **{key: row[key] for key in ("model", "runtime", "precision", "batch_size")}, "network": name,
                **{key: values[key] for key in SHOWN},
            }
            for row in record.values["rows"] if "networks" in row and "runtime" in row
            for name, values in row["networks"].items()
        ]  # fmt: skip
        index = ["model", "network", "runtime", "precision", "batch_size"]
        part = pd.DataFrame(lines, columns=[*index, *SHOWN]).set_index(index)
        part.columns = pd.MultiIndex.from_product([[machine_name(record)], part.columns])
        parts.append(part)
    return pd.concat(parts, axis=1, sort=False)
