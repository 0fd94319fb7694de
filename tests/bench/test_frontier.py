"""The frontier: every method at every budget, resumed, failures told; its latencies once more."""

import shlex
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import wide

from dslib.baselines import METHODS, Budget, Pruned, Trial, seed_means
from dslib.bench import benchmark, frontier, retime
from dslib.bench.frontier import BENCHMARK, Frontier
from dslib.bench.retime import Retime
from dslib.cli.bench import command_of
from dslib.errors import BadConfig, BadModel, BadRecord
from dslib.measuring import Timing, count_parameters
from dslib.models.networks import Loaded
from dslib.plots import fastest, frontier_points, lead
from dslib.records import Record


def half(trial):
    """A method: the same network, however it is asked."""
    budget, effort = trial.budget, trial.effort
    if budget.speedup == 9.0:
        raise BadConfig("not that fast")
    calls.append((budget.speedup, effort.seed, effort.recipe, effort.lr, len(trial.data.train)))
    return Pruned(trial.original, {"seconds": {"training": 1.0}, "history": []})


calls = []


@pytest.fixture
def small(monkeypatch, digits):
    """Two budgets, one of them out of reach, two seeds; a method that does nothing."""
    calls.clear()
    monkeypatch.setitem(METHODS, "half", half)
    monkeypatch.setattr(benchmark, "load_data", lambda *_: digits)
    monkeypatch.setattr(frontier, "load_model", lambda *_, **__: Loaded(wide(), True))
    monkeypatch.setattr(Budget, "steady", lambda budget, *_, **__: _timing(budget))
    accuracies = iter([0.9, 0.1, 0.5, 0.2, *[0.4] * 20])
    monkeypatch.setattr(frontier, "evaluate", lambda *_: next(accuracies))
    given = {"methods": ("half",), "speedups": (1.2, 9.0), "repeated": (1.2,), "seeds": 2, "held": 32}
    return Frontier(**given, lrs=(0.1, 0.03), gentle_lrs=(0.01,), device="cpu")


def _timing(budget, others=0.0):
    ms = {"original": np.full(3, 2.96), "network": np.full(3, 2.0)}
    return Timing(ms, 4, "cpu", f"{budget.runtime}, float32", others=others)


def run(config, out=None, hours=None):
    told = []
    return BENCHMARK.run(config, out, hours, told.append), told


def params(command):
    words = shlex.split(command)
    assert words[:3] == ["dslib", "bench", "frontier"]
    with command_of("frontier").make_context("frontier", words[3:]) as context:
        return context.params


def test_points_by_what_was_best_on_images_held_back(small, digits, tmp_path):
    out = tmp_path / "f.json"
    record, told = run(small, out)
    rows = record.values["rows"]
    assert (rows[0]["way"], rows[0]["accuracy"]) == ("original", 0.9)
    tried = [row for row in rows if "tried_at" in row]
    assert [row["accuracy"] for row in tried] == [0.1, 0.5, 0.2]
    few, all_ = len(digits.train) - 32, len(digits.train)
    settings = [("usual", 0.1), ("usual", 0.03), ("gentle", 0.01)]
    assert calls[:3] == [(1.5, 0, *one, few) for one in settings]
    assert calls[3:] == [(1.2, seed, "usual", 0.03, all_) for seed in range(2)]
    (failed,) = [row for row in rows if "error" in row]
    assert (failed["speedup"], failed["seed"], failed["error"]) == (9.0, 0, "not that fast")
    (line,) = [line for line in told if "failed: not that fast; to try it again: " in line]
    again = params(line.partition("again: ")[2])
    given = {"methods": ("half",), "speedups": (9.0,), "repeated": (), "seeds": 1, "out": out}
    assert given.items() <= again.items()
    run(Frontier(**{name: value for name, value in again.items() if name not in ("out", "hours")}), out)
    frame = frontier_points(record)
    assert len(frame) == 3
    assert {"accuracy", "macs", "parameters", "ms", "original_ms", "timing_busy"} <= set(frame)
    assert frame["images_per_s"].iloc[0] == pytest.approx(8000 / 2.96 * 1.48)
    assert frame["tuned"].iloc[0]
    assert frame["meets"].iloc[0]
    assert "found" not in frame
    assert frame["training"].dropna().tolist() == [1.0, 1.0]
    before = len(calls)
    assert len(run(small, out)[0].values["rows"]) == len(rows)
    assert len(calls) == before  # but the one that failed was tried again


