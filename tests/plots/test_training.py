"""Figures of training: what they show is what they were given."""

import numpy as np
import pandas as pd
import pytest

from dslib import plots


def points(line):
    return [tuple(point) for point in np.round(np.array(line.get_data(), float).T, 6).tolist()]


def labels(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_an_activation_that_fades():
    axes = plots.plot_fade().axes[0]
    assert labels(axes) == ["t = 0", "t = 0.25", "t = 0.5", "t = 0.75", "t = 1"]
    assert points(axes.lines[0]) == [(-3, 0), (0, 0), (6, 6), (9, 6)]
    assert points(axes.lines[4]) == [(-3, -3), (0, 0), (6, 6), (9, 9)]
    one = plots.plot_fade(0.1).axes[0]
    assert labels(one) == ["t = 0.1"]
    assert points(one.lines[-1]) == [(-3, -0.3), (0, 0), (6, 6), (9, 6.3)]
    assert labels(plots.plot_fade(0.0).axes[0]) == ["t = 0"]


def test_drift_of_each_network():
    frames = {
        "torn": pd.DataFrame({"mean": [0.0, 2.0], "spread": [1.0, 4.0]}, index=["a.norm", "b.norm"]),
        "anew": pd.DataFrame({"mean": [0.0, 0.1], "spread": [1.0, 1.1]}, index=["a.norm", "b.norm"]),
    }
    means, spreads = plots.plot_drift(frames).axes
    assert labels(spreads) == ["torn", "anew"]
    assert points(means.lines[0]) == [(1, 0), (2, 2)]
    assert points(spreads.lines[1]) == [(1, 1), (2, 1.1)]
    assert spreads.get_yscale() == "log"
    assert not means.patches
    (shaded,) = plots.plot_drift(frames, removed=["b"]).axes[0].patches
    assert shaded.get_x() + shaded.get_width() / 2 == 2
    frames["torn"].index = frames["anew"].index = ["a.norm", "bb.norm"]
    assert not plots.plot_drift(frames, removed=["b"]).axes[0].patches


def test_curves_of_several_trainings_and_their_mean():
    histories = [[{"epoch": e, "val_accuracy": a} for e, a in enumerate(path, 1)] for path in ([0.2, 0.6], [0.4, 0.8])]
    axes = plots.plot_curves({"plain": histories, "one": histories[:1]}, 0.9).axes[0]
    assert labels(axes) == ["original", "plain", "one"]
    original, first, second, mean, alone = axes.lines
    assert set(original.get_ydata()) == {90}
    assert (points(first), points(second)) == ([(1, 20), (2, 60)], [(1, 40), (2, 80)])
    assert points(mean) == [(1, 30), (2, 70)]
    assert points(alone) == [(1, 20), (2, 60)]
    assert "original" not in labels(plots.plot_curves({"plain": histories}).axes[0])
    many = plots.plot_curves({str(i): histories[:1] for i in range(5)}, 0.9).axes[0]
    assert len({line.get_color() for line in many.lines}) == 6  # none is the original's
    longer = [[*histories[0], {"epoch": 3, "val_accuracy": 0.7}]]
    assert list(plots.plot_curves({"long": longer, "one": histories}).axes[0].get_xticks()) == [1, 2, 3]


def test_accuracy_over_how_far_activations_are_out():
    frame = pd.DataFrame({"as stored": [0.9, 0.2], "anew": [0.9, 0.7]}, index=[0.0, 1.0])
    axes = plots.plot_over_fade(frame).axes[0]
    assert labels(axes) == ["as stored", "anew"]
    assert [points(line) for line in axes.lines] == [[(0, 90), (1, 20)], [(0, 90), (1, 70)]]


def test_gains_ours_with_their_spread_and_the_papers():
    ours = {
        mask: pd.DataFrame({"mean": [-12.0, low], "std": [0.5, 1.0]}, index=["boundary", "teacher"])
        for mask, low in (("A", -11.0), ("C", -9.0))
    }
    axes = plots.plot_gains(ours, {"C": pd.Series({"teacher": 1.5, "boundary": 1.2})}).axes[0]
    assert labels(axes) == ["mask C, paper", "mask A, ours", "mask C, ours"]
    first, second = axes.containers
    assert list(first.lines[0].get_ydata()) == [-12, -11]
    low, high = first.lines[2][0].get_segments()[1][:, 1]
    assert high - low == pytest.approx(2)
    theirs = next(line for line in axes.lines if line.get_label() == "mask C, paper")
    assert list(theirs.get_ydata()) == [1.2, 1.5]
    assert theirs.get_markerfacecolor() == "none"
    assert theirs.get_color() == second.lines[0].get_color() != first.lines[0].get_color()
    assert [text.get_text() for text in axes.get_xticklabels()] == ["boundary", "teacher"]


def test_trainings_follow_one_another():
    axes = plots.plot_hours({"search": 3.0, "finetune": 5.0}).axes[0]
    assert [(bar.get_x(), bar.get_width()) for bar in axes.patches] == [(0, 3), (3, 5)]
    assert [text.get_text() for text in axes.texts] == ["search", "finetune"]
