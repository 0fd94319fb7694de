"""The frontier of accuracy and speed: how it is read, drawn and compared; ours, and the published one."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ..baselines import seed_means
from ..planning import unbeaten
from ..records import Record
from .drawing import BESIDE, MARKERS, MERGED, ORIGINAL, finished, new_figure, to_svg
from .search import HUES, draw_method, hue

DEVICES = {"Tesla V100": "v100", "RTX 2080Ti": "2080ti", "Jetson TX2": "tx2"}
WAYS = {"plain_accuracy": "", "boundary_accuracy": ", boundary", "distilled_accuracy": ", boundary, distilled"}
COLUMNS = {
    "accuracy": "accuracy, %",
    "macs": "MACs, M",
    "parameters": "parameters, M",
    "ms": "latency, ms",
    "images_per_s": "images/s",
    "measured_speedup": "speed-up",
    "seconds": "seconds in all",
    "training": "of them training",
}


def plot_reading() -> Figure:
    """How a frontier is read: the distance of two lines at equal accuracy and at equal speed. Nobody's numbers."""
    _, axes = new_figure(6.5, 3.4)
    better, worse = ((1.0, 1.3, 1.6, 2.0), (90, 89, 86, 78)), ((1.0, 1.2, 1.4, 1.6), (90, 87, 82, 74))
    for name, line, colour in (("one way", better, HUES["planner"]), ("another", worse, HUES["layers"])):
        axes.plot(*line, "o-", color=colour)
        axes.annotate(name, (line[0][-1], line[1][-1]), xytext=(8, 0), textcoords="offset points", va="center")
    both = {"arrowstyle": "<->"}
    axes.annotate("", (1.4, 82), (np.interp(-82, [-86, -78], [1.6, 2.0]), 82), arrowprops=both)
    axes.annotate("at equal accuracy:\nhow much faster", (1.61, 81), ha="center", va="top")
    axes.annotate("", (1.2, 87), (1.2, np.interp(1.2, *better)), arrowprops=both)
    below = {"xytext": (-8, -40), "textcoords": "offset points", "ha": "center", "va": "top"}
    axes.annotate("at equal speed:\nhow much more accurate", (1.17, 88.5), **below)
    axes.plot(1.0, 90, "*", color=ORIGINAL, markersize=14)
    axes.annotate("original", (1.0, 90), xytext=(0, 10), textcoords="offset points", ha="center")
    return finished(axes, xlabel="speed", ylabel="accuracy", xticks=[], yticks=[], xlim=(0.85, 2.3), ylim=(72, 93))


def plot_frontier(frame: pd.DataFrame, original: tuple[float, float] | None = None, title: str = "") -> Figure:
    """Accuracy over throughput of each method, means over seeds with standard deviations; the best so far stepped.

    Args:
        frame: columns `method`, `speedup` (the budget), `images_per_s` and `accuracy` (0 to 1), one row a network; all
            of one device and runtime. Rows without accuracy failed, and are left out.
        original: throughput and accuracy of the network that all begin with.
        title: device and runtime.
    """
    _, axes = new_figure(7.5, 4.2)
    best = [] if original is None else [original]
    for i, (method, part) in enumerate(seed_means(frame).fillna(0.0).groupby("method", sort=False)):
        part = part.sort_values("speedup")
        points = part[["images_per_s", "accuracy"]]
        draw_method(axes, i, method, points, part[["images_per_s_std", "accuracy_std"]])
        best += list(points.itertuples(index=False, name=None))
    speeds, accuracies = np.array(best).T
    line = unbeaten(speeds, -accuracies)[::-1]
    dotted = {"color": "#000000", "linewidth": 0.8, "linestyle": ":", "label": "nothing is faster and better"}
    axes.step(speeds[line], 100 * accuracies[line], where="pre", **dotted)
    if original is not None:
        axes.plot(original[0], 100 * original[1], "*", color=ORIGINAL, markersize=12, label="original")
    return finished(axes, BESIDE, xlabel="images per second", ylabel="top-1 accuracy, %", title=title)


