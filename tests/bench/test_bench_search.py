"""The benchmarks of searching and planning: a short run of each, resumed, and cut short."""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from conftest import Tiny, randomise_batchnorm

import dslib
from dslib import finetuning
from dslib.bench import joint, methods, sign
from dslib.bench.joint import Widths, behind, chosen, record_joint
from dslib.bench.judging import quiet
from dslib.bench.methods import METHODS, Matrix, record_methods
from dslib.bench.plan import record_planner
from dslib.bench.sign import record_sign, spearman
from dslib.bench.steps import record_steps
from dslib.errors import BadConfig, BadModel
from dslib.models.networks import Loaded
from dslib.profiling import CostTable
from dslib.records import Record

NAMES = [f"blocks.{i}" for i in range(3)]
COST = CostTable(
    dict.fromkeys(NAMES, 5.0),
    dict.fromkeys(NAMES, 4.0),
    dict.fromkeys(NAMES, 3.0),
    20.0,
    4,
    16,
    "cpu",
    "eager",
    runs={"blocks.0+blocks.1": 4.0},
)


ANY = tuple(method for method in METHODS if method != "the paper's masks")  # which are for 17 sites


@pytest.fixture
def small(monkeypatch, digits):
    model = Loaded(randomise_batchnorm(Tiny()), True)
    monkeypatch.setattr(methods, "load_data", lambda *_: digits)
    monkeypatch.setattr(methods, "load_model", lambda *_: model)
    monkeypatch.setattr(methods, "profile", lambda *_, **__: COST)
    monkeypatch.setattr(finetuning, "check_teacher", lambda *_: None)
    return Matrix(
        "tiny",
        "digits",
        methods=ANY,
        speedups=(1.1, 1.3, 9.0),
        seeds=1,
        search_epochs=1,
        count=64,
        rank_count=32,
        batch_size=4,
        device="cpu",
    )


def test_methods_meet_the_budget_and_rows_stand(small, tmp_path, monkeypatch):
    out, told = tmp_path / "methods.json", []
    record = record_methods(small, None, out, told.append)
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
    again = record_methods(small, None, out, told.append)
    standing = [[row for row in one.values["rows"] if not {"error", "timed"} & set(row)] for one in (record, again)]
    assert standing[0] == standing[1]  # timings of a busy machine are made again
    assert sorted(row["timed"] for row in again.values["rows"] if "timed" in row) == sorted(plans)


def test_what_is_missing_when_the_hours_are_over_is_told(small):
    told = []
    record = record_methods(small, 0.0, None, told.append)
    assert not [row for row in record.values["rows"] if "method" in row]
    lines = [line for line in told if line.startswith("missing: ")]
    assert lines[0].startswith("missing: found planner, seed 0 (the same command")
    assert sum("missing: method planner, speedup" in line for line in lines) == 3
    assert len(lines) == len(ANY) * 4


def test_a_record_grows_by_methods_budgets_and_seeds(small, tmp_path):
    out = tmp_path / "methods.json"
    few = replace(small, methods=("random",), speedups=(1.1,))
    first = record_methods(few, None, out, lambda _: None)
    more = record_methods(replace(few, methods=("random", "evenly spaced"), seeds=2), None, out, lambda _: None)
    rows = [row for row in more.values["rows"] if "method" in row]
    assert [(row["method"], row["seed"]) for row in rows] == [
        ("random", 0),
        ("evenly spaced", 0),
        ("random", 1),
        ("evenly spaced", 1),
    ]
    assert rows[0] == next(row for row in first.values["rows"] if "method" in row)
    assert "--method random --method 'evenly spaced' --speedup 1.1 --seeds 2" in more.command
    assert ";" not in more.command  # the second command makes what the first one did
    less = record_methods(few, None, out, lambda _: None)  # a part of it does not make the record a record of that part
    assert less.command == more.command
    with pytest.raises(BadConfig, match="other settings"):
        record_methods(replace(few, epochs=2), None, out, lambda _: None)
    other = record_methods(replace(few, seeds=3), None, out, lambda _: None)  # more of one method alone
    assert other.command.startswith(f"{more.command}; dslib bench methods ")
    assert other.command.endswith("--device cpu")
    assert "--method random --speedup 1.1 --seeds 3" in other.command
    assert record_methods(few, None, out, lambda _: None).command == other.command


