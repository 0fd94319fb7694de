"""Figures of networks, masks and accuracies. Functions take data and return a Figure; axes carry units."""

from __future__ import annotations

import html
import io
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..sites import Mask

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from ..ranking import Importances

# Okabe and Ito's palette: told apart by the colour-blind, readable on light and on dark pages
KEPT, LINEAR, MERGED, ORIGINAL = "#0072B2", "#E69F00", "#009E73", "#999999"


def plot_costs(frame: pd.DataFrame, batch_size: int) -> Figure:
    """Bars: what each site costs kept, linear and merged, in ms per batch (`CostTable.frame`)."""
    figure, axes = new_figure(7.5, 0.32 * len(frame) + 1.4)
    places = np.arange(len(frame))
    for i, (column, colour) in enumerate((("kept_ms", KEPT), ("linear_ms", LINEAR), ("merged_ms", MERGED))):
        axes.barh(places + (i - 1) * 0.27, frame[column], height=0.26, color=colour, label=column.removesuffix("_ms"))
    axes.set_yticks(places, frame.index)
    axes.invert_yaxis()
    axes.set_xlabel(f"latency, ms per batch of {batch_size}")
    axes.legend(frameon=False)
    return figure


def plot_masks(masks: Mapping[int, Mask]) -> Figure:
    """Which sites are kept (rows: k) by a search: one search gives every row."""
    names = list(next(iter(masks.values())))
    figure, axes = new_figure(7.5, 0.24 * len(masks) + 1.6)
    kept = np.array([[mask[name] for name in names] for mask in masks.values()], dtype=float)
    axes.pcolormesh(kept, cmap=_two_colours(MERGED, KEPT), edgecolors="white", linewidth=1.5, vmin=0, vmax=1)
    axes.set_xticks(np.arange(len(names)) + 0.5, names, rotation=60, ha="right")
    axes.set_yticks(np.arange(len(masks)) + 0.5, [str(k) for k in masks])
    axes.set_ylabel("k, sites kept")
    axes.legend(
        handles=_patches({"kept": KEPT, "merged": MERGED}),
        frameon=False,
        ncols=2,
        loc="lower right",
        bbox_to_anchor=(1, 1),
    )
    return figure


def plot_mask(mask: Mask, title: str = "", linear: Collection[str] = (), dropped: Collection[str] = ()) -> Figure:
    """One network as a row of blocks: kept and linear ones three layers deep, merged ones one, dropped ones a wire.

    Args:
        mask: which sites are kept.
        title: above the picture.
        linear: names of removed sites that were not merged.
        dropped: names of removed sites whose block is gone.
    """
    figure, axes = new_figure(7.5, 1.9)
    for i, (name, on) in enumerate(mask.items()):
        bottoms: tuple[float, ...] = (0.34,)
        height, colour = 0.28, MERGED
        if on or name in linear:
            bottoms, colour = (0.0, 0.34, 0.68), KEPT if on else LINEAR
        elif name in dropped:
            height, bottoms, colour = 0.04, (0.46,), ORIGINAL
        for bottom in bottoms:
            axes.add_patch(_box(i + 0.08, bottom, 0.84, height, colour))
        axes.text(i + 0.5, -0.08, name.rpartition(".")[2], ha="center", va="top", fontsize=8)
    axes.set(xlim=(0, len(mask)), ylim=(-0.25, 1.15), title=title)
    legend = {
        "kept": KEPT,
        **({"linear: not worth merging": LINEAR} if linear else {}),
        "merged: one convolution": MERGED,
        **({"dropped": ORIGINAL} if dropped else {}),
    }
    axes.legend(handles=_patches(legend), frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, -0.42))
    axes.axis("off")
    return figure


def plot_search(found: Importances) -> Figure:
    """How each site's importance m moved over a search; sites kept at the end in colour."""
    figure, axes = new_figure(7.5, 3.6)
    paths = np.array([row["m"] for row in found.history])
    last = set(found.history[-1]["kept"])
    for name, path in zip(found.scores, np.vstack([np.ones(paths.shape[1]), paths]).T, strict=True):
        axes.plot(path, color=KEPT if name in last else MERGED, linewidth=1.6)
    end, gap = len(paths), max(np.ptp(np.append(paths, 1.0)) / 26, 1e-9)  # 26 names, one above the other, fill the axis
    order = np.argsort(paths[-1])
    for i, at in zip(order, _apart(paths[-1][order], gap), strict=True):
        axes.annotate(
            list(found.scores)[i],
            (end, paths[-1][i]),
            xytext=(1.03 * end, at),
            fontsize=7,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "linewidth": 0.4},
        )
    axes.set_xticks(range(len(paths) + 1))
    axes.set(xlabel="epoch", ylabel="importance m")
    axes.legend(handles=_patches({"kept": KEPT, "removed": MERGED}), frameon=False)
    return figure