def plot_runs(runs: Sequence[Mapping[str, Any]]) -> Figure:
    """Accuracy over speed-up of several runs (`Record.values`), each against the original in its own run.

    Bars span the quartiles of the interleaved rounds. Images per second are not compared between runs.
    """
    _, axes = new_figure(6.5, 3.8)
    original = 100 * runs[0]["networks"]["original"]["accuracy"]
    beside = {"xytext": (6, 6), "textcoords": "offset points"}
    axes.plot(1.0, original, "o", color=ORIGINAL, markersize=8)
    axes.annotate("original", (1.0, original), **beside)
    for values in runs:
        speed, accuracy = values["speedup"], 100 * values["networks"]["merged"]["accuracy"]
        middle = speed["ratio_of_medians"]
        spread = [[max(middle - speed["q25"], 0)], [max(speed["q75"] - middle, 0)]]
        axes.errorbar(middle, accuracy, xerr=spread, fmt="o", color=MERGED, markersize=8, capsize=3)
        axes.annotate(f"k = {values['k']}", (middle, accuracy), **beside)
    axes.margins(0.2)
    label = f"speed-up over the original (batch {runs[0]['batch_size']})"
    return finished(axes, xlabel=label, ylabel="top-1 accuracy, %")


def fastest(found: pd.DataFrame, floor: float) -> pd.Series | None:
    """The row with the highest throughput `images_per_s` of those whose `accuracy` reaches `floor`, or None."""
    good = found[found["accuracy"] >= floor]
    return None if good.empty else good.loc[good["images_per_s"].idxmax()]


def lead(found: pd.DataFrame, ours: Collection[str], original: tuple[float, float]) -> pd.DataFrame:
    """How much faster our networks are at equal accuracy, over the upper half of the accuracies on the frontier.

    At each accuracy that a network there has, the original's own excepted: the fastest of ours with at least that, and
    the fastest of the others; the original is anybody's.

    Args:
        found: as from `baselines.seed_means`.
        ours: names of our methods.
        original: its throughput and accuracy.
    Returns:
        One row an accuracy, the highest first: `accuracy`, `ours` and `others` in images per second, `factor`, and its
        `spread`, the standard deviation that those of both over seeds amount to.
    """
    speeds, accuracies = np.vstack([original, found[["images_per_s", "accuracy"]]]).T
    levels = sorted(accuracies[unbeaten(speeds, -accuracies)].tolist(), reverse=True)
    middle = (levels[0] + levels[-1]) / 2
    mine = found["method"].isin(list(ours))

    def speed(part: pd.DataFrame, floor: float) -> tuple[float, float]:
        row = fastest(part, floor)
        anybodys = (original[0] if original[1] >= floor else 0.0, 0.0)
        own = (0.0, 0.0) if row is None else (float(row["images_per_s"]), float(row["images_per_s_std"]))
        return max(anybodys, own)

    rows = []
    for level in (level for level in levels if level >= middle and level != original[1]):
        (our, std), (other, others_std) = speed(found[mine], level), speed(found[~mine], level)
        factor = our / other if other else float("nan")
        shares = np.nan_to_num([std / our if our else 0.0, others_std / other if other else 0.0])
        rows.append([level, our, other, factor, factor * float(np.hypot(*shares))])
    return pd.DataFrame(rows, columns=["accuracy", "ours", "others", "factor", "spread"])


def published(paper: pd.DataFrame, device: str) -> pd.DataFrame:
    """The paper's networks on one of `DEVICES`: one row a network and accuracy, of which the original is the first."""

    def method(name: str) -> str:
        return "DepthShrinker" if "-DS-" in name else name.partition("-")[0]

    return pd.DataFrame(
        {
            "network": row["model"],
            "method": method(row["model"]) + end,
            "speedup": i,
            "images_per_s": row[f"{DEVICES[device]}_fps"],
            "accuracy": row[way] / 100,
        }
        for i, row in paper.iterrows()
        for way, end in WAYS.items()
        if pd.notna(row[way])
    )


def published_pane(paper: pd.DataFrame, device: str, floor: str) -> str:
    """The paper's panel of a device, and its fastest network with at least `floor` percent."""
    frame = published(paper, device)
    original, rest = frame.iloc[0], frame.iloc[1:]
    best = fastest(rest, float(floor) / 100)
    said = "none but the original"
    if best is not None:
        times = best["images_per_s"] / original["images_per_s"]
        said = f"{best['network']} ({best['method']}): {best['accuracy']:.2%}, {best['images_per_s']:.0f} images/s, "
        said += f"{times:.2f} times the original's"
    picture = _above(rest, (original["images_per_s"], original["accuracy"]), f"published, {device}", floor)
    return f"Fastest published network with at least {floor} %: <b>{said}</b><br>{picture}"


