"""Figures of searching and planning. Functions take data and return a Figure; axes carry units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..baselines import seed_means
from ..planning import unbeaten
from .networks import KEPT, LINEAR, MERGED, ORIGINAL, new_figure

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from ..planning import OperatingPoint

# the rest of Okabe and Ito's palette follows
COLOURS = (KEPT, LINEAR, MERGED, ORIGINAL, "#CC79A7", "#D55E00", "#56B4E9", "#000000")
MARKERS = "osD^v<>P"
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
    return HUES.get(method.partition(",")[0].lower(), COLOURS[place % 8])


def plot_latency_weight(frame: pd.DataFrame) -> Figure:
    """Predicted latency of what searches found over the weight of their latency term: points, and a line of means.

    Args:
        frame: columns `weight` and `predicted_ms`, one row a search.
    """
    figure, axes = new_figure(6.0, 3.4)
    weights = sorted(frame["weight"].unique())  # drawn evenly: 0 has no place on a logarithmic axis
    places = [weights.index(weight) for weight in frame["weight"]]
    axes.plot(places, frame["predicted_ms"], "o", color=KEPT, alpha=0.6, label="one search")
    means = frame.groupby("weight")["predicted_ms"].mean()
    axes.plot(range(len(weights)), means[weights], "-", color=MERGED, label="mean")
    axes.set_xticks(range(len(weights)), [f"{weight:g}" for weight in weights])
    axes.set(xlabel="latency weight λ", ylabel="predicted latency, ms per batch")
    axes.legend(frameon=False)
    return figure


def plot_methods(frame: pd.DataFrame, original: float) -> Figure:
    """Accuracy over measured speed-up: of each method at each budget the mean over seeds, with standard deviations.

    Args:
        frame: columns `method`, `speedup` (the budget), `measured_speedup` and `accuracy` (0 to 1), one row a network.
        original: the original's accuracy.
    """
    figure, axes = new_figure(7.0, 4.0)
    axes.axhline(100 * original, color=ORIGINAL, linewidth=1)
    axes.annotate(
        "original",
        (0.99, 100 * original),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
    )
    for i, (method, part) in enumerate(frame.groupby("method", sort=False)):
        points = part.groupby("speedup")[["measured_speedup", "accuracy"]]
        mean, spread = points.mean(), points.std().fillna(0.0)
        axes.errorbar(
            mean["measured_speedup"],
            100 * mean["accuracy"],
            xerr=spread["measured_speedup"],
            yerr=100 * spread["accuracy"],
            fmt=f"{MARKERS[i % 8]}-",
            color=hue(method, i),
            capsize=3,
            linewidth=1,
            label=method,
        )
    axes.set(xlabel="times as fast as the original, measured", ylabel="top-1 accuracy, %")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def plot_widths(frame: pd.DataFrame, chosen: pd.DataFrame) -> Figure:
    """Accuracy over speed-up of each width's best plans, means over seeds; rings are the means of what was chosen.

    Args:
        frame: columns `width`, `share` (the budget), `measured_speedup` and `accuracy` (0 to 1), one row a network.
        chosen: those of its rows whose width was chosen.
    """
    figure, axes = new_figure(6.5, 4.0)
    for i, (width, part) in enumerate(frame.groupby("width")):
        mean = part.groupby("share")[["measured_speedup", "accuracy"]].mean().sort_values("measured_speedup")
        axes.plot(
            mean["measured_speedup"],
            100 * mean["accuracy"],
            f"{MARKERS[i % 8]}-",
            color=COLOURS[i % 8],
            label=f"width {width:g}",
        )
    taken = chosen.groupby("share")[["measured_speedup", "accuracy"]].mean()
    axes.plot(
        taken["measured_speedup"],
        100 * taken["accuracy"],
        "o",
        color="#000000",
        markerfacecolor="none",
        markersize=12,
        label="chosen",
    )
    axes.set(xlabel="times as fast as the widest network, measured", ylabel="top-1 accuracy, %")
    axes.legend(frameon=False)
    return figure


def plot_reading() -> Figure:
    """How a frontier is read: the distance of two lines at equal accuracy and at equal speed. Nobody's numbers."""
    figure, axes = new_figure(6.5, 3.4)
    better, worse = ((1.0, 1.3, 1.6, 2.0), (90, 89, 86, 78)), ((1.0, 1.2, 1.4, 1.6), (90, 87, 82, 74))
    for name, line, colour in (("one way", better, HUES["planner"]), ("another", worse, HUES["layers"])):
        axes.plot(*line, "o-", color=colour)
        axes.annotate(name, (line[0][-1], line[1][-1]), xytext=(8, 0), textcoords="offset points", va="center")
    both = {"arrowstyle": "<->"}
    axes.annotate("", (1.4, 82), (np.interp(-82, [-86, -78], [1.6, 2.0]), 82), arrowprops=both)
    axes.annotate("at equal accuracy:\nhow much faster", (1.61, 81), ha="center", va="top")
    axes.annotate("", (1.2, 87), (1.2, np.interp(1.2, *better)), arrowprops=both)
    axes.annotate(
        "at equal speed:\nhow much more accurate",
        (1.17, 88.5),
        xytext=(-8, -40),
        textcoords="offset points",
        ha="center",
        va="top",
    )
    axes.plot(1.0, 90, "*", color=ORIGINAL, markersize=14)
    axes.annotate("original", (1.0, 90), xytext=(0, 10), textcoords="offset points", ha="center")
    axes.set(xlabel="speed", ylabel="accuracy", xticks=[], yticks=[], xlim=(0.85, 2.3), ylim=(72, 93))
    return figure


