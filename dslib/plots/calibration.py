"""Figures of networks calibrated without labels: the fit of one block, accuracy over k and over images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ..records import Record
from ..sites import Mask
from .drawing import LINEAR, MERGED, ORIGINAL, finished, new_figure
from .networks import mask_pane


def plot_fit(x: np.ndarray, y: np.ndarray, lines: Mapping[str, tuple[float, float]]) -> Figure:
    """A bent function's values (x, y) and straight ones beside them: name -> (slope, value at 0)."""
    _, axes = new_figure(6.0, 3.2)
    axes.plot(x, y, ".", color=ORIGINAL, markersize=3, label="with the activation")
    ends = np.array([x.min(), x.max()])
    for (name, (slope, start)), colour in zip(lines.items(), (LINEAR, MERGED), strict=True):
        axes.plot(ends, slope * ends + start, color=colour, linewidth=2, label=name)
    return finished(axes, xlabel="input", ylabel="output")


def plot_depths(accuracy: pd.Series, others: Sequence[tuple[int, float]]) -> Figure:
    """Accuracy over k: of the ranked masks a line, of others (k, accuracy) points."""
    _, axes = new_figure(6.5, 3.6)
    axes.plot(accuracy.index, 100 * accuracy, "o-", color=MERGED, label="ranked without labels")
    axes.plot([k for k, _ in others], [100 * a for _, a in others], "x", color=LINEAR, label="random masks")
    return finished(axes, xlabel="k, sites kept", ylabel="accuracy, %", xticks=sorted(accuracy.index))


def plot_over_images(rows: pd.DataFrame, original: float) -> Figure:
    """Accuracy over the number of images calibrated with: a point for each seed, a line through the medians.

    Args:
        rows: columns `images` and `accuracy` (0 to 1).
        original: the original's accuracy.
    """
    _, axes = new_figure(6.5, 3.4)
    middle = 100 * rows.groupby("images")["accuracy"].median()
    axes.axhline(100 * original, color=ORIGINAL, linestyle="--", label="original")
    axes.plot(middle.index, middle, color=MERGED, label="calibrated, median")
    axes.plot(rows["images"], 100 * rows["accuracy"], "o", color=MERGED, markersize=4, label="one seed")
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(middle.index), [f"{n:,}" for n in middle.index], minor=False)
    return finished(axes, xlabel="unlabelled images", ylabel="accuracy, %")


def speed_panes(record: Record) -> dict[str, str]:
    """For each k of a record of `dslib bench depths`: accuracy, speed-up, and the blocks that are kept."""

    def caption(row: Mapping[str, Any], sites: int) -> str:
        said = f"<b>{row['k']} of {sites} blocks keep their activations: {100 * row['accuracy']:.1f} % accuracy"
        disturbed = " (measured while the machine was busy)" if row.get("busy") else ""
        return f"{said}, {row['speedup']:.2f} times as fast</b>{disturbed}, without training and without a label"

    return _panes(record, caption)


def depth_panes(record: Record) -> dict[str, str]:
    """For each k of a record of `dslib bench depths`: accuracy, agreement, seconds, and the blocks that are kept."""

    def caption(row: Mapping[str, Any], _: int) -> str:
        known = f"accuracy {100 * row['accuracy']:.1f} %, agreement {100 * row['agreement']:.1f} %"
        return f"<b>k = {row['k']}</b>: {known}, calibrated in {row['seconds']:.0f} s"

    return dict(sorted(_panes(record, caption).items(), key=lambda pane: int(pane[0])))


def _panes(record: Record, caption: Callable[[Mapping[str, Any], int], str]) -> dict[str, str]:
    names = list(record.values["importance"])
    return {
        str(row["k"]): mask_pane(caption(row, len(names)), Mask({name: name not in row["removed"] for name in names}))
        for row in record.values["depths"]
    }
