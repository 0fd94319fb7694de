"""What the tables of measurements share: which cases there are, and one case measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..algebra import in_channels
from ..errors import BadConfig, BadRecord, DslibError
from ..measuring import (
    Peaks,
    Timing,
    count_macs,
    count_parameters,
    dtype_for,
    find_peaks,
    measure,
    pick_device,
    this_machine,
    utilisation,
    working_memory_mib,
)
from ..records import Record, as_words, commit
from ..training import recalibrate_batchnorm
from .rows import Rows

if TYPE_CHECKING:
    import pandas as pd


SHOWN = ("images_per_s", "speedup", "speedup_q25", "speedup_q75")


class Case(NamedTuple):
    """What a row is measured at."""

    runtime: str
    precision: str
    batch_size: int


_CPU = (
    ("eager", "float32"),
    ("eager", "bfloat16"),
    ("onnxruntime", "float32"),
    ("openvino", "float32"),
    ("openvino", "bfloat16"),
)
_GPU = (
    ("eager", "float32"),
    ("eager", "tf32"),
    ("eager", "float16"),
    ("eager", "bfloat16"),
    ("compile", "float16"),
    ("cudagraph", "float16"),
)


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


@dataclass(frozen=True)
class Measured:
    """What a table is measured on.

    Args:
        device: as for `pick_device`.
        image_size: side in pixels.
        batch_size, runtime, precision: all combinations; default what `cases` says.
        rounds: measurements of each, in all passes; what their number leaves over is not measured.
        passes: the rounds are spread over so many, each network made ready anew for each and all others measured
            meanwhile: within one the machine is alike for all, from one to the next it may not be.
    """

    device: str = "auto"
    image_size: int = 224
    batch_size: tuple[int, ...] = ()
    runtime: tuple[str, ...] = ()
    precision: tuple[str, ...] = ()
    rounds: int = 30
    passes: int = 3

    def __post_init__(self) -> None:
        """Check the ranges."""
        good = 0 < self.passes <= self.rounds
        if not good:
            raise BadConfig(
                f"expected one pass or more, of one round or more each, found {self.passes} and {self.rounds}"
            )


class Table:
    """A record of networks at several cases, each row kept as it comes; the device's peaks are its first rows.

    Args:
        name: of the benchmark.
        measured: what it is measured on.
        out: the record's file; rows that stand there are not measured again, but for those of a busy machine.
        echo: is told each row.
        config: other settings of the benchmark.
    """

    def __init__(
        self, name: str, measured: Measured, out: Path | None, echo: Callable[[str], object], **config: Any
    ) -> None:
        self.device, self.image_size, self.echo = pick_device(measured.device), measured.image_size, echo
        self._rounds, self._passes = measured.rounds // measured.passes, measured.passes
        config = {**config, **asdict(measured), "device": str(self.device)}
        command = f"dslib bench {name} {as_words(config)}"
        self.rows = Rows(Record(name, command, config, {}, this_machine(self.device), commit()), out, idle=True)
        self.cases = cases(self.device, measured.batch_size, measured.runtime, measured.precision)
        self._peaks: dict[str, Peaks] = {}
        for precision in dict.fromkeys(case.precision for case in self.cases):
            row = self.rows.add({"peaks": precision}, partial(self._find_peaks, precision), keep_errors=True)
            if "error" not in row:
                self._peaks[precision] = Peaks(**{field.name: row[field.name] for field in fields(Peaks)})

    def _find_peaks(self, precision: str) -> dict[str, Any]:
        return asdict(find_peaks(self.device, precision))

    def add_sizes(self, model: str, networks: Mapping[str, nn.Module], **more: Any) -> None:
        """A row of what does not depend on the device: MACs, parameters (BatchNorm's counted), and what is given."""

        def sizes() -> dict[str, Any]:
            shape = self._shape(networks)
            return {
                "networks": {
                    name: {"macs": count_macs(network, shape), "parameters": count_parameters(network)}
                    for name, network in networks.items()
                },
                **more,
            }

        self.rows.add({"sizes": model}, sizes)

    def add_cases(self, model: str, networks: Mapping[str, nn.Module], cases: Sequence[Case]) -> None:
        """A row for each case: all networks in turns; speed-ups are over the first. One that fails says why."""
        parts: dict[Case, list[dict[str, Any]]] = {case: [] for case in cases}
        passes = list(product(range(self._passes), cases))
        for number, case in tqdm(passes, model, leave=False, disable=None):
            key = {"pass": number, "of": model, **case._asdict()}
            parts[case].append(self.rows.add(key, partial(self._measure, networks, case), keep_errors=True))
        for case, found in parts.items():
            key = {"model": model, **case._asdict()}
            self.echo(say(self.rows.add(key, partial(self._together, networks, case, found), keep_errors=True)))

    def _images(self, networks: Mapping[str, nn.Module], case: Case) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(case.batch_size, *self._shape(networks), generator=generator).to(self.device)

    def _measure(self, networks: Mapping[str, nn.Module], case: Case) -> dict[str, Any]:
        """One pass: every round's latency of every network."""
        placed = {name: network.to(self.device) for name, network in networks.items()}
        images = self._images(networks, case)
        timing = measure(placed, images, self._rounds, runtime=case.runtime, precision=case.precision)
        return {
            "ms": {name: ms.round(4).tolist() for name, ms in timing.ms.items()},
            "others": timing.others,
            "measured_batch_size": timing.batch_size,
            "as_run": timing.runtime,
            "busy": timing.busy,
        }

    def _together(
        self, networks: Mapping[str, nn.Module], case: Case, parts: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        """What several passes say."""
        failed = next((part["error"] for part in parts if "error" in part), None)
        if failed is not None:
            raise DslibError(str(failed))
        size = min(part["measured_batch_size"] for part in parts)  # memory may have sufficed for more once
        parts = [part for part in parts if part["measured_batch_size"] == size]
        ms = {name: np.concatenate([part["ms"][name] for part in parts]) for name in networks}
        others = max((part["others"] for part in parts if part["others"] is not None), default=None)
        timing = Timing(ms, size, str(self.device), parts[0]["as_run"], others)
        found, shape, first = timing.frame, self._shape(networks), next(iter(networks))
        for name in networks:
            found.loc[name, ["speedup", "speedup_q25", "speedup_q75"]] = timing.speedup(name, over=first)
        if case.precision in self._peaks:
            found = found.join(utilisation(networks, shape, timing, self._peaks[case.precision]))
        if case.runtime == "eager":
            images = self._images(networks, case)[:size].to(dtype_for(case.precision))
            found["working_memory_mib"] = [working_memory_mib(network, images) for network in networks.values()]
        return {
            "networks": found.T.to_dict(),
            "measured_batch_size": size,
            "as_run": timing.runtime,
            "busy": any(part["busy"] for part in parts),
            "others": timing.others,
        }

    def _shape(self, networks: Mapping[str, nn.Module]) -> tuple[int, int, int]:
        return in_channels(next(iter(networks.values()))), self.image_size, self.image_size


def say(row: Mapping[str, Any]) -> str:
    """One line about a row of `Table.add_cases`."""
    case = f"{row['model']}, {row['runtime']} {row['precision']}, batch {row['batch_size']}"
    if "error" in row:
        return f"{case}: {row['error']}"
    found = ", ".join(
        f"{name} {values['images_per_s']:.0f}/s ({values['speedup']:.2f} x)" for name, values in row["networks"].items()
    )
    size = row["measured_batch_size"]
    halved = "" if size == row["batch_size"] else f" (batch {size}: more did not fit)"
    return f"{case}{halved}: {found}{' (the machine was busy)' if row['busy'] else ''}"


def settle_batchnorm(model: nn.Module, image_size: int) -> None:
    """Give random weights statistics to go with them, in place: unnormalised maps of deep networks overflow float16."""
    shape = 8, in_channels(model), image_size, image_size
    recalibrate_batchnorm(model, [torch.randn(shape, generator=torch.Generator().manual_seed(0))])


def machine_name(record: Record) -> str:
    """What to call a record's machine in a table."""
    machine = record.machine
    threads = f"{machine['threads']} thread{'' if machine['threads'] == 1 else 's'}"
    return str(machine.get("gpu") or f"{machine['processor']}, {threads}")


def side_by_side(records: Sequence[Record]) -> pd.DataFrame:
    """Images per second and speed-ups of several records, one column each a machine."""
    import pandas as pd

    parts = []
    for record in records:
        known = record.name in ("table1", "masks")
        if not known:
            raise BadRecord(f"expected records of table1 or masks, found one of {record.name}")
        lines = [
            {
                **{key: row[key] for key in ("model", "runtime", "precision", "batch_size")},
                "network": name,
                **{key: values[key] for key in SHOWN},
            }
            for row in record.values["rows"]
            if "networks" in row and "runtime" in row
            for name, values in row["networks"].items()
        ]
        index = ["model", "network", "runtime", "precision", "batch_size"]
        part = pd.DataFrame(lines, columns=[*index, *SHOWN]).set_index(index)
        part.columns = pd.MultiIndex.from_product([[machine_name(record)], part.columns])
        parts.append(part)
    return pd.concat(parts, axis=1, sort=False)