def plot_border(errors: Mapping[str, np.ndarray], top: float | None = None) -> Figure:
    """Maps (H, W) of the largest difference over channels, relative to the largest output, one panel each.

    Args:
        errors: title -> map.
        top: the end of the colour scale; default the largest value.
    """
    figure, panels = new_figure(3.4 * len(errors) + 0.6, 3.2, columns=len(errors))
    top = top or max(float(error.max()) for error in errors.values())
    for axes, (title, error) in zip(np.atleast_1d(panels), errors.items(), strict=True):
        image = axes.imshow(error, cmap="viridis", vmin=0, vmax=top)
        axes.set(title=title, xlabel="column, px", ylabel="row, px")
    figure.colorbar(image, ax=panels, label="difference / largest output")
    return figure


def plot_kernels(kernels: Mapping[str, np.ndarray]) -> Figure:
    """Kernels (k_h, k_w) side by side, one colour scale symmetric about zero."""
    figure, panels = new_figure(2.1 * len(kernels) + 0.8, 2.4, columns=len(kernels))
    top = max(float(np.abs(kernel).max()) for kernel in kernels.values())
    for axes, (title, kernel) in zip(np.atleast_1d(panels), kernels.items(), strict=True):
        image = axes.imshow(kernel, cmap="RdBu_r", vmin=-top, vmax=top)
        axes.set_title(title, fontsize=9)
        axes.set(xticks=range(kernel.shape[1]), yticks=range(kernel.shape[0]))
    figure.colorbar(image, ax=panels, label="weight")
    return figure


def plot_growth(frame: pd.DataFrame) -> Figure:
    """Multiply-accumulates per output pixel of a run of blocks, linear and merged, over how many blocks it has.

    Args:
        frame: columns `linear` and `merged`, index the number of blocks.
    """
    figure, axes = new_figure(6.5, 3.2)
    for column, colour in (("linear", LINEAR), ("merged", MERGED)):
        axes.plot(frame.index, frame[column] / 1e3, "o-", color=colour, label=column)
    axes.set_xticks(frame.index)
    axes.set(xlabel="blocks in the run", ylabel="MACs per output pixel, thousands")
    axes.legend(frameon=False)
    return figure


def plot_runs(runs: Sequence[Mapping[str, Any]]) -> Figure:
    """Accuracy over speed-up of several runs (`Record.values`), each against the original in its own run.

    Bars span the quartiles of the interleaved rounds. Images per second are not compared between runs.
    """
    figure, axes = new_figure(6.5, 3.8)
    original = 100 * runs[0]["networks"]["original"]["accuracy"]
    axes.plot(1.0, original, "o", color=ORIGINAL, markersize=8)
    axes.annotate("original", (1.0, original), xytext=(6, 6), textcoords="offset points")
    for values in runs:
        speed, accuracy = values["speedup"], 100 * values["networks"]["merged"]["accuracy"]
        middle = speed["ratio_of_medians"]
        spread = [[max(middle - speed["q25"], 0)], [max(speed["q75"] - middle, 0)]]
        axes.errorbar(middle, accuracy, xerr=spread, fmt="o", color=MERGED, markersize=8, capsize=3)
        axes.annotate(f"k = {values['k']}", (middle, accuracy), xytext=(6, 6), textcoords="offset points")
    axes.margins(0.2)
    axes.set(xlabel=f"speed-up over the original (batch {runs[0]['batch_size']})", ylabel="top-1 accuracy, %")
    return figure


def plot_fit(x: np.ndarray, y: np.ndarray, lines: Mapping[str, tuple[float, float]]) -> Figure:
    """A bent function's values (x, y) and straight ones beside them: name -> (slope, value at 0)."""
    figure, axes = new_figure(6.0, 3.2)
    axes.plot(x, y, ".", color=ORIGINAL, markersize=3, label="with the activation")
    ends = np.array([x.min(), x.max()])
    for (name, (slope, start)), colour in zip(lines.items(), (LINEAR, MERGED), strict=True):
        axes.plot(ends, slope * ends + start, color=colour, linewidth=2, label=name)
    axes.set(xlabel="input", ylabel="output")
    axes.legend(frameon=False)
    return figure