def test_where_nothing_is_inherited_nothing_is_trained_gently(small, monkeypatch):
    monkeypatch.setattr(frontier, "load_model", lambda *_, **__: Loaded(wide(), False))
    asked = []

    def finish(trial, network):
        asked.append((trial.clock.left(), trial.effort.recipe, trial.effort.lr, trial.teacher is not None))
        return Pruned(network, {"seconds": {}})

    monkeypatch.setattr(Trial, "finish", finish)
    scratch = replace(small, weights="none", lrs=(0.2,))
    assert scratch.trials == [{"recipe": "usual", "lr": 0.2}]
    rows = run(scratch)[0].values["rows"]
    points = [row for row in rows if "accuracy" in row and "seed" in row]
    assert [(row["recipe"], row["lr"], row["tuned"]) for row in points] == [("usual", 0.2, False)] * 2
    assert not any("tried_at" in row for row in rows)
    assert asked == [(scratch.seconds, "usual", 0.2, False)]  # the original has all the time that a point has


def test_what_is_missing_when_the_hours_are_over(small):
    record, told = run(small, hours=0.0)
    assert "missing: method half, speedup 1.2, seed 0 (the same command with the same --out makes it)" in told
    assert "method half, speedup 1.2, seed 0: not begun" in told
    given = {"model": "mobilenet_v2", "speedups": (1.2, 9.0), "repeated": (1.2,), "lrs": (0.1, 0.03), "held": 32}
    assert given.items() <= params(record.command).items()


def test_methods_that_do_not_reach_the_budget_for_trials_say_so(small):
    rows = run(replace(small, tuned_at=9.0))[0].values["rows"]
    points = [row for row in rows if "seed" in row and "accuracy" in row]
    assert [(row["tuned"], row["recipe"], row["lr"]) for row in points] == [(False, "usual", 0.1)] * 2


def test_with_an_unknown_method_the_others_go_on(small, tmp_path):
    record, told = run(replace(small, methods=("hlf", "half")), tmp_path / "f.json")
    frame = frontier_points(record).set_index(["method", "speedup", "seed"])
    assert frame["error"]["hlf", 1.2, 0] == "unknown method 'hlf': the nearest known are half"
    assert frame["accuracy"].notna()["half", 1.2, 0]
    assert any(line.startswith("method hlf, speedup 1.2, seed 1: failed: unknown method 'hlf'") for line in told)


def test_settings_are_checked(small, monkeypatch):
    for bad, text in (
        ({"speedups": (2.0,), "repeated": (3.0,)}, "repeated: expected some of the speedups"),
        ({"speedups": (0.5,)}, "speedups: expected more than 1, found 0.5"),
        ({"lrs": ()}, "lrs: expected 1 or more, found 0"),
    ):
        with pytest.raises(BadConfig, match=text):
            Frontier(**bad)
    monkeypatch.setattr(frontier, "load_model", lambda *_, **__: Loaded(wide(), False))
    with pytest.raises(BadModel, match="is not trained for the classes of imagenette: give others, or --weights none"):
        run(small)


def test_the_lead_is_between_the_fastest_of_both_at_equal_accuracy():
    rows = [
        ("ours", 1.5, 0, 150.0, 0.8),
        ("ours", 1.5, 1, 170.0, 0.7),
        ("ours", 3.0, 0, 300.0, 0.4),
        ("theirs", 1.5, 0, 120.0, 0.8),
        ("theirs", 3.0, 0, 400.0, 0.5),
        ("theirs", 9.0, 0, None, None),
    ]
    found = seed_means(pd.DataFrame(rows, columns=["method", "speedup", "seed", "images_per_s", "accuracy"]))
    assert found[["method", "speedup", "images_per_s", "accuracy", "seeds"]].values.tolist() == [
        ["ours", 1.5, 160.0, 0.75, 2],
        ["ours", 3.0, 300.0, 0.4, 1],
        ["theirs", 1.5, 120.0, 0.8, 1],
        ["theirs", 3.0, 400.0, 0.5, 1],
    ]
    assert found["accuracy_std"][0] == pytest.approx(0.05 * 2**0.5)
    assert fastest(found, 0.6)["images_per_s"] == 160.0
    assert fastest(found, 0.81) is None
    rows = lead(found, ["ours"], original=(100.0, 0.9))
    assert rows["accuracy"].tolist() == [0.8, 0.75]  # upper half of 0.5 to 0.9, which is the original's
    assert rows["ours"].tolist() == [100.0, 160.0]
    assert rows["others"].tolist() == [120.0, 120.0]
    assert rows["factor"].tolist() == pytest.approx([100 / 120, 160 / 120])
    assert rows["spread"].tolist() == pytest.approx([0.0, 160 / 120 * (10 * 2**0.5) / 160])
    assert lead(found[:0], ["ours"], original=(100.0, 0.9)).empty
    assert lead(found[:1], ["ours"], (100.0, 0.7))["factor"].isna().all()  # there are no others


