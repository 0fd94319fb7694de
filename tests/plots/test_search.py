"""Figures of searching: what they show is what they were given."""

import numpy as np
import pandas as pd
import pytest

from dslib import plots
from dslib.baselines import METHODS
from dslib.baselines.choosing import CHOICES
from dslib.planning import OperatingPoint
from dslib.sites import Mask, Plan


def points(line):
    return [tuple(point) for point in np.round(np.array(line.get_data(), float).T, 6).tolist()]


def test_latency_over_its_weight():
    frame = pd.DataFrame({"weight": [0.0, 0.0, 3.0, 0.1], "predicted_ms": [5.0, 7.0, 1.0, 4.0]})
    axes = plots.plot_latency_weight(frame).axes[0]
    assert points(axes.lines[0]) == [(0, 5), (0, 7), (2, 1), (1, 4)]
    assert points(axes.lines[1]) == [(0, 6), (1, 4), (2, 1)]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "0.1", "3"]


def test_methods_with_their_spread():
    frame = pd.DataFrame(
        {
            "method": ["planner", "planner", "random"],
            "speedup": [1.2, 1.2, 1.2],
            "measured_speedup": [1.1, 1.3, 1.2],
            "accuracy": [0.9, 0.92, 0.8],
        }
    )
    axes = plots.plot_methods(frame, 0.95).axes[0]
    planner, random = (container.lines[0] for container in axes.containers)
    assert points(planner) == [(1.2, 91)]
    assert points(random) == [(1.2, 80)]
    low, high = axes.containers[0].lines[2][1].get_segments()[0][:, 1]
    assert np.isclose(high - low, 2 * 100 * np.std([0.9, 0.92], ddof=1))


def test_widths_and_what_was_chosen():
    frame = pd.DataFrame(
        {
            "width": [1.0, 1.0, 0.5, 0.5],
            "share": [0.8, 0.4, 0.8, 0.4],
            "seed": 0,
            "measured_speedup": [1.2, 2.4, 1.5, 2.6],
            "accuracy": [0.8, 0.5, 0.7, 0.6],
        }
    )
    axes = plots.plot_widths(frame, pd.concat([frame.iloc[[0, 3]], frame.iloc[[3]].assign(accuracy=0.8)])).axes[0]
    narrow, wide, ringed = axes.lines
    assert points(narrow) == [(1.5, 70), (2.6, 60)]
    assert points(wide) == [(1.2, 80), (2.4, 50)]
    assert points(ringed) == [(1.2, 80), (2.6, 70)]


def test_plans_and_other_masks():
    plan = Plan(Mask({"a": True}))
    planned = [OperatingPoint(plan, 9.0, 0.0), OperatingPoint(plan, 5.0, 2.0)]
    axes = plots.plot_plans(planned, {"random": [(12.0, 4.0)]}, "nats").axes[0]
    assert points(axes.lines[0]) == [(5, 2), (9, 0), (12, 0)]
    assert points(axes.lines[1]) == [(12, 4)]
    assert axes.get_ylabel() == "importance removed, nats"


def test_the_frontier_is_what_nothing_beats():
    frame = pd.DataFrame(
        {
            "method": ["planner", "planner", "layers", "uniform"],
            "speedup": 1.5,
            "images_per_s": [300.0, 320.0, 305.0, None],
            "accuracy": [0.9, 0.92, 0.8, None],
        }
    )
    axes = plots.plot_frontier(frame, (200.0, 0.95), "two cores").axes[0]
    planner, layers = (container.lines[0] for container in axes.containers)
    assert points(planner) == [(310, 91)]
    assert points(layers) == [(305, 80)]
    stepped = next(line for line in axes.lines if line.get_label() == "nothing is faster and better")
    assert points(stepped) == [(200, 95), (310, 91)]
    assert axes.get_title() == "two cores"


def test_a_method_has_one_colour_whatever_stands_beside_it():
    rows = [
        ("layers", 1.5, 0, 150.0, 0.8),
        ("planner", 1.5, 0, 170.0, 0.7),
        ("DepthShrinker, plain", 1.5, 0, 99.0, 0.6),
    ]
    frame = pd.DataFrame(rows, columns=["method", "speedup", "seed", "images_per_s", "accuracy"])
    figures = [plots.plot_frontier(part).axes[0].containers for part in (frame, frame[::-1])]
    seen = [{bars.get_label(): bars.lines[0].get_color() for bars in each} for each in figures]
    assert seen[0] == seen[1]
    assert seen[0]["planner"] == plots.hue("planner", 5) != plots.hue("layers")
    assert seen[0]["DepthShrinker, plain"] == plots.hue("search")
    assert plots.hue("of nobody", 1) != plots.hue("of nobody", 2)
    assert len({plots.search.HUES[name] for name in METHODS}) == len(METHODS)
    assert set(CHOICES) <= set(plots.search.HUES)


def test_how_a_frontier_is_read():
    axes = plots.plot_reading().axes[0]
    ours, theirs = (np.array(line.get_data(), float) for line in axes.lines[:2])
    arrows = [(text.xy, text.xyann) for text in axes.texts if text.arrow_patch is not None]
    assert len(arrows) == 2
    for ours_end, theirs_end in (arrows[0][::-1], arrows[1][::-1]):
        assert np.interp(ours_end[0], *ours) == pytest.approx(ours_end[1])
        assert np.interp(theirs_end[0], *theirs) == pytest.approx(theirs_end[1])
    assert arrows[0][0][1] == arrows[0][1][1], "equal accuracy"
    assert arrows[1][0][0] == arrows[1][1][0], "equal speed"
