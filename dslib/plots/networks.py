"""Figures of a network: which blocks are kept, what each costs, how they are merged."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from ..sites import Mask
from .drawing import KEPT, LINEAR, MERGED, ORIGINAL, draw_bars, finished, new_figure, patches, to_svg

if TYPE_CHECKING:
    import pandas as pd

    from ..profiling import CostTable


def plot_costs(frame: pd.DataFrame, batch_size: int) -> Figure:
    """Bars: what each site costs kept, linear and merged, in ms per batch (`CostTable.frame`)."""
    _, axes = new_figure(7.5, 0.32 * len(frame) + 1.4)
    lengths = {name: frame[f"{name}_ms"] for name in ("kept", "linear", "merged")}
    draw_bars(axes, frame.index, lengths, (KEPT, LINEAR, MERGED))
    return finished(axes, xlabel=f"latency, ms per batch of {batch_size}")


def plot_masks(masks: Mapping[int, Mask]) -> Figure:
    """Which sites are kept (rows: k) by a search: one search gives every row."""
    names = list(next(iter(masks.values())))
    _, axes = new_figure(7.5, 0.24 * len(masks) + 1.6)
    kept = np.array([[mask[name] for name in names] for mask in masks.values()], dtype=float)
    axes.pcolormesh(kept, cmap=ListedColormap([MERGED, KEPT]), edgecolors="white", linewidth=1.5, vmin=0, vmax=1)
    axes.set_xticks(np.arange(len(names)) + 0.5, names, rotation=60, ha="right")
    axes.set_yticks(np.arange(len(masks)) + 0.5, [str(k) for k in masks])
    legend = {"handles": patches({"kept": KEPT, "merged": MERGED}), "ncols": 2}
    return finished(axes, legend | {"loc": "lower right", "bbox_to_anchor": (1, 1)}, ylabel="k, sites kept")


def plot_mask(mask: Mask, title: str = "", linear: Collection[str] = (), dropped: Collection[str] = ()) -> Figure:
    """One network as a row of blocks: kept and linear ones three layers deep, merged ones one, dropped ones a wire.

    Args:
        mask: which sites are kept.
        title: above the picture.
        linear: names of removed sites that were not merged.
        dropped: names of removed sites whose block is gone.
    """
    _, axes = new_figure(7.5, 1.9)
    for i, (name, on) in enumerate(mask.items()):
        bottoms: tuple[float, ...] = (0.34,)
        height, colour = 0.28, MERGED
        if on or name in linear:
            bottoms, colour = (0.0, 0.34, 0.68), KEPT if on else LINEAR
        elif name in dropped:
            height, bottoms, colour = 0.04, (0.46,), ORIGINAL
        for bottom in bottoms:
            rounded = "round,pad=0,rounding_size=0.05"
            axes.add_patch(FancyBboxPatch((i + 0.08, bottom), 0.84, height, boxstyle=rounded, color=colour))
        axes.text(i + 0.5, -0.08, name.rpartition(".")[2], ha="center", va="top", fontsize=8)
    told = {
        "kept": KEPT,
        **({"linear: not worth merging": LINEAR} if linear else {}),
        "merged: one convolution": MERGED,
        **({"dropped": ORIGINAL} if dropped else {}),
    }
    axes.axis("off")
    legend = {"handles": patches(told), "ncols": 4, "loc": "lower center", "bbox_to_anchor": (0.5, -0.42)}
    return finished(axes, legend, xlim=(0, len(mask)), ylim=(-0.25, 1.15), title=title)


def mask_pane(caption: str, mask: Mask, linear: Collection[str] = ()) -> str:
    """A pane of a slider: a caption (HTML) above the blocks that are kept."""
    return f"{caption}<br>{to_svg(plot_mask(mask, linear=linear), str(mask))}"


def predicted_panes(table: pd.DataFrame, masks: Mapping[int, Mask], cost: CostTable) -> dict[str, str]:
    """For each k: multiply-accumulates, latency predicted, accuracy where it is known, and the blocks that are kept.

    Args:
        table: index k, columns `MACs, M`, `predicted ms` and `accuracy, %` (NaN where it is not known).
        masks: k -> mask.
        cost: says which removed blocks are not worth merging.
    """
    panes = {}
    for k, mask in sorted(masks.items()):
        line = table.loc[k]
        known = f", accuracy {line['accuracy, %']:.1f} %" if line.notna()["accuracy, %"] else ""
        latency = f"{line['predicted ms']:.1f} ms per batch of {cost.batch_size} predicted"
        caption = f"<b>k = {k}</b>: {line['MACs, M']:.0f} M MACs, {latency}{known}"
        panes[str(k)] = mask_pane(caption, mask, linear=set(mask.removed) - set(cost.worth_merging(mask)))
    return panes


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
    _, axes = new_figure(6.5, 3.2)
    for column, colour in (("linear", LINEAR), ("merged", MERGED)):
        axes.plot(frame.index, frame[column] / 1e3, "o-", color=colour, label=column)
    return finished(axes, xticks=frame.index, xlabel="blocks in the run", ylabel="MACs per output pixel, thousands")


def plot_chains(chains: Mapping[str, Sequence[str]]) -> Figure:
    """What follows what: boxes joined by arrows, a row for each chain.

    Args:
        chains: name -> its steps, each a text of one line or more.
    """
    longest = max(map(len, chains.values()))
    _, axes = new_figure(1.35 * longest + 1.8, 0.75 * len(chains))
    for row, (name, steps) in enumerate(chains.items()):
        axes.text(-0.6, -row, name, ha="right", va="center", weight="bold")
        for place, step in enumerate(steps):
            box = {"boxstyle": "round,pad=0.35", "facecolor": "white", "edgecolor": (KEPT, MERGED, LINEAR)[row % 3]}
            axes.text(place, -row, step, ha="center", va="center", fontsize=9, bbox=box)
            if place:
                axes.annotate("", (place - 0.4, -row), (place - 0.6, -row), arrowprops={"arrowstyle": "->"})
    axes.set_axis_off()
    return finished(axes, xlim=(-1.7, longest - 0.4), ylim=(0.6 - len(chains), 0.5))
