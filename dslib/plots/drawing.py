"""What all figures share: colours, an empty figure, its legend and labels, and how it becomes SVG."""

from __future__ import annotations

import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

# Okabe and Ito's palette: told apart by the colour-blind, readable on light and on dark pages
KEPT, LINEAR, MERGED, ORIGINAL = "#0072B2", "#E69F00", "#009E73", "#999999"
COLOURS = (KEPT, LINEAR, MERGED, "#CC79A7", "#D55E00", "#56B4E9", "#000000")  # of what has no colour of its own
MARKERS = "osD^v<>P"
BESIDE = {"loc": "center left", "bbox_to_anchor": (1, 0.5)}  # a legend's place, right of the axes


def new_figure(width: float, height: float, columns: int = 1) -> tuple[Figure, Any]:
    """An empty figure in the book's style, and its axes (an array where there are several columns)."""
    figure, axes = plt.subplots(1, columns, figsize=(width, height), layout="constrained")
    for one in np.atleast_1d(axes):
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def finished(axes: Any, legend: Mapping[str, Any] | None = None, **labels: Any) -> Figure:
    """The axes' figure, once they have their labels and, if anything drawn has a name, a legend.

    Args:
        axes: what was drawn on.
        legend: keyword arguments of `Axes.legend`.
        labels: keyword arguments of `Axes.set`.
    """
    axes.set(**labels)
    if axes.get_legend_handles_labels()[0] or (legend and "handles" in legend):
        axes.legend(frameon=False, **legend or {})
    return axes.figure


def style(place: int) -> dict[str, str]:
    """Colour and marker of what is drawn after `place` others."""
    return {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place % len(MARKERS)]}


def patches(colours: Mapping[str, str]) -> list[Patch]:
    """What a legend shows of areas: label -> colour."""
    return [Patch(color=colour, label=label) for label, colour in colours.items()]


def draw_bars(axes: Any, names: Sequence[str], lengths: Mapping[str, Sequence[float]], colours: Sequence[str]) -> None:
    """Horizontal bars, a group a name from the top, in it one bar for each of `lengths` (label -> one a name)."""
    step = 0.8 / len(lengths)
    for i, ((label, values), colour) in enumerate(zip(lengths.items(), colours, strict=True)):
        offset = (i - (len(lengths) - 1) / 2) * step
        axes.barh(np.arange(len(names)) + offset, values, height=0.95 * step, color=colour, label=label)
    axes.set_yticks(np.arange(len(names)), names)
    axes.invert_yaxis()


def to_svg(figure: Figure, alt: str = "") -> str:
    """The figure as SVG text, the same on every run; the figure is closed.

    Args:
        figure: to be drawn.
        alt: what a reader who cannot see it is told; default its title and its axes' names.
    """
    axes = figure.axes[0]
    told = [alt] if alt else [axes.get_title(), axes.get_ylabel(), axes.get_xlabel()]
    label = html.escape(", ".join(part for part in told if part) or "diagram")
    text = io.StringIO()
    with plt.rc_context({"svg.hashsalt": "dslib", "svg.fonttype": "none"}):  # letters as text: a quarter of the size
        figure.savefig(text, format="svg", metadata={"Date": None}, bbox_inches="tight")
    plt.close(figure)
    svg = text.getvalue()[text.getvalue().index("<svg") :]
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}" style="max-width: 100%; height: auto"', 1)
