"""Figures of training: activations that fade, statistics that drift, curves, gains, hours."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from .drawing import BESIDE, COLOURS, KEPT, LINEAR, MERGED, ORIGINAL, finished, new_figure, style, to_svg

BETWEEN = {0.0: KEPT, 0.25: "#56B4E9", 0.5: LINEAR, 0.75: "#D55E00", 1.0: MERGED}  # how far out: always drawn


def plot_functions(x: Any, target: Any, found: Any, names: tuple[str, str]) -> Figure:
    """A function (x, target), and over it the one that was found (x, found), each with its name."""
    _, axes = new_figure(5.0, 3.0)
    axes.plot(x, target, color=ORIGINAL, linewidth=4, label=names[0])
    axes.plot(x, found, color=KEPT, label=names[1])
    return finished(axes, xlabel="x", ylabel="output")


def plot_fade(t: float | None = None) -> Figure:
    """A ReLU6 on its way out, (1 - t) * relu6(x) + t * x, over its input.

    Args:
        t: the one to bring out; default the first, the last and what lies between them, each with its name.
    """
    _, axes = new_figure(5.0, 3.2)
    x = np.array([-3.0, 0.0, 6.0, 9.0])  # its corners

    def draw(at: float, **line: Any) -> None:
        axes.plot(x, (1 - at) * x.clip(0, 6) + at * x, **line)

    for at, colour in BETWEEN.items():
        named = {"color": colour, "label": f"t = {at:g}"} if t is None else {"color": ORIGINAL}
        draw(at, linewidth=1, **named)
    if t is not None:
        draw(t, color=MERGED, linewidth=2.5, label=f"t = {t:g}")
    return finished(axes, xlabel="input of the activation", ylabel="output")


def plot_over_fade(frame: pd.DataFrame) -> Figure:
    """Accuracy over how far activations are out, a line a column.

    Args:
        frame: index t, columns accuracies, 0 to 1.
    """
    _, axes = new_figure(6.0, 3.2)
    for i, name in enumerate(frame):
        axes.plot(frame.index, 100 * frame[name], **style(i), label=name)
    return finished(axes, xlabel="t, how far out the activations are", ylabel="validation accuracy, %")


def fade_panes(accuracies: Mapping[str, tuple[float, float]]) -> dict[str, str]:
    """For each t: accuracy with BatchNorm's statistics as stored and gathered anew, and the activation.

    Args:
        accuracies: t -> the two, 0 to 1.
    """
    return {
        t: f"<b>t = {t}</b>: accuracy {100 * stored:.1f} %, statistics gathered anew {100 * anew:.1f} %"
        f"<br>{to_svg(plot_fade(float(t)))}"
        for t, (stored, anew) in accuracies.items()
    }


def plot_drift(drifts: Mapping[str, pd.DataFrame], removed: Collection[str] = ()) -> Figure:
    """How far each BatchNorm's inputs are from what it has stored, from the input of the network to its output.

    Args:
        drifts: name of a network -> `batchnorm_drift` of it.
        removed: names of blocks whose BatchNorms are shaded.
    """
    _, panels = new_figure(10.0, 3.4, columns=2)
    for axes, column in zip(panels, ("mean", "spread"), strict=True):
        for i, (name, frame) in enumerate(drifts.items()):
            places = np.arange(1, len(frame) + 1)
            axes.plot(places, frame[column], **style(i), markersize=3, linewidth=1, label=name)
        for place, norm in enumerate(next(iter(drifts.values())).index, 1):
            if norm.startswith(tuple(f"{block}." for block in removed)):
                axes.axvspan(place - 0.5, place + 0.5, color="#EEEEEE", linewidth=0, zorder=0)
        axes.set_xlabel("BatchNorm, counted from the input")
    panels[0].set_ylabel("distance of means, stored deviations")
    return finished(panels[1], BESIDE, ylabel="standard deviation / stored one", yscale="log")


def plot_curves(curves: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]], original: float | None = None) -> Figure:
    """Validation accuracy over epochs: each training a thin line, the mean of its kind a thick one.

    Args:
        curves: name -> histories of its trainings, rows with `epoch` and `val_accuracy` (0 to 1), equally long.
        original: accuracy of the network that was shrunk, 0 to 1.
    """
    _, axes = new_figure(6.5, 3.6)
    if original is not None:
        axes.axhline(100 * original, color=ORIGINAL, linestyle="--", label="original")
    longest: list[int] = []
    for i, (name, histories) in enumerate(curves.items()):
        epochs = [row["epoch"] for row in histories[0]]
        paths = 100 * np.array([[row["val_accuracy"] for row in history] for history in histories])
        if len(paths) > 1:
            axes.plot(epochs, paths.T, color=COLOURS[i % len(COLOURS)], linewidth=0.7, alpha=0.6)
        axes.plot(epochs, paths.mean(0), **style(i), linewidth=2, label=name)
        longest = max(longest, epochs, key=len)
    return finished(axes, BESIDE, xlabel="epoch", ylabel="validation accuracy, %", xticks=longest)


def plot_gains(gains: Mapping[str, pd.DataFrame], published: Mapping[str, pd.Series]) -> Figure:
    """Accuracy over plain finetuning's, in points, of each other way: ours filled with its spread, the paper's not.

    Args:
        gains: mask -> our rows: index the ways, columns `mean` and `std` of the gain over plain finetuning.
        published: mask, one of those -> the paper's gain, index the ways.
    """
    _, axes = new_figure(6.5, 3.6)
    axes.axhline(0, color=ORIGINAL, linewidth=1)
    ways = list(next(iter(gains.values())).index)
    step = 0.8 / (2 * len(gains))
    for i, (mask, frame) in enumerate(gains.items()):
        place, alike = np.arange(len(ways)) + step * (i - len(gains) + 0.5), {**style(i), "linestyle": "none"}
        axes.errorbar(place, frame["mean"], yerr=frame["std"], capsize=3, label=f"mask {mask}, ours", **alike)
        if mask in published:
            theirs = {"markerfacecolor": "none", "label": f"mask {mask}, paper"}
            axes.plot(place + step * len(gains), published[mask][ways], **alike, **theirs)
    axes.set_xticks(range(len(ways)), ways)
    return finished(axes, BESIDE, xlim=(-0.6, len(ways) - 0.4), ylabel="accuracy over plain finetuning's, points")


def plot_hours(hours: Mapping[str, float]) -> Figure:
    """How long each training of a run takes, one after another.

    Args:
        hours: name of a training -> its hours.
    """
    _, axes = new_figure(6.5, 1.3)
    began = 0.0
    for (name, took), colour in zip(hours.items(), (KEPT, MERGED, LINEAR), strict=False):
        axes.barh(0, took, left=began, color=colour)
        axes.text(began + took / 2, 0, name, ha="center", va="center", color="white", weight="bold")
        began += took
    return finished(axes, xlabel="hours", yticks=[])


def hours_pane(epochs: Mapping[str, int], images: int, images_per_s: str) -> str:
    """The hours of each training and of all: `epochs` of it over so many images, at so many images per second."""
    hours = {stage: count * images / float(images_per_s) / 3600 for stage, count in epochs.items()}
    said = ", ".join(f"{stage} {took:.0f} h ({epochs[stage]} epochs)" for stage, took in hours.items())
    return f"<b>{sum(hours.values()):.0f} hours in all</b>: {said}<br>{to_svg(plot_hours(hours))}"