def _above(frame: pd.DataFrame, original: tuple[float, float] | None, title: str, floor: str) -> str:
    figure = plot_frontier(frame, original, title)
    figure.axes[0].axhline(float(floor), color="#666666", linewidth=0.8)
    return to_svg(figure)


@dataclass(frozen=True)
class Panel:
    """What was measured of one data set on one runtime.

    Args:
        title: data, runtime, and whether from nothing.
        frame: one row a point, those that failed too.
        original: its row, if anything is known of it.
    """

    title: str
    frame: pd.DataFrame
    original: Mapping[str, Any] | None

    @property
    def start(self) -> tuple[float, float] | None:
        """Throughput and accuracy of the original, if they are known."""
        return (self.original["images_per_s"], self.original["accuracy"]) if self.original else None

    def pane(self, floor: str) -> str:
        """The frontier, and the fastest network with at least `floor` percent."""
        best = fastest(seed_means(self.frame), float(floor) / 100)
        said = "none of these"
        if best is not None:
            said = f"{best['method']}: {best['accuracy']:.1%}, {best['images_per_s']:.0f} images/s"
        picture = _above(self.frame, self.start, self.title, floor)
        return f"Fastest network with at least {floor} %: <b>{said}</b><br>{picture}"

    def lead(self, ours: Collection[str]) -> pd.DataFrame:
        """How much faster our methods are at equal accuracy; see `lead`."""
        return lead(seed_means(self.frame), ours, self.start or (0.0, 0.0))

    def ahead(self, rival: str, ours: Collection[str]) -> np.ndarray:
        """By how many points our line is above each of a rival's networks, at its speed; lines join neighbours."""
        found = seed_means(self.frame)
        mine = found[found["method"].isin(list(ours))]
        line = sorted([*filter(None, [self.start]), *zip(mine["images_per_s"], mine["accuracy"], strict=True)])
        theirs = found[(found["method"] == rival) & found["images_per_s"].between(line[0][0], line[-1][0])]
        speeds, accuracies = zip(*line, strict=True)
        return 100 * (np.interp(theirs["images_per_s"], speeds, accuracies) - theirs["accuracy"])

    def table(self) -> pd.DataFrame:
        """One row a method and budget: what came out, and how it was measured; first the original's."""
        start = pd.DataFrame([{"method": "original", "speedup": 1.0, **self.original}] if self.original else [])
        points = self.frame.dropna(subset=["accuracy"])
        grouped = pd.concat([start, points]).groupby(["method", "speedup"], sort=False)
        rows = grouped[list(COLUMNS)].mean() * [100, 1e-6, 1e-6, 1, 1, 1, 1, 1]
        rows.insert(1, "± over seeds", 100 * grouped["accuracy"].std())
        rows = rows.assign(seeds=grouped.size()).rename(columns=COLUMNS)
        return rows.sort_index(level="speedup", sort_remaining=False)


def panels_of(records: Mapping[str, Record]) -> dict[str, Panel]:
    """A panel of each data set and runtime that records of `dslib bench frontier` hold, under its title."""
    panels: dict[str, Panel] = {}
    for name, title in panel_titles(records).items():
        record = records[name]
        frame = frontier_points(record).sort_values(["method", "speedup", "seed"], kind="stable")
        rows = [row for row in record.values["rows"] if row.get("way") == "original" and "accuracy" in row]
        ms = frame["original_ms"].median()
        speed = {"ms": ms, "images_per_s": 1000 * record.config["latency_batch"] / ms, "measured_speedup": 1.0}
        frame = pd.concat([panels[title].frame, frame]) if title in panels else frame
        panels[title] = Panel(title, frame, {**rows[0], **speed} if rows else None)
    return panels


def from_nothing_last(records: Mapping[str, Record]) -> dict[str, Record]:
    """Records of pretrained networks first, those of networks trained from nothing last."""
    return dict(sorted(records.items(), key=lambda pair: pair[1].config["weights"] == "none"))


