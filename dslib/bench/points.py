"""What the record of `dslib bench frontier` says: its points, the fastest at an accuracy, and whose lead that is."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import pandas as pd

from ..planning import unbeaten
from ..records import Record


def table(record: Record) -> pd.DataFrame:
    """The rows of points, those that failed too, with their `error`; of what each found, the seconds of its `training`.

    `images_per_s` is the original's, of its median latency over all rows, times the speed-up that was measured in
    turns: so rows that were made while the machine did more can be compared with the others.
    """
    rows = [row for row in record.values["rows"] if "seed" in row]
    frame = pd.DataFrame([{name: value for name, value in row.items() if name != "found"} for row in rows])
    frame["training"] = [row.get("found", {}).get("seconds", {}).get("training") for row in rows]
    for name in ("accuracy", "original_ms", "measured_speedup"):
        frame[name] = frame.get(name, float("nan"))  # where all have failed
    original = 1000 * record.config["latency_batch"] / frame["original_ms"].median()
    frame["images_per_s"] = original * frame["measured_speedup"]
    return frame


def fastest(found: pd.DataFrame, floor: float) -> pd.Series | None:
    """The row of `baselines.seed_means` with the highest throughput of those that reach `floor`, or None."""
    good = found[found["accuracy"] >= floor]
    return None if good.empty else good.loc[good["images_per_s"].idxmax()]


def lead(found: pd.DataFrame, ours: Collection[str], original: tuple[float, float]) -> pd.DataFrame:
    """How much faster our networks are at equal accuracy, over the upper half of the accuracies on the frontier.

    At each accuracy that a network there has, the original's own excepted: the fastest of ours with at least that, and
    the fastest of the others; the original is anybody's.

    Args:
        found: as from `baselines.seed_means`.
        ours: names of our methods.
        original: its throughput and accuracy.
    Returns:
        One row an accuracy, the highest first: `accuracy`, `ours` and `others` in images per second, `factor`, and its
        `spread`, the standard deviation that those of both over seeds amount to.
    """
    speeds, accuracies = np.vstack([original, found[["images_per_s", "accuracy"]]]).T
    levels = sorted(accuracies[unbeaten(speeds, -accuracies)].tolist(), reverse=True)
    middle = (levels[0] + levels[-1]) / 2
    mine = found["method"].isin(list(ours))

    def speed(part: pd.DataFrame, floor: float) -> tuple[float, float]:
        row = fastest(part, floor)
        anybodys = (original[0] if original[1] >= floor else 0.0, 0.0)
        own = (0.0, 0.0) if row is None else (float(row["images_per_s"]), float(row["images_per_s_std"]))
        return max(anybodys, own)

    rows = []
    for level in (level for level in levels if level >= middle and level != original[1]):
        (our, std), (other, others_std) = speed(found[mine], level), speed(found[~mine], level)
        factor = our / other if other else float("nan")
        shares = np.nan_to_num([std / our if our else 0.0, others_std / other if other else 0.0])
        rows.append([level, our, other, factor, factor * float(np.hypot(*shares))])
    return pd.DataFrame(rows, columns=["accuracy", "ours", "others", "factor", "spread"])
