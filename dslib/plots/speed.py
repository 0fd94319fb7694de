"""Figures of what was measured on a device. Functions take data and return a Figure; axes carry units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..measuring import Peaks
from .networks import KEPT, LINEAR, MERGED, ORIGINAL, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {"original": ORIGINAL, "dense": "#56B4E9"}  # as in lab.js


def plot_roofline(peaks: Peaks, points: Mapping[tuple[str, str], tuple[float, float]]) -> Figure:
    """The device's roof, and networks below it.

    Args:
        peaks: of the device.
        points: (model, "original" or "dense") -> (FLOPs per byte, GFLOP/s reached).
    """
    figure, axes = new_figure(7.0, 4.2)
    intensities = [intensity for intensity, _ in points.values()]
    ridge = peaks.conv_gflops / peaks.bandwidth_gb_s
    ends = np.geomspace(min(*intensities, ridge) / 2, max(*intensities, ridge) * 2, 200)
    axes.plot(ends, [peaks.ceiling(x) for x in ends], color="#666666", linewidth=1.5)
    axes.annotate(
        f"{peaks.conv_gflops:.0f} GFLOP/s, convolutions",
        (ends[-1], peaks.conv_gflops),
        xytext=(0, 4),
        textcoords="offset points",
        ha="right",
    )
    for model in dict.fromkeys(model for model, _ in points):
        pair = [points[model, kind] for kind in COLOURS if (model, kind) in points]
        axes.plot(*zip(*pair, strict=True), color="#999999", linewidth=0.8, zorder=1)
        axes.annotate(model, pair[-1], xytext=(6, -3), textcoords="offset points", fontsize=8)
    for kind, colour in COLOURS.items():
        some = [point for (_, of), point in points.items() if of == kind]
        if not some:
            continue
        axes.plot(*zip(*some, strict=True), "o", color=colour, label=kind, zorder=2)
    axes.set(xscale="log", yscale="log", xlabel="FLOPs per byte moved at least", ylabel="GFLOP/s reached")
    axes.legend(frameon=False, loc="lower right")
    return figure


def plot_blocks(ms: Mapping[str, Mapping[str, float]], batch_size: int) -> Figure:
    """Bars: what each block costs, and what the one convolution costs that stands for it; ms per batch."""
    figure, axes = new_figure(7.0, 0.28 * len(ms) + 1.2)
    places = np.arange(len(ms))
    for i, (kind, colour) in enumerate(COLOURS.items()):
        axes.barh(places + (i - 0.5) * 0.38, [row[kind] for row in ms.values()], height=0.36, color=colour, label=kind)
    axes.set_yticks(places, list(ms))
    axes.invert_yaxis()
    axes.set_xlabel(f"latency, ms per batch of {batch_size}")
    axes.legend(frameon=False)
    return figure


def plot_speedups(speedups: Mapping[str, Mapping[str, float]], published: Mapping[str, Mapping[str, float]]) -> Figure:
    """Speed-ups of the dense counterparts: model -> where -> times as fast; published ones as hollow points."""
    figure, axes = new_figure(7.0, 0.42 * len(published or speedups) + 1.6)
    models = list(dict.fromkeys([*published, *speedups]))
    places = {model: -i for i, model in enumerate(models)}
    axes.axvline(1.0, color="#999999", linewidth=1)
    markers = "os^Dv<>pP*X"
    for filled, table in ((False, published), (True, speedups)):
        for i, where in enumerate(dict.fromkeys(where for row in table.values() for where in row)):
            found = [(row[where], places[model]) for model, row in table.items() if where in row]
            colour = MERGED if filled else LINEAR
            axes.plot(
                *zip(*found, strict=True),
                markers[i % len(markers)],
                color=colour,
                label=where,
                markersize=7,
                markerfacecolor=colour if filled else "none",
                linestyle="none",
            )
    axes.set_yticks([places[model] for model in models], models)
    axes.set(xlabel="dense counterpart, times as fast as the original", ylim=(0.6 - len(models), 0.6))
    axes.set_xlim(left=0)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    return figure


def plot_steps(rows: Sequence[Mapping[str, Any]], batch_size: int) -> Figure:
    """Images per second of original and dense at each step of `dslib bench waterfall`, and their ratio."""
    rows = [row for row in rows if "error" not in row]
    figure, axes = new_figure(7.0, 0.5 * len(rows) + 1.2)
    places, most = np.arange(len(rows)), 0.0
    for i, (kind, colour) in enumerate(COLOURS.items()):
        speeds = [row["networks"][kind]["images_per_s"] for row in rows]
        axes.barh(places + (i - 0.5) * 0.38, speeds, height=0.36, color=colour, label=kind)
        most = max(most, *speeds)
    for place, row in zip(places, rows, strict=True):
        axes.text(
            1.02 * max(values["images_per_s"] for values in row["networks"].values()),
            place,
            f"{row['speedup']:.2f} x",
            va="center",
        )
    axes.set_yticks(places, [row["name"] for row in rows])
    axes.invert_yaxis()
    axes.set(xlabel=f"images per second, batch {batch_size}", xlim=(0, 1.15 * most))
    axes.legend(frameon=False)
    return figure


def plot_prediction(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Predicted latency over measured latency of random masks; the band is 5 %."""
    figure, axes = new_figure(4.6, 4.2)
    measured, predicted = ([row[key] for row in rows] for key in ("measured_ms", "predicted_ms"))
    ends = np.array([0.95 * min(measured + predicted), 1.05 * max(measured + predicted)])
    axes.fill_between(ends, 0.95 * ends, 1.05 * ends, color=ORIGINAL, alpha=0.3, linewidth=0)
    axes.plot(ends, ends, color="#666666", linewidth=1)
    axes.plot(measured, predicted, "o", color=KEPT)
    axes.set(xlabel="measured, ms per batch", ylabel="predicted, ms per batch")
    return figure