def test_a_record_in_which_all_failed_is_a_table_too():
    failed = {"method": "half", "speedup": 9.0, "seed": 0, "error": "not that fast"}
    frame = frontier_points(Record("frontier", "x", {"latency_batch": 8}, {"rows": [failed]}, {}, "abc"))
    assert frame["error"].tolist() == ["not that fast"]
    assert frame["images_per_s"].isna().all()
    assert seed_means(frame).empty


CONFIG = {"model": "conftest:wide", "options": [], "data": "digits", "image_size": 16, "latency_batch": 4}
CONFIG |= {"runtime": "eager", "precision": None, "device": "cpu"}
KEY = {"speedup": 1.5, "seed": 0, "accuracy": 0.5, "measured_speedup": 9.0, "original_ms": 1.0, "timing_busy": True}
ROWS = [
    {"way": "original", "accuracy": 0.9},
    {"method": "layers", "tried_at": 1.5, "accuracy": 0.4, "measured_speedup": 9.0, "found": {"removed": ["1"]}},
    {"method": "layers", **KEY, "found": {"removed": ["1", "3"], "seconds": {}}},
    {"method": "taylor", **KEY, "found": {"strength": 0.5, "seconds": {}}},
    {"method": "planner", "speedup": 9.0, "seed": 0, "error": "not that fast"},
]


def retimed(record, told=None, out=None, **given):
    return retime.BENCHMARK.run(Retime(record, **given), out, echo=print if told is None else told.append)


@pytest.fixture
def record(tmp_path):
    machine = {"threads": torch.get_num_threads()}
    return Record("frontier", "dslib bench frontier", CONFIG, {"rows": ROWS}, machine, "abc").save(tmp_path / "f.json")


@pytest.fixture
def asked(monkeypatch):
    """The networks whose latencies were asked for; the first time the machine is busy."""
    seen = []

    def timing(budget, **networks):
        seen.append((networks, budget))
        return _timing(budget, others=9.0 if len(seen) == 1 else 0.0)

    monkeypatch.setattr(Budget, "timing", timing)
    return seen


def test_budgets_met_with_other_threads_are_refused(record, asked, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    with pytest.raises(BadConfig, match=r"f\.json: its budgets were met with \d+ threads, these are 99: set OMP"):
        retimed(record)
    assert not asked


def test_points_are_built_again_and_measured_in_turns_with_the_original(record, asked):
    told = []
    found = retimed(record, told)
    way, trial, layers, taylor, failed = found.values["rows"]
    assert (way, trial, failed) == (ROWS[0], ROWS[1], ROWS[4])
    assert layers == {
        **ROWS[2],
        "measured_speedup": 1.48,
        "q25": 1.48,
        "q75": 1.48,
        "ms": 2.0,
        "original_ms": 2.96,
        "meets": True,
        "timing_busy": False,
        "runtime": "eager, float32",
    }
    assert taylor == {name: value for name, value in ROWS[3].items() if name not in retime.LATENCY}
    assert len(asked) == 2  # the second time it was not busy
    networks, budget = asked[-1]
    assert list(networks) == ["original", "network"]
    assert (budget.image_size, budget.batch_size, budget.rounds) == (16, 4, retime.ROUNDS)
    gone = count_parameters(wide()[1]) + count_parameters(wide()[3])
    assert count_parameters(networks["original"]) - count_parameters(networks["network"]) == gone
    start = "asked for 1.5 times, seed 0: "
    assert told == [
        f"layers, {start}1.48 times",
        f"taylor, {start}its record does not say which channels are left: no latency",
    ]
    frame = frontier_points(found)
    assert frame["measured_speedup"].dropna().tolist() == [1.48]


def test_on_another_runtime(record, asked, tmp_path):
    told = []
    retimed(record, told, tmp_path / "n.json", runtime="nchw")
    found = Record.load(tmp_path / "n.json")
    assert f"written: {tmp_path / 'n.json'}" in told
    assert found.config == {**CONFIG, "runtime": "nchw"}
    assert found.values["rows"][2]["runtime"] == "nchw, float32"
    assert found.command.endswith("; dslib bench retime FRONTIER --runtime nchw --device cpu")
    assert Record.load(record).values["rows"] == ROWS


def test_a_record_of_another_benchmark_is_refused(record):
    other = replace(Record.load(record), name="table1").save(record.with_name("t.json"))
    with pytest.raises(BadRecord, match=r"t\.json: expected a record of frontier, found one of table1"):
        retimed(other)
