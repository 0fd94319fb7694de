"""Panes of the book's sliders, which chapters' stored outputs do not hold fast: what they say is in the record."""

from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from dslib import plots
from dslib.errors import BadConfig
from dslib.records import Record

RESULTS = Path(__file__).parents[2] / "data" / "results"


def test_panes_of_depths_say_what_each_k_keeps():
    record = Record.load(RESULTS / "depths-mobilenet_v2-imagenette.json")
    rows = {str(row["k"]): row for row in record.values["depths"]}
    fast, slow = plots.speed_panes(record), plots.depth_panes(record)
    assert list(slow) == sorted(rows, key=int)
    assert set(fast) == set(rows)
    for k, row in rows.items():
        assert f"{100 * row['accuracy']:.1f} % accuracy, {row['speedup']:.2f} times as fast" in fast[k]
        assert ("busy" in fast[k]) == bool(row.get("busy"))
        assert f"accuracy {100 * row['accuracy']:.1f} %, agreement {100 * row['agreement']:.1f} %" in slow[k]
        assert f"Mask(k={k} of {len(record.values['importance'])}" in slow[k]


def test_a_panel_names_the_fastest_network_above_a_floor():
    rows = [("layers", 1.5, 300.0, 0.8), ("layers", 1.5, 320.0, 0.9), ("planner", 1.5, 290.0, 0.9)]
    frame = pd.DataFrame(rows, columns=["method", "speedup", "images_per_s", "accuracy"])
    panel = plots.Panel("here", frame, {"images_per_s": 200.0, "accuracy": 0.95})
    assert "<b>layers: 85.0%, 310 images/s</b>" in panel.pane("80")
    assert "<b>planner: 90.0%, 290 images/s</b>" in panel.pane("86")
    assert "<b>none of these</b>" in panel.pane("92")
    assert panel.ahead("layers", ["planner"]).tolist() == [], "beyond our line nothing is compared"
    assert panel.lead(["planner"])["factor"].tolist() == [pytest.approx(290 / 200)]


def test_the_papers_panel():
    paper = pd.read_csv(RESULTS.parent / "paper" / "pruning.csv")
    frame = plots.published(paper, "Tesla V100")
    assert frame.iloc[0]["network"] == "MBV2-1.4"
    named = frame[frame["network"] == "MBV2-1.4-DS-A"]["method"].tolist()
    assert named == ["DepthShrinker", "DepthShrinker, boundary", "DepthShrinker, boundary, distilled"]
    assert "none but the original" in plots.published_pane(paper, "Tesla V100", "99")
    rest = frame.iloc[1:]
    best = rest[rest["accuracy"] >= 0.7].sort_values("images_per_s").iloc[-1]
    assert f"{best['network']} ({best['method']}): {best['accuracy']:.2%}" in plots.published_pane(
        paper, "Tesla V100", "70"
    )


def test_panes_of_training():
    assert plots.hours_pane({"search": 2, "finetune": 4}, 3600, "2").startswith("<b>3 hours in all</b>: search 1 h")
    assert "accuracy 90.0 %, statistics gathered anew 80.0 %" in plots.fade_panes({"0.5": (0.9, 0.8)})["0.5"]


def test_a_border_is_drawn_of_blocks_that_can_be_merged():
    now = plots.border_now(None, SimpleNamespace(mergeable=("a", "b")), None)
    with pytest.raises(BadConfig, match="expected one of a, b, found c"):
        now("c", "plain, hoisted")
