"""Figures of what was measured on a device: original networks and their dense counterparts, rooflines, predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor, nn

from ..measuring import Peaks, measure
from ..records import Record
from .drawing import BESIDE, KEPT, LINEAR, MERGED, ORIGINAL, draw_bars, finished, new_figure

PAIR = {"original": ORIGINAL, "dense": "#56B4E9"}  # as in lab.js


def plot_roofline(peaks: Peaks, points: Mapping[tuple[str, str], tuple[float, float]]) -> Figure:
    """The device's roof, and networks below it.

    Args:
        peaks: of the device.
        points: (model, "original" or "dense") -> (FLOPs per byte, GFLOP/s reached).
    """
    _, axes = new_figure(7.0, 4.2)
    intensities = [intensity for intensity, _ in points.values()]
    ridge = peaks.conv_gflops / peaks.bandwidth_gb_s
    ends = np.geomspace(min(*intensities, ridge) / 2, max(*intensities, ridge) * 2, 200)
    axes.plot(ends, [peaks.ceiling(x) for x in ends], color="#666666", linewidth=1.5)
    text, corner = f"{peaks.conv_gflops:.0f} GFLOP/s, convolutions", (ends[-1], peaks.conv_gflops)
    axes.annotate(text, corner, xytext=(0, 4), textcoords="offset points", ha="right")
    for model in dict.fromkeys(model for model, _ in points):
        pair = [points[model, kind] for kind in PAIR if (model, kind) in points]
        axes.plot(*zip(*pair, strict=True), color="#999999", linewidth=0.8, zorder=1)
        axes.annotate(model, pair[-1], xytext=(6, -3), textcoords="offset points", fontsize=8)
    for kind, colour in PAIR.items():
        some = [point for (_, of), point in points.items() if of == kind]
        if some:
            axes.plot(*zip(*some, strict=True), "o", color=colour, label=kind, zorder=2)
    labels = {"xlabel": "FLOPs per byte moved at least", "ylabel": "GFLOP/s reached"}
    return finished(axes, {"loc": "lower right"}, xscale="log", yscale="log", **labels)


def roofline_of(record: Record, case: tuple[str, str, int]) -> tuple[Peaks, dict[tuple[str, str], tuple[float, float]]]:
    """The arguments of `plot_roofline`, from a record of `dslib bench table1`: what was reached in float32.

    Args:
        record: as `dslib bench table1` writes it.
        case: runtime, precision and batch size of the networks.
    """
    rows = [row for row in record.values["rows"] if "error" not in row]
    roof = next(row for row in rows if row.get("peaks") == "float32")
    measured = [row for row in rows if "model" in row and (row["runtime"], row["precision"], row["batch_size"]) == case]
    points = {
        (row["model"], kind): (values["flops_per_byte"], values["gflops"])
        for row in measured
        for kind, values in row["networks"].items()
    }
    return Peaks(**{name: roof[name] for name in Peaks.__dataclass_fields__}), points


def plot_blocks(ms: Mapping[str, Mapping[str, float]], batch_size: int) -> Figure:
    """Bars: what each block costs, and what the one convolution costs that stands for it; ms per batch."""
    _, axes = new_figure(7.0, 0.28 * len(ms) + 1.2)
    draw_bars(axes, list(ms), {kind: [row[kind] for row in ms.values()] for kind in PAIR}, tuple(PAIR.values()))
    return finished(axes, xlabel=f"latency, ms per batch of {batch_size}")


def plot_speedups(speedups: Mapping[str, Mapping[str, float]], published: Mapping[str, Mapping[str, float]]) -> Figure:
    """Speed-ups of the dense counterparts: model -> where -> times as fast; published ones as hollow points."""
    _, axes = new_figure(7.0, 0.42 * len(published or speedups) + 1.6)
    models = list(dict.fromkeys([*published, *speedups]))
    places = {model: -i for i, model in enumerate(models)}
    axes.axvline(1.0, color="#999999", linewidth=1)
    markers = "os^Dv<>pP*X"
    for table, colour, face in ((published, LINEAR, "none"), (speedups, MERGED, MERGED)):
        for i, where in enumerate(dict.fromkeys(where for row in table.values() for where in row)):
            found = [(row[where], places[model]) for model, row in table.items() if where in row]
            kind = {"color": colour, "markerfacecolor": face, "markersize": 7, "linestyle": "none", "label": where}
            axes.plot(*zip(*found, strict=True), markers[i % len(markers)], **kind)
    axes.set_yticks([places[model] for model in models], models)
    axes.set_xlim(left=0)
    label = "dense counterpart, times as fast as the original"
    return finished(axes, BESIDE | {"fontsize": 8}, xlabel=label, ylim=(0.6 - len(models), 0.6))


def dense_rows(records: Sequence[Record], models: Sequence[str] = ()) -> pd.DataFrame:
    """What `dslib bench table1` measured of original networks and their dense counterparts, one row a case.

    Args:
        records: one of each machine.
        models: those that come first, in this order.
    """
    found = pd.DataFrame(
        {
            "machine": record.machine_name,
            "model": row["model"],
            "batch": row["batch_size"],
            "runtime": f"{row['runtime']} {row['precision']}",
            "original, images/s": row["networks"]["original"]["images_per_s"],
            "dense, images/s": dense["images_per_s"],
            "times as fast": dense["speedup"],
            "half of the rounds between": f"{dense['speedup_q25']:.2f} and {dense['speedup_q75']:.2f}",
            "machine busy": "yes" if row["busy"] else "",
        }
        for record in records
        for row in record.values["rows"]
        if "runtime" in row and "networks" in row
        for dense in [row["networks"]["dense"]]
    )
    places = {model: place for place, model in enumerate(dict.fromkeys([*models, *found["model"]]))}
    return found.sort_values(
        ["machine", "model"], key=lambda column: column.map(lambda value: places.get(value, value))
    )


def by_model(rows: pd.DataFrame) -> dict[str, dict[str, float]]:
    """What `plot_speedups` draws, from rows with `model`, `where` and `times as fast`."""
    parts = rows.groupby("model", sort=False)
    return {model: dict(zip(part["where"], part["times as fast"], strict=True)) for model, part in parts}


def case_panes(rows: pd.DataFrame) -> dict[str, dict[str, str]]:
    """Of `dense_rows`: batch size -> runtime -> the table of all networks."""

    def pane(batch: int, runtime: str) -> str:
        some = rows[(rows["batch"] == batch) & (rows["runtime"] == runtime)].drop(columns=["batch", "runtime"])
        return some.to_html(index=False, float_format="{:.2f}".format) if len(some) else "<p>Not recorded.</p>"

    runtimes = sorted(rows["runtime"].unique())
    return {
        str(batch): {runtime: pane(batch, runtime) for runtime in runtimes} for batch in sorted(rows["batch"].unique())
    }


def mask_speeds(record: Record) -> pd.DataFrame:
    """Speed-ups that `dslib bench masks` measured: a row a network, a column a batch size and runtime."""
    return pd.DataFrame(
        {
            (f"batch {row['batch_size']}", f"{row['runtime']} {row['precision']}"): {
                name: values["speedup"] for name, values in row["networks"].items()
            }
            for row in record.values["rows"]
            if "model" in row and "networks" in row
        }
    )


def plot_steps(rows: Sequence[Mapping[str, Any]], batch_size: int) -> Figure:
    """Images per second of original and dense at each step of `dslib bench waterfall`, and their ratio."""
    rows = [row for row in rows if "error" not in row]
    _, axes = new_figure(7.0, 0.5 * len(rows) + 1.2)
    speeds = {kind: [row["networks"][kind]["images_per_s"] for row in rows] for kind in PAIR}
    draw_bars(axes, [row["name"] for row in rows], speeds, tuple(PAIR.values()))
    longest = np.max(list(speeds.values()), axis=0)
    for place, (row, most) in enumerate(zip(rows, longest, strict=True)):
        axes.text(1.02 * most, place, f"{row['speedup']:.2f} x", va="center")
    return finished(axes, xlabel=f"images per second, batch {batch_size}", xlim=(0, 1.15 * longest.max()))


def plot_prediction(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Predicted latency over measured latency of random masks; the band is 5 %."""
    _, axes = new_figure(4.6, 4.2)
    measured, predicted = ([row[key] for row in rows] for key in ("measured_ms", "predicted_ms"))
    ends = np.array([0.95 * min(measured + predicted), 1.05 * max(measured + predicted)])
    axes.fill_between(ends, 0.95 * ends, 1.05 * ends, color=ORIGINAL, alpha=0.3, linewidth=0)
    axes.plot(ends, ends, color="#666666", linewidth=1)
    axes.plot(measured, predicted, "o", color=KEPT)
    return finished(axes, xlabel="measured, ms per batch", ylabel="predicted, ms per batch")


def timed(networks: Mapping[str, nn.Module], images: Tensor, caption: str = "") -> str:
    """A pane: a caption above the latencies of networks, measured now, in turns."""
    return f"{caption}{measure(dict(networks), images, rounds=9).frame.round(2).to_html()}"
