"""Figures of measurements: what they show is what they were given."""

import numpy as np
import pytest

from dslib import plots
from dslib.measuring.roofline import Peaks

PEAKS = Peaks(100.0, 80.0, 10.0, "cpu", "float32", "eager")
POINTS = {("a", "original"): (2.0, 10.0), ("a", "dense"): (40.0, 70.0), ("b", "original"): (4.0, 30.0)}


def test_the_roof_and_what_stands_below_it():
    axes = plots.plot_roofline(PEAKS, POINTS).axes[0]
    roof, original, dense = axes.lines[0], axes.lines[-2], axes.lines[-1]
    x, y = roof.get_data()
    assert np.allclose(y, [min(100, 10 * one) for one in x])
    assert (x[0], x[-1]) == (1.0, 80.0)
    assert list(zip(*original.get_data(), strict=True)) == [(2.0, 10.0), (4.0, 30.0)]
    assert list(zip(*dense.get_data(), strict=True)) == [(40.0, 70.0)]


def test_bars_of_blocks():
    axes = plots.plot_blocks({"x": {"original": 3.0, "dense": 1.0}, "y": {"original": 2.0, "dense": 4.0}}, 8).axes[0]
    assert [bar.get_width() for bar in axes.patches] == [3.0, 2.0, 1.0, 4.0]
    assert axes.get_xlabel() == "latency, ms per batch of 8"


def test_speedups_beside_published_ones():
    axes = plots.plot_speedups({"b": {"here": 1.5}}, {"a": {"V100": 4.0}, "b": {"V100": 3.0}}).axes[0]
    _, published, ours = axes.lines
    assert list(zip(*published.get_data(), strict=True)) == [(4.0, 0), (3.0, -1)]
    assert list(zip(*ours.get_data(), strict=True)) == [(1.5, -1)]
    assert published.get_markerfacecolor() == "none" != ours.get_markerfacecolor()


def test_steps_leave_out_what_failed():
    networks = {"original": {"images_per_s": 10.0}, "dense": {"images_per_s": 25.0}}
    rows = [{"name": "one", "speedup": 2.5, "networks": networks}, {"name": "two", "error": "not installed"}]
    axes = plots.plot_steps(rows, 8).axes[0]
    assert [bar.get_width() for bar in axes.patches] == [10.0, 25.0]
    assert [text.get_text() for text in axes.texts] == ["2.50 x"]


def test_prediction_is_on_the_diagonal_where_it_is_right():
    axes = plots.plot_prediction([{"measured_ms": 2.0, "predicted_ms": 2.1}]).axes[0]
    assert axes.lines[1].get_xydata().tolist() == [[2.0, 2.1]]
    assert axes.lines[0].get_ydata() == pytest.approx(axes.lines[0].get_xdata())
