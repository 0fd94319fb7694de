"""What do several machines' records of table1 or masks say, side by side?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from ..errors import BadRecord
from ..records import Record
from .benchmark import Benchmark, Context, Values
from .settings import BenchSettings, argument

SHOWN = ("images_per_s", "speedup", "speedup_q25", "speedup_q75")


@dataclass(frozen=True)
class Compare(BenchSettings):
    """Images per second and speed-ups, one column each a machine.

    Args:
        files: the records.
    """

    files: tuple[Path, ...] = argument()


def answer(config: Compare, _: Context[Compare]) -> Values:
    """The table as text."""
    return {"table": side_by_side([Record.load(file) for file in config.files]).round(2).to_string()}


def side_by_side(records: Sequence[Record]) -> pd.DataFrame:
    """Images per second and speed-ups of several records, one column each a machine."""
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
        part.columns = pd.MultiIndex.from_product([[record.machine_name], part.columns])
        parts.append(part)
    return pd.concat(parts, axis=1, sort=False)


BENCHMARK = Benchmark(
    "What does it cost and save here?", Compare, answer, lambda record: [record.values["table"]], out="none"
)