def plot_depths(accuracy: pd.Series, others: Sequence[tuple[int, float]]) -> Figure:
    """Accuracy over k: of the ranked masks a line, of others (k, accuracy) points."""
    figure, axes = new_figure(6.5, 3.6)
    axes.plot(accuracy.index, 100 * accuracy, "o-", color=MERGED, label="ranked without labels")
    axes.plot([k for k, _ in others], [100 * a for _, a in others], "x", color=LINEAR, label="random masks")
    axes.set(xlabel="k, sites kept", ylabel="accuracy, %", xticks=sorted(accuracy.index))
    axes.legend(frameon=False)
    return figure


def plot_over_images(rows: pd.DataFrame, original: float) -> Figure:
    """Accuracy over the number of images calibrated with: a point for each seed, a line through the medians.

    Args:
        rows: columns `images` and `accuracy` (0 to 1).
        original: the original's accuracy.
    """
    figure, axes = new_figure(6.5, 3.4)
    middle = 100 * rows.groupby("images")["accuracy"].median()
    axes.axhline(100 * original, color=ORIGINAL, linestyle="--", label="original")
    axes.plot(middle.index, middle, color=MERGED, label="calibrated, median")
    axes.plot(rows["images"], 100 * rows["accuracy"], "o", color=MERGED, markersize=4, label="one seed")
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(middle.index), [f"{n:,}" for n in middle.index], minor=False)
    axes.set(xlabel="unlabelled images", ylabel="accuracy, %")
    axes.legend(frameon=False)
    return figure


def plot_chains(chains: Mapping[str, Sequence[str]]) -> Figure:
    """What follows what: boxes joined by arrows, a row for each chain.

    Args:
        chains: name -> its steps, each a text of one line or more.
    """
    longest = max(map(len, chains.values()))
    figure, axes = new_figure(1.35 * longest + 1.8, 0.75 * len(chains))
    for row, (name, steps) in enumerate(chains.items()):
        axes.text(-0.6, -row, name, ha="right", va="center", weight="bold")
        for place, step in enumerate(steps):
            box = {"boxstyle": "round,pad=0.35", "facecolor": "white", "edgecolor": (KEPT, MERGED, LINEAR)[row % 3]}
            axes.text(place, -row, step, ha="center", va="center", fontsize=9, bbox=box)
            if place:
                axes.annotate("", (place - 0.4, -row), (place - 0.6, -row), arrowprops={"arrowstyle": "->"})
    axes.set(xlim=(-1.7, longest - 0.4), ylim=(0.6 - len(chains), 0.5))
    axes.set_axis_off()
    return figure


def to_svg(figure: Figure, alt: str = "") -> str:
    """The figure as SVG text, the same on every run; the figure is closed.

    Args:
        figure: to be drawn.
        alt: what a reader who cannot see it is told; default its title and its axes' names.
    """
    import matplotlib.pyplot as plt

    axes = figure.axes[0]
    told = [alt] if alt else [axes.get_title(), axes.get_ylabel(), axes.get_xlabel()]
    label = html.escape(", ".join(part for part in told if part) or "diagram")
    text = io.StringIO()
    with plt.rc_context({"svg.hashsalt": "dslib", "svg.fonttype": "none"}):  # letters as text: a quarter of the size
        figure.savefig(text, format="svg", metadata={"Date": None}, bbox_inches="tight")
    plt.close(figure)
    svg = text.getvalue()[text.getvalue().index("<svg") :]
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}" style="max-width: 100%; height: auto"', 1)


def new_figure(width: float, height: float, columns: int = 1) -> tuple[Figure, Any]:
    """An empty figure in the book's style, and its axes (an array where there are several columns)."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, columns, figsize=(width, height), layout="constrained")
    for one in np.atleast_1d(axes):
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _apart(values: np.ndarray, gap: float) -> np.ndarray:
    """Ascending values moved so that neighbours keep a gap, the largest move as small as it can be."""
    steps = gap * np.arange(len(values))
    up, down = np.maximum.accumulate(values - steps), np.minimum.accumulate((values - steps)[::-1])[::-1]
    return (up + down) / 2 + steps


def _two_colours(low: str, high: str) -> Any:
    from matplotlib.colors import ListedColormap

    return ListedColormap([low, high])


def _patches(colours: Mapping[str, str]) -> list[Any]:
    from matplotlib.patches import Patch

    return [Patch(color=colour, label=label) for label, colour in colours.items()]


def _box(left: float, bottom: float, width: float, height: float, colour: str) -> Any:
    from matplotlib.patches import FancyBboxPatch

    return FancyBboxPatch((left, bottom), width, height, boxstyle="round,pad=0,rounding_size=0.05", color=colour)