def test_a_method_that_fails_does_not_end_the_table(small, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("no")

    monkeypatch.setitem(methods.CHOICES, "random", broken)
    told = []
    few = replace(small, methods=("random", "evenly spaced"), speedups=(1.1,))
    record = record_methods(few, None, None, told.append)
    assert told[0] == "random, 1.1 times, seed 0: ZeroDivisionError: no"
    assert [row["method"] for row in record.values["rows"] if "method" in row] == ["evenly spaced"]


def test_bad_matrices_are_refused(small, monkeypatch):
    with pytest.raises(BadConfig, match="methods: expected some of planner, .* found guessing"):
        Matrix(methods=("guessing",))
    with pytest.raises(BadConfig, match="speedups: expected more than 1"):
        Matrix(speedups=(0.5,))
    monkeypatch.setattr(methods, "load_model", lambda *_: Loaded(Tiny(), False))
    with pytest.raises(BadModel, match="is not trained for digits"):
        record_methods(small)


def test_widths_and_masks_under_one_budget(monkeypatch, digits, tmp_path):
    monkeypatch.setattr(joint, "load_data", lambda *_: digits)
    monkeypatch.setattr(joint, "profile", lambda *_, **__: COST)
    monkeypatch.setattr(finetuning, "check_teacher", lambda *_: None)
    settings = Widths(
        "conftest:widened",
        data="digits",
        widths=(1.0, 0.5),
        shares=(0.9, 0.1),
        seeds=2,
        pretrain_epochs=1,
        count=64,
        batch_size=4,
        device="cpu",
    )
    out, told = tmp_path / "joint.json", []
    record = record_joint(settings, None, out, told.append)
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
    again = record_joint(settings, None, out, told.append).values["rows"]
    lasting = [sorted(str(row) for row in rows if "timed" not in row) for rows in (again, record.values["rows"])]
    assert lasting[0] == lasting[1]  # timings of a busy machine are made again
    (tmp_path / "joint" / "width-1.safetensors").unlink()
    with pytest.raises(BadModel, match="expected the weights that the record's row is of"):
        record_joint(settings, None, out, told.append)
    for bad in ({"shares": (1.5,)}, {"widths": ()}, {"seeds": 0}):
        with pytest.raises(BadConfig, match="expected"):
            Widths(**bad)
    none = record_joint(settings, 0.0, None, told.append)
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
    monkeypatch.setattr(sign, "load_model", lambda *_, **__: Loaded(randomise_batchnorm(Tiny()), False))
    monkeypatch.setattr(sign, "pretrain", lambda *_, **__: None)
    cost = CostTable(
        {n: 5.0 for n in NAMES},
        {n: 5.0 for n in NAMES},
        dict(zip(NAMES, (4.0, 1.0, 3.0), strict=True)),
        20.0,
        4,
        16,
        "cpu",
        "eager",
    )
    monkeypatch.setattr(sign, "profile", lambda *_: cost)
    told = []
    record = record_sign((0.0, 100.0), 2, 2, 1, out=tmp_path / "sign.json", echo=told.append)
    rows = [row for row in record.values["rows"] if "weight" in row]
    assert [(row["weight"], row["seed"]) for row in rows] == [(0.0, 0), (0.0, 1), (100.0, 0), (100.0, 1)]
    assert [row["removed"] for row in rows if row["weight"]] == [["blocks.1"]] * 2
    assert [sorted(row["calibrated_accuracy"]) for row in rows if not row["seed"]] == [["0", "1", "2", "3"]] * 2
    assert not [row for row in rows if row["seed"] and "calibrated_accuracy" in row]
    assert "rank correlation" in told[0]
    short = record_sign((0.0, 100.0), 1, 2, 1, accuracies=False)
    assert short.command.endswith("--no-accuracies")
    assert not [row for row in short.values["rows"] if "calibrated_accuracy" in row]
    monkeypatch.setattr(sign, "search", None)  # all rows stand
    assert record_sign((0.0, 100.0), 2, 2, 1, out=tmp_path / "sign.json").values == record.values


def test_rank_correlation():
    frame = pd.DataFrame({"weight": [0.0, 0.1, 1.0, 10.0], "predicted_ms": [9.0, 8.0, 8.5, 2.0]})
    assert spearman(frame) == pytest.approx(-0.8)


def test_a_search_step_is_compared_with_a_plain_one():
    values = record_steps("mobilenet_v2", 32, 2, 3, "cpu").values
    networks = values["networks"]
    expected = networks["search"]["latency_ms"] / networks["plain"]["latency_ms"]
    assert values["search_over_plain"] == pytest.approx(expected)
    assert values["q25"] <= values["q75"]


def test_the_planner_is_timed_on_random_networks():
    values = record_planner(8, 50, 3).values
    assert len(values["rows"]) == 3
    for row in values["rows"]:
        assert 1 < row["distinct"] <= min(row["plans"], 50)
        assert 0 < row["removed"] <= 8
    times = sorted(row["all_budgets_s"] for row in values["rows"])
    assert list(values["all_budgets_s"].values()) == times
    with pytest.raises(BadConfig, match="expected one or more"):
        record_planner(sites=0)


RESULTS = Path(__file__).parents[2] / "data" / "results"


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
