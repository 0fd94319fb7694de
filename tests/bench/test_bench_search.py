"""The benchmarks of searching and planning: a short run of each, resumed, and cut short."""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from benches import run, shrink_all

import dslib
from dslib.bench import joint, methods, sign, spearman
from dslib.bench.joint import Widths, behind, chosen
from dslib.bench.methods import METHODS, Matrix
from dslib.bench.plans import quiet
from dslib.errors import BadConfig, BadModel
from dslib.profiling import CostTable
from dslib.records import Record

RESULTS = Path(__file__).parents[2] / "data" / "results"
NAMES = [f"blocks.{i}" for i in range(3)]
KEPT, LINEAR, MERGED = (dict.fromkeys(NAMES, ms) for ms in (5.0, 4.0, 3.0))
COST = CostTable(KEPT, LINEAR, MERGED, 20.0, 4, 16, "cpu", "eager", runs={"blocks.0+blocks.1": 4.0})
ANY = tuple(method for method in METHODS if method != "the paper's masks")  # which are for 17 sites
FEW = {"data": "digits", "search_epochs": 1, "count": 64, "rank_count": 32, "batch_size": 4, "device": "cpu"}


@pytest.fixture
def small(monkeypatch, digits):
    few = replace(digits, train=digits.train.first(96), val=digits.val.first(48))
    shrink_all(monkeypatch, few)
    monkeypatch.setattr(methods, "profile", lambda *_, **__: COST)


def test_methods_meet_the_budget_and_rows_stand(small, tmp_path, monkeypatch):
    given = {**FEW, "methods": ANY, "speedups": (1.1, 1.3, 9.0), "seeds": 1}
    record, told = run("methods", tmp_path / "methods.json", **given)
    rows = {(r["method"], r["speedup"]): r for r in record.values["rows"] if "method" in r}
    timed = {(r.method, r.speedup): r.measured_speedup for r in methods.results(record).itertuples()}
    assert set(rows) == {(method, speedup) for method in ANY for speedup in (1.1, 1.3, 9.0)}
    for (method, speedup), row in rows.items():
        if speedup == 9.0:
            assert "ms per batch, found" in row["error"]
            continue
        assert row["predicted_ms"] <= 20.0 / speedup
        assert 0 <= row["accuracy"] <= 1
        assert timed[method, speedup] > 0
        if method != "planner with runs":  # which may find two in one run
            assert len(row["removed"]) == (1 if speedup == 1.1 else 3), method
    assert len(told) == len(rows)
    assert "--method planner --method 'planner with runs' --method" in record.command
    plans = {row["plan"] for row in rows.values() if "plan" in row}
    assert sorted(row["timed"] for row in record.values["rows"] if "timed" in row) == sorted(plans)  # each once
    monkeypatch.setattr(methods, "judge", None)  # all rows but the failed ones stand
    again, _ = run("methods", tmp_path / "methods.json", **given)
    standing = [[row for row in one.values["rows"] if not {"error", "timed"} & set(row)] for one in (record, again)]
    assert standing[0] == standing[1]  # timings of a busy machine are made again
    assert sorted(row["timed"] for row in again.values["rows"] if "timed" in row) == sorted(plans)


def test_what_is_missing_when_the_hours_are_over_is_told(small):
    record, told = run("methods", hours=0.0, **FEW, seeds=1)
    assert not [row for row in record.values["rows"] if "method" in row]
    lines = [line for line in told if line.startswith("missing: ")]
    assert lines[0].startswith("missing: found planner, seed 0 (the same command")
    assert sum("missing: method planner, speedup" in line for line in lines) == 2
    assert len(lines) == 4 * 3


