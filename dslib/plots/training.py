"""Figures of training: activations that fade, statistics that drift, curves, gains. Each returns a Figure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .networks import KEPT, LINEAR, MERGED, ORIGINAL, new_figure
from .search import COLOURS, MARKERS

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

HUES = tuple(colour for colour in COLOURS if colour != ORIGINAL)
BETWEEN = (0.0, 0.25, 0.5, 0.75, 1.0)  # how far out the activations are that are always drawn


def plot_fade(t: float | None = None) -> Figure:
    """A ReLU6 on its way out, (1 - t) * relu6(x) + t * x, over its input.

    Args:
        t: the one to bring out; default the first, the last and what lies between them, each with its name.
    """
    figure, axes = new_figure(5.0, 3.2)
    x = np.array([-3.0, 0.0, 6.0, 9.0])  # its corners
    curve = {at: (1 - at) * x.clip(0, 6) + at * x for at in (*BETWEEN, t or 0.0)}
    for i, at in enumerate(BETWEEN):
        colour = ORIGINAL if t is not None else (KEPT, "#56B4E9", LINEAR, "#D55E00", MERGED)[i]
        axes.plot(x, curve[at], color=colour, linewidth=1, label=f"t = {at:g}" if t is None else None)
    if t is not None:
        axes.plot(x, curve[t], color=MERGED, linewidth=2.5, label=f"t = {t:g}")
    axes.set(xlabel="input of the activation", ylabel="output")
    axes.legend(frameon=False)
    return figure


def plot_over_fade(frame: pd.DataFrame) -> Figure:
    """Accuracy over how far activations are out, a line a column.

    Args:
        frame: index t, columns accuracies, 0 to 1.
    """
    figure, axes = new_figure(6.0, 3.2)
    for i, name in enumerate(frame):
        axes.plot(frame.index, 100 * frame[name], MARKERS[i % 8] + "-", color=HUES[i % len(HUES)], label=name)
    axes.set(xlabel="t, how far out the activations are", ylabel="validation accuracy, %")
    axes.legend(frameon=False)
    return figure


def plot_drift(drifts: Mapping[str, pd.DataFrame], removed: Collection[str] = ()) -> Figure:
    """How far each BatchNorm's inputs are from what it has stored, from the input of the network to its output.

    Args:
        drifts: name of a network -> `batchnorm_drift` of it.
        removed: names of blocks whose BatchNorms are shaded.
    """
    figure, panels = new_figure(10.0, 3.4, columns=2)
    for axes, column in zip(panels, ("mean", "spread"), strict=True):
        for i, (name, frame) in enumerate(drifts.items()):
            axes.plot(
                np.arange(1, len(frame) + 1),
                frame[column],
                MARKERS[i % 8] + "-",
                color=HUES[i % len(HUES)],
                markersize=3,
                linewidth=1,
                label=name,
            )
        for place, norm in enumerate(next(iter(drifts.values())).index, 1):
            if norm.startswith(tuple(f"{block}." for block in removed)):
                axes.axvspan(place - 0.5, place + 0.5, color="#EEEEEE", linewidth=0, zorder=0)
        axes.set_xlabel("BatchNorm, counted from the input")
    panels[0].set_ylabel("distance of means, stored deviations")
    panels[1].set(ylabel="standard deviation / stored one", yscale="log")
    panels[1].legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def plot_curves(curves: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]], original: float | None = None) -> Figure:
    """Validation accuracy over epochs: each training a thin line, the mean of its kind a thick one.

    Args:
        curves: name -> histories of its trainings, rows with `epoch` and `val_accuracy` (0 to 1), equally long.
        original: accuracy of the network that was shrunk, 0 to 1.
    """
    figure, axes = new_figure(6.5, 3.6)
    if original is not None:
        axes.axhline(100 * original, color=ORIGINAL, linestyle="--", label="original")
    longest: list[int] = []
    for i, (name, histories) in enumerate(curves.items()):
        epochs = [row["epoch"] for row in histories[0]]
        paths = 100 * np.array([[row["val_accuracy"] for row in history] for history in histories])
        colour = HUES[i % len(HUES)]
        if len(paths) > 1:
            axes.plot(epochs, paths.T, color=colour, linewidth=0.7, alpha=0.6)
        axes.plot(epochs, paths.mean(0), MARKERS[i % 8] + "-", color=colour, linewidth=2, label=name)
        longest = max(longest, epochs, key=len)
    axes.set(xlabel="epoch", ylabel="validation accuracy, %", xticks=longest)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def plot_gains(gains: Mapping[str, pd.DataFrame], published: Mapping[str, pd.Series]) -> Figure:
    """Accuracy over plain finetuning's, in points, of each other way: ours filled with its spread, the paper's not.

    Args:
        gains: mask -> our rows: index the ways, columns `mean` and `std` of the gain over plain finetuning.
        published: mask, one of those -> the paper's gain, index the ways.
    """
    figure, axes = new_figure(6.5, 3.6)
    axes.axhline(0, color=ORIGINAL, linewidth=1)
    ways = list(next(iter(gains.values())).index)
    step = 0.8 / (2 * len(gains))
    for i, (mask, frame) in enumerate(gains.items()):
        colour, marker = HUES[i % len(HUES)], MARKERS[i % 8]
        place = np.arange(len(ways)) + step * (i - len(gains) + 0.5)
        axes.errorbar(
            place, frame["mean"], yerr=frame["std"], fmt=marker, color=colour, capsize=3, label=f"mask {mask}, ours"
        )
        if mask in published:
            axes.plot(
                place + step * len(gains),
                published[mask][ways],
                marker,
                color=colour,
                markerfacecolor="none",
                label=f"mask {mask}, paper",
            )
    axes.set_xticks(range(len(ways)), ways)
    axes.set(xlim=(-0.6, len(ways) - 0.4), ylabel="accuracy over plain finetuning's, points")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def plot_hours(hours: Mapping[str, float]) -> Figure:
    """How long each training of a run takes, one after another.

    Args:
        hours: name of a training -> its hours.
    """
    figure, axes = new_figure(6.5, 1.3)
    began = 0.0
    for (name, took), colour in zip(hours.items(), (KEPT, MERGED, LINEAR), strict=False):
        axes.barh(0, took, left=began, color=colour)
        axes.text(began + took / 2, 0, name, ha="center", va="center", color="white", weight="bold")
        began += took
    axes.set(xlabel="hours", yticks=[])
    return figure
