"""Figures of searching, ranking and planning: which blocks to keep, and by which method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ..ranking import Importances
from ..sites import Mask
from .drawing import (
    BESIDE,
    COLOURS,
    KEPT,
    LINEAR,
    MARKERS,
    MERGED,
    ORIGINAL,
    finished,
    new_figure,
    patches,
    style,
    to_svg,
)
from .networks import mask_pane, plot_mask

if TYPE_CHECKING:
    from ..planning import OperatingPoint
    from ..profiling import CostTable

HUES = {  # the second half is of Tol's palette
    "planner": "#D55E00",
    "search": MERGED,
    "depthshrinker": MERGED,
    "layers": LINEAR,
    "uniform": KEPT,
    "metapruning": "#CC79A7",
    "keep the cheapest": "#000000",
    "narrow-and-shrunk": "#882255",
    "random": "#AA4499",
    "evenly spaced": "#6699CC",
    "magnitude": "#332288",
    "taylor": "#44AA99",
    "layer-folding": "#999933",
    "learned slopes": "#999933",
    "given-masks": "#661100",
    "the paper's masks": "#661100",
}


def hue(method: str, place: int = 0) -> str:
    """The colour of a method, the same in every figure; of one without its own, by its place among others.

    Args:
        method: its name; what follows a comma is a variant of it.
        place: number of others before it.
    """
    return HUES.get(method.partition(",")[0].lower(), COLOURS[place % len(COLOURS)])


def draw_method(axes: Any, place: int, method: str, means: pd.DataFrame, spreads: pd.DataFrame) -> None:
    """A line of points with their spread, in the method's colour: columns speed and accuracy (0 to 1)."""
    (x, y), (x_spread, y_spread) = means.to_numpy().T, spreads.to_numpy().T
    line = {"marker": MARKERS[place % len(MARKERS)], "color": hue(method, place), "linewidth": 1}
    axes.errorbar(x, 100 * y, xerr=x_spread, yerr=100 * y_spread, capsize=3, label=method, **line)


def plot_search(found: Importances) -> Figure:
    """How each site's importance m moved over a search; sites kept at the end in colour."""
    _, axes = new_figure(7.5, 3.6)
    paths = np.array([row["m"] for row in found.history])
    last = set(found.history[-1]["kept"])
    for name, path in zip(found.scores, np.vstack([np.ones(paths.shape[1]), paths]).T, strict=True):
        axes.plot(path, color=KEPT if name in last else MERGED, linewidth=1.6)
    end, gap = len(paths), max(np.ptp(np.append(paths, 1.0)) / 26, 1e-9)  # 26 names, one above the other, fill the axis
    order = np.argsort(paths[-1])
    place = {"fontsize": 7, "va": "center", "annotation_clip": False}
    for i, at in zip(order, _apart(paths[-1][order], gap), strict=True):
        line = {"arrowstyle": "-", "linewidth": 0.4}
        axes.annotate(list(found.scores)[i], (end, paths[-1][i]), xytext=(1.03 * end, at), arrowprops=line, **place)
    axes.set_xticks(range(len(paths) + 1))
    legend = {"handles": patches({"kept": KEPT, "removed": MERGED})}
    return finished(axes, legend, xlabel="epoch", ylabel="importance m")


def _apart(values: np.ndarray, gap: float) -> np.ndarray:
    """Ascending values moved so that neighbours keep a gap, the largest move as small as it can be."""
    steps = gap * np.arange(len(values))
    up, down = np.maximum.accumulate(values - steps), np.minimum.accumulate((values - steps)[::-1])[::-1]
    return (up + down) / 2 + steps


def epoch_panes(found: Importances) -> dict[str, str]:
    """For each epoch of a search: the blocks whose gates were open when it ended."""
    masks = [Mask({name: name in row["kept"] for name in found.scores}) for row in found.history]
    return {str(epoch): to_svg(plot_mask(mask, f"after epoch {epoch}")) for epoch, mask in enumerate(masks, 1)}


def plot_latency_weight(frame: pd.DataFrame) -> Figure:
    """Predicted latency of what searches found over the weight of their latency term: points, and a line of means.

    Args:
        frame: columns `weight` and `predicted_ms`, one row a search.
    """
    _, axes = new_figure(6.0, 3.4)
    weights = sorted(frame["weight"].unique())  # drawn evenly: 0 has no place on a logarithmic axis
    places = [weights.index(weight) for weight in frame["weight"]]
    axes.plot(places, frame["predicted_ms"], "o", color=KEPT, alpha=0.6, label="one search")
    means = frame.groupby("weight")["predicted_ms"].mean()
    axes.plot(range(len(weights)), means[weights], "-", color=MERGED, label="mean")
    axes.set_xticks(range(len(weights)), [f"{weight:g}" for weight in weights])
    return finished(axes, xlabel="latency weight λ", ylabel="predicted latency, ms per batch")