def plot_frontier(frame: pd.DataFrame, original: tuple[float, float] | None = None, title: str = "") -> Figure:
    """Accuracy over throughput of each method, means over seeds with standard deviations; the best so far stepped.

    Args:
        frame: columns `method`, `speedup` (the budget), `images_per_s` and `accuracy` (0 to 1), one row a network; all
            of one device and runtime. Rows without accuracy failed, and are left out.
        original: throughput and accuracy of the network that all begin with.
        title: device and runtime.
    """
    figure, axes = new_figure(7.5, 4.2)
    best = [] if original is None else [original]
    for i, (method, part) in enumerate(seed_means(frame).fillna(0.0).groupby("method", sort=False)):
        part = part.sort_values("speedup")
        axes.errorbar(
            part["images_per_s"],
            100 * part["accuracy"],
            xerr=part["images_per_s_std"],
            yerr=100 * part["accuracy_std"],
            fmt=f"{MARKERS[(i + i // 8) % 8]}-",
            color=hue(method, i),
            capsize=3,
            linewidth=1,
            label=method,
        )
        best += list(part[["images_per_s", "accuracy"]].itertuples(index=False, name=None))
    speeds, accuracies = np.array(best).T
    line = unbeaten(speeds, -accuracies)[::-1]
    axes.step(
        speeds[line],
        100 * accuracies[line],
        where="pre",
        color="#000000",
        linewidth=0.8,
        linestyle=":",
        label="nothing is faster and better",
    )
    if original is not None:
        axes.plot(original[0], 100 * original[1], "*", color=ORIGINAL, markersize=12, label="original")
    axes.set(xlabel="images per second", ylabel="top-1 accuracy, %", title=title)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def plot_plans(
    plans: Sequence[OperatingPoint], others: Mapping[str, Sequence[tuple[float, float]]], unit: str
) -> Figure:
    """Importance removed over predicted latency: all plans that none beats a line, others points.

    Args:
        plans: from `planning.pareto`.
        others: name -> (latency, importance removed) of other masks.
        unit: of the importance.
    """
    figure, axes = new_figure(6.5, 3.6)
    front = np.array([(one.latency, one.loss) for one in plans])
    most = max([front[0, 0], *(latency for points in others.values() for latency, _ in points)])
    front = np.vstack([[most, front[0, 1]], front])  # a larger budget buys nothing more
    axes.step(*front[::-1].T, where="post", color=MERGED, label="no plan is below")
    for i, (name, points) in enumerate(others.items()):
        axes.plot(*zip(*points, strict=True), MARKERS[i % 8], color=hue(name, i), label=name)
    axes.set(xlabel="predicted latency, ms per batch", ylabel=f"importance removed, {unit}")
    axes.legend(frameon=False)
    return figure