def panel_titles(records: Mapping[str, Record]) -> dict[str, str]:
    """What makes the panel of each record: data, runtime, weights; and the machine, where there are several."""

    def title(record: Record) -> str:
        weights = ", from nothing" if record.config["weights"] == "none" else ""
        return f"{record.config['data']}, {record.config['runtime']}{weights}" + several * f", {record.machine_name}"

    several = len({record.machine_name for record in records.values()}) > 1
    return {name: title(record) for name, record in records.items()}


def frontier_points(record: Record) -> pd.DataFrame:
    """The points of a record of `dslib bench frontier`: one row each, those that failed too, with their `error`.

    Of what each found: seconds of `training`, blocks `dropped` and `merged`, and of an evolution the loss that it ended
    with (`evolved`) and the mean of `random` ones. `images_per_s` is the original's, of its median latency over all
    rows, times the speed-up that was measured in turns: so rows that were made while the machine did more can be
    compared with the others.
    """
    rows = [row for row in record.values["rows"] if "seed" in row]
    frame = pd.DataFrame(
        [{name: value for name, value in row.items() if name != "found"} | _found(row) for row in rows]
    )
    for name in ("accuracy", "original_ms", "measured_speedup"):
        frame[name] = frame.get(name, float("nan"))  # where all have failed
    original = 1000 * record.config["latency_batch"] / frame["original_ms"].median()
    frame["images_per_s"] = original * frame["measured_speedup"]
    return frame


def _found(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a point's method found, as columns."""
    found = row.get("found", {})
    columns = {"training": found.get("seconds", {}).get("training")}
    if "removed" in found:
        dropped = len(found.get("dropped", ()))
        columns |= {"dropped": dropped, "merged": len(found["removed"]) - dropped}
    if "random_losses" in found:
        columns |= {"evolved": found["loss"], "random": float(np.mean(found["random_losses"]))}
    return columns


def plot_rivals(frame: pd.DataFrame, original: float, names: Mapping[str, str], ink: str = "#1f2328") -> Figure:
    """Accuracy over measured speed-up of each method, means over seeds, on no ground; each line's name is at its end.

    Args:
        frame: as from `frontier_points`; rows without accuracy failed, and are left out.
        original: accuracy of the network that all begin with, 0 to 1.
        names: method -> what to call it.
        ink: colour of axes and text, for a light page or a dark one.
    """
    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    colours: dict[Any, str] = dict.fromkeys(inked, ink)
    with plt.rc_context(colours):
        figure, axes = new_figure(7.5, 3.8)
        near: dict[str, Any] = {"textcoords": "offset points", "va": "center"}
        axes.plot(1.0, 100 * original, "*", color=ORIGINAL, markersize=12)
        axes.annotate("original", (1.0, 100 * original), xytext=(0, 12), ha="center", **near)
        for i, (method, name) in enumerate(names.items()):
            points = rival_means(frame, method)
            line = {"marker": MARKERS[i % len(MARKERS)], "color": hue(method), "linewidth": 2.4 if i == 0 else 1.4}
            axes.plot(points["measured_speedup"], 100 * points["accuracy"], **line)
            speed, accuracy = points["measured_speedup"].iloc[-1], 100 * points["accuracy"].iloc[-1]
            below: dict[str, Any] = {"xytext": (0, -12), "ha": "center"}
            place = below if speed < 2 else {"xytext": (9, 0), "ha": "left"}
            axes.annotate(name, (speed, accuracy), **place, **near)
    for part in (figure, axes):
        part.patch.set_alpha(0)
    labels: dict[str, Any] = {"xlabel": "times as fast as the original, measured", "ylabel": "top-1 accuracy, %"}
    return finished(axes, xlim=(0.9, 3.1), ylim=(0, 100), **labels)


def rival_means(frame: pd.DataFrame, method: str) -> pd.DataFrame:
    """Of `frontier_points`: a method's mean accuracy and measured speed-up at each budget, over seeds."""
    points = frame[frame["method"] == method].dropna(subset=["accuracy"])
    return points.groupby("speedup")[["measured_speedup", "accuracy"]].mean()


def describe_rivals(frame: pd.DataFrame, names: Mapping[str, str]) -> str:
    """What `plot_rivals` draws, in words."""

    def told(method: str) -> str:
        points = rival_means(frame, method).itertuples()
        return ", ".join(f"{100 * one.accuracy:.1f} % at {one.measured_speedup:.2f} times the speed" for one in points)

    return "; ".join(f"{name}: {told(method)}" for method, name in names.items())