def weight_panes(
    frame: pd.DataFrame, names: Sequence[str], cost: CostTable, macs: Callable[[Mask], int]
) -> dict[str, dict[str, str]]:
    """For each weight of the latency term and each k: what the blocks that its search kept cost, and which they are.

    Args:
        frame: rows of a record of `dslib bench sign`; those of seed 0 are shown.
        names: of the sites that can be merged.
        cost: predicts latencies.
        macs: multiply-accumulates of the network that is merged with a mask.
    """

    def pane(row: Any, k: int) -> str:
        mask = Importances(row.m, (), tuple(names)).mask(k)
        latency = f"{cost.predict(mask, merged=False):.2f} ms per batch of {cost.batch_size} predicted"
        accuracy = f"accuracy {row.calibrated_accuracy[str(k)]:.1%} calibrated, without training"
        return mask_pane(
            f"<b>&lambda; = {row.weight:g}, k = {k}</b>: {latency}, {macs(mask) / 1e6:.2f} M MACs, {accuracy}", mask
        )

    rows = frame[frame["seed"] == 0].sort_values("weight")
    return {f"{row.weight:g}": {str(k): pane(row, k) for k in range(len(row.m) + 1)} for row in rows.itertuples()}


def plot_methods(frame: pd.DataFrame, original: float) -> Figure:
    """Accuracy over measured speed-up: of each method at each budget the mean over seeds, with standard deviations.

    Args:
        frame: columns `method`, `speedup` (the budget), `measured_speedup` and `accuracy` (0 to 1), one row a network.
        original: the original's accuracy.
    """
    _, axes = new_figure(7.0, 4.0)
    axes.axhline(100 * original, color=ORIGINAL, linewidth=1)
    place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
    axes.annotate("original", (0.99, 100 * original), xytext=(0, 3), ha="right", **place)
    for i, (method, part) in enumerate(frame.groupby("method", sort=False)):
        points = part.groupby("speedup")[["measured_speedup", "accuracy"]]
        draw_method(axes, i, method, points.mean(), points.std().fillna(0.0))
    return finished(axes, BESIDE, xlabel="times as fast as the original, measured", ylabel="top-1 accuracy, %")


def plot_widths(frame: pd.DataFrame, chosen: pd.DataFrame) -> Figure:
    """Accuracy over speed-up of each width's best plans, means over seeds; rings are the means of what was chosen.

    Args:
        frame: columns `width`, `share` (the budget), `measured_speedup` and `accuracy` (0 to 1), one row a network.
        chosen: those of its rows whose width was chosen.
    """
    _, axes = new_figure(6.5, 4.0)

    def draw(rows: pd.DataFrame, **line: Any) -> None:
        mean = rows.groupby("share")[["measured_speedup", "accuracy"]].mean().sort_values("measured_speedup")
        axes.plot(mean["measured_speedup"], 100 * mean["accuracy"], **line)

    for i, (width, part) in enumerate(frame.groupby("width")):
        draw(part, **style(i), label=f"width {width:g}")
    ring = {"marker": "o", "color": "#000000", "markerfacecolor": "none", "markersize": 12, "linestyle": "none"}
    draw(chosen, **ring, label="chosen")
    return finished(axes, xlabel="times as fast as the widest network, measured", ylabel="top-1 accuracy, %")


def plot_plans(
    plans: Sequence[OperatingPoint], others: Mapping[str, Sequence[tuple[float, float]]], unit: str
) -> Figure:
    """Importance removed over predicted latency: all plans that none beats a line, others points.

    Args:
        plans: from `planning.pareto`.
        others: name -> (latency, importance removed) of other masks.
        unit: of the importance.
    """
    _, axes = new_figure(6.5, 3.6)
    front = np.array([(one.latency, one.loss) for one in plans])
    most = max([front[0, 0], *(latency for points in others.values() for latency, _ in points)])
    front = np.vstack([[most, front[0, 1]], front])  # a larger budget buys nothing more
    axes.step(*front[::-1].T, where="post", color=MERGED, label="no plan is below")
    for i, (name, points) in enumerate(others.items()):
        axes.plot(*zip(*points, strict=True), MARKERS[i % len(MARKERS)], color=hue(name, i), label=name)
    return finished(axes, xlabel="predicted latency, ms per batch", ylabel=f"importance removed, {unit}")