def test_a_method_that_fails_does_not_end_the_table(small, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("no")

    monkeypatch.setitem(methods.CHOICES, "random", broken)
    record, told = run("methods", **FEW, methods=("random", "evenly spaced"), speedups=(1.1,), seeds=1)
    assert told[0] == "random, 1.1 times, seed 0: ZeroDivisionError: no"
    assert [row["method"] for row in record.values["rows"] if "method" in row] == ["evenly spaced"]


def test_bad_matrices_are_refused():
    with pytest.raises(BadConfig, match="methods: expected some of planner, .* found guessing"):
        Matrix(methods=("guessing",))
    with pytest.raises(BadConfig, match="speedups: expected more than 1"):
        Matrix(speedups=(0.5,))
    for bad in ({"shares": (1.5,)}, {"shares": (0.0,)}, {"widths": ()}, {"seeds": 0}):
        with pytest.raises(BadConfig, match="expected"):
            Widths(**bad)


def test_widths_and_masks_under_one_budget(monkeypatch, digits, tmp_path):
    shrink_all(monkeypatch, digits)
    monkeypatch.setattr(joint, "profile", lambda *_, **__: COST)
    given = {"model": "conftest:widened", "data": "digits", "widths": (1.0, 0.5), "shares": (0.9, 0.1), "seeds": 2}
    given |= {"pretrain_epochs": 1, "count": 64, "batch_size": 4, "device": "cpu"}
    out = tmp_path / "joint.json"
    record, told = run("joint", out, **given)
    rows = joint.results(record)
    assert set(rows["share"]) == {0.9}
    assert (rows["measured_speedup"] > 0).all()
    assert len(rows) == 4
    assert (rows["predicted_ms"] <= 18).all()
    assert (rows["k"] <= 2).all()
    for seed, width in ((0, 0.5), (1, 1.0)):
        of = (rows["seed"] == seed) & (rows["width"] == width)
        rows.loc[of, ["held_loss", "predicted_loss", "held_finetuned"]] = -1.0, 99.0, 2.0
    assert list(chosen(rows)["width"]) == [0.5, 1.0]
    assert list(chosen(rows, "held_loss")["width"]) == [0.5, 1.0]
    assert list(chosen(rows, "predicted_loss")["width"]) == [1.0, 0.5]
    impossible = [line for line in told if "0.1 of the latency" in line]
    assert len(impossible) == 4
    assert "the least that can be reached is" in impossible[0]
    monkeypatch.setattr(joint, "judge", None)  # all others stand
    again = run("joint", out, **given)[0].values["rows"]
    lasting = [sorted(str(row) for row in rows if "timed" not in row) for rows in (again, record.values["rows"])]
    assert lasting[0] == lasting[1]  # timings of a busy machine are made again
    (tmp_path / "joint" / "width-1.safetensors").unlink()
    with pytest.raises(BadModel, match="expected the weights that the record's row is of"):
        run("joint", out, **given)
    none, told = run("joint", hours=0.0, **given)
    assert none.values["rows"] == []
    lines = [line for line in told if line.startswith("missing: ")]
    assert lines[1].startswith("missing: trained 0.5 (the same command")
    assert len(lines) == 2 + 2 * 2 * 2


def test_how_far_a_choice_is_behind_the_best_width():
    points = [(0, 1.0, 0.8, 0.7), (0, 0.5, 0.6, 0.6), (1, 1.0, 0.9, 0.5), (1, 0.5, 0.7, 0.6)]
    rows = pd.DataFrame(points, columns=["seed", "width", "accuracy", "held_finetuned"])
    rows = rows.assign(share=0.5, held_loss=rows["held_finetuned"])
    row = behind(rows).loc[0.5]
    assert row["chosen"] == pytest.approx(0.75)  # 0.8 of width 1, 0.7 of width 0.5
    assert (row["best width"], row["best"]) == (1.0, pytest.approx(0.85))
    assert row["behind"] == pytest.approx(0.1)
    assert row["spread"] == pytest.approx(0.05 * 2**0.5)
    assert behind(rows, "held_loss").loc[0.5, "chosen"] == pytest.approx(0.75)  # 0.6 and 0.9


def test_costs_are_measured_again_on_a_busy_machine():
    tables, told = [replace(COST, busy=busy) for busy in (True, True, False)], []
    assert quiet(lambda: tables.pop(0), told.append) == COST
    assert not told
    assert quiet(lambda: replace(COST, busy=True), told.append).busy
    assert told == ["the machine was busy while costs were measured: budgets are of these"]


def test_the_sign_of_the_latency_weight(monkeypatch, digits, tmp_path):
    monkeypatch.setattr(sign, "load_data", lambda *_: digits)
    monkeypatch.setattr(sign, "pretrain", lambda *_, **__: None)
    merged = dict(zip(NAMES, (4.0, 1.0, 3.0), strict=True))
    monkeypatch.setattr(sign, "profile", lambda *_: replace(COST, linear=KEPT, merged=merged, runs={}))
    given = {"weight": (0.0, 100.0), "k": 2, "epochs": 1, "model": "conftest:Tiny"}
    record, told = run("sign", tmp_path / "sign.json", **given, seeds=2)
    rows = [row for row in record.values["rows"] if "weight" in row]
    assert [(row["weight"], row["seed"]) for row in rows] == [(0.0, 0), (0.0, 1), (100.0, 0), (100.0, 1)]
    assert [row["removed"] for row in rows if row["weight"]] == [["blocks.1"]] * 2
    assert [sorted(row["calibrated_accuracy"]) for row in rows if not row["seed"]] == [["0", "1", "2", "3"]] * 2
    assert not [row for row in rows if row["seed"] and "calibrated_accuracy" in row]
    assert "rank correlation" in told[-1]
    monkeypatch.setattr(sign, "search", None)  # all rows stand
    assert run("sign", tmp_path / "sign.json", **given, seeds=2)[0].values == record.values
    record, told = run("sign", hours=0.0, **given, seeds=1, accuracies=False)
    assert record.command.endswith("--no-accuracies")
    assert len([line for line in told if line.startswith("missing")]) == 2


def test_rank_correlation():
    frame = pd.DataFrame({"weight": [0.0, 0.1, 1.0, 10.0], "predicted_ms": [9.0, 8.0, 8.5, 2.0]})
    assert spearman(frame) == pytest.approx(-0.8)


def test_a_search_step_is_compared_with_a_plain_one():
    record, told = run("steps", model="conftest:Tiny", image_size=32, batch_size=2, rounds=3, device="cpu")
    values = record.values
    networks = values["networks"]
    expected = networks["search"]["latency_ms"] / networks["plain"]["latency_ms"]
    assert values["search_over_plain"] == pytest.approx(expected)
    assert values["q25"] <= values["q75"]
    assert record.config["compiled"] is False
    assert f"takes {expected:.2f} times as long" in told[0]


def test_the_planner_is_timed_on_random_networks():
    values = run("plan", sites=8, budgets=50, instances=3)[0].values
    assert len(values["rows"]) == 3
    for row in values["rows"]:
        assert 1 < row["distinct"] <= min(row["plans"], 50)
        assert 0 < row["removed"] <= 8
    times = sorted(row["all_budgets_s"] for row in values["rows"])
    assert list(values["all_budgets_s"].values()) == times
    with pytest.raises(BadConfig, match="sites: expected 1 or more"):
        run("plan", sites=0)


def test_what_the_records_are_said_to_show():
    """The claims of README and chapter, on the records as they stand."""
    sign = Record.load(RESULTS / "sign-mobilenet_v2-digits.json")
    frame = pd.DataFrame([row for row in sign.values["rows"] if "weight" in row])
    means = frame.groupby("weight")["predicted_ms"].mean()
    assert spearman(frame) <= -0.8
    lite = Record.load(RESULTS / "sign-efficientnet_lite0-digits.json")
    assert spearman(pd.DataFrame([row for row in lite.values["rows"] if "weight" in row])) <= -0.8
    assert means.iloc[-1] < means.iloc[0]
    for name, most in (("eager", 1.3), ("compiled", 1.15)):
        assert Record.load(RESULTS / f"steps-{name}.json").values["search_over_plain"] <= most
    compared = Record.load(RESULTS / "methods-mobilenet_v2-imagenette.json")
    ranked = next(row["table"]["m"] for row in compared.values["rows"] if row.get("found") == "planner")
    blocks = dslib.load_model("mobilenet_v2").model
    first = sorted(ranked, key=ranked.get, reverse=True)[:4]
    assert not any(blocks.get_submodule(name).use_res_connect for name in first)
    margins = methods.over_random(methods.results(compared))
    assert set(margins.index) == {1.2, 1.5}
    assert (margins["difference"] > 2 * margins["standard_error"]).all()
    tried = joint.results(Record.load(RESULTS / "joint-mobilenet_v2-cifar10.json"))
    for by in ("held_finetuned", "held_accuracy"):
        best = chosen(tried, by).groupby("share")["width"].agg(["min", "max"])
        assert (best["min"] == best["max"]).all()  # the same with every seed
        assert (behind(tried, by)["best width"] == best["min"]).all()


def test_the_margin_over_random_masks():
    frame = pd.DataFrame(
        [
            {"method": method, "speedup": 1.2, "accuracy": accuracy}
            for method, accuracy in [("planner", 0.9), ("planner", 0.8), ("random", 0.5), ("random", 0.7)]
        ]
    )
    row = methods.over_random(frame).loc[1.2]
    assert row["difference"] == pytest.approx(0.25)
    assert row["standard_error"] == pytest.approx(((0.05 + 0.1) ** 2 - 2 * 0.05 * 0.1) ** 0.5)
    assert row["networks"] == 2
    assert row["random networks"] == 2


def test_costs_of_runs_are_profiled(tiny):
    model = tiny.float()
    sites = dslib.find_sites(model, 32)
    table = dslib.profile(model, sites, 2, rounds=2, longest=3)
    assert list(table.runs) == ["blocks.0+blocks.1", "blocks.1+blocks.2", "blocks.0+blocks.1+blocks.2"]
    assert min(table.runs.values()) > 0
    plan = dslib.Plan(sites.mask(["blocks.2"]), [("blocks.0", "blocks.1")])
    saved = table.kept["blocks.0"] + table.kept["blocks.1"] - table.runs["blocks.0+blocks.1"]
    assert table.predict(plan) == pytest.approx(table.total - saved)
