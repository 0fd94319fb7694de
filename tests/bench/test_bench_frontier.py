"""The frontier's benchmark: every method at every budget, shared by workers, resumed, failures told."""

import multiprocessing
import shlex
import time
from dataclasses import fields, replace
from functools import partial

import pandas as pd
import pytest
from conftest import wide
from filelock import FileLock, Timeout

from dslib.baselines import METHODS, Pruned, Trial, seed_means
from dslib.bench import frontier
from dslib.bench.frontier import Frontier, record_frontier
from dslib.bench.points import fastest, lead, table
from dslib.bench.rows import Rows
from dslib.cli.bench_search import frontier_bench
from dslib.errors import BadConfig, BadModel
from dslib.models.networks import Loaded
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
    monkeypatch.setattr(frontier, "load_data", lambda *_: digits)
    monkeypatch.setattr(frontier, "load_model", lambda *_, **__: Loaded(wide(), True))
    accuracies = iter([0.9, 0.1, 0.5, 0.2, *[0.4] * 20])
    monkeypatch.setattr(frontier, "evaluate", lambda *_: next(accuracies))
    return Frontier(
        methods=("half",),
        speedups=(1.2, 9.0),
        repeated=(1.2,),
        seeds=2,
        held=32,
        lrs=(0.1, 0.03),
        gentle_lrs=(0.01,),
        device="cpu",
    )


def test_points_by_what_was_best_on_images_held_back(small, digits, tmp_path):
    told, out = [], tmp_path / "f.json"
    record = record_frontier(small, None, out, told.append)
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
    words = shlex.split(line.partition("again: ")[2])
    with frontier_bench.make_context("frontier", words[3:]) as context:
        given = {"methods": ("half",), "speedups": (9.0,), "repeated": (), "seeds": 1, "out": out}
        assert given.items() <= context.params.items()
        names = {field.name for field in fields(Frontier)} - {"options"}
        retry = Frontier(**{name: value for name, value in context.params.items() if name in names})
    record_frontier(retry, None, out, lambda _: None)  # the file is of its settings
    frame = table(record)
    assert len(frame) == 3
    assert {"accuracy", "macs", "parameters", "ms", "original_ms", "measured_speedup", "timing_busy"} <= set(frame)
    original = 8000 / frame["original_ms"].median()
    assert frame["images_per_s"].iloc[0] == pytest.approx(original * frame["measured_speedup"].iloc[0])
    assert frame["tuned"].iloc[0]
    assert frame["meets"].iloc[0] == (frame["measured_speedup"].iloc[0] >= 0.98 * 1.2)
    assert "found" not in frame
    assert frame["training"].dropna().tolist() == [1.0, 1.0]
    before = len(calls)
    again = record_frontier(small, None, out, told.append)
    assert len(calls) == before  # but the one that failed was tried again
    assert len(again.values["rows"]) == len(rows)
    assert sum(line.startswith("method half, speedup 9.0") for line in told) == 2  # the retry told nobody


def test_where_nothing_is_inherited_nothing_is_trained_gently(small, monkeypatch):
    monkeypatch.setattr(frontier, "load_model", lambda *_, **__: Loaded(wide(), False))
    asked = []

    def finish(trial, network):
        asked.append((trial.clock.left(), trial.effort.recipe, trial.effort.lr, trial.teacher is not None))
        return Pruned(network, {"seconds": {}})

    monkeypatch.setattr(Trial, "finish", finish)
    scratch = replace(small, weights="none", lrs=(0.2,))
    assert scratch.trials == [{"recipe": "usual", "lr": 0.2}]
    rows = record_frontier(scratch, None, None, lambda _: None).values["rows"]
    assert [(row["recipe"], row["lr"], row["tuned"]) for row in rows if "accuracy" in row and "seed" in row] == [
        ("usual", 0.2, False)
    ] * 2
    assert not any("tried_at" in row for row in rows)
    assert asked == [(scratch.seconds, "usual", 0.2, False)]  # the original has all the time that a point has


def test_its_command_can_be_run(small):
    record = record_frontier(small, 0.0, None, lambda _: None)
    words = shlex.split(record.command)
    assert words[:3] == ["dslib", "bench", "frontier"]
    with frontier_bench.make_context("frontier", words[3:]) as context:
        given = {"model": "mobilenet_v2", "speedups": (1.2, 9.0), "repeated": (1.2,), "lrs": (0.1, 0.03), "held": 32}
        assert given.items() <= context.params.items()


def test_methods_that_do_not_reach_the_budget_for_trials_say_so(small):
    record = record_frontier(replace(small, tuned_at=9.0), None, None, lambda _: None)
    points = [row for row in record.values["rows"] if "seed" in row and "accuracy" in row]
    assert [(row["tuned"], row["recipe"], row["lr"]) for row in points] == [(False, "usual", 0.1)] * 2


def test_with_an_unknown_method_the_others_go_on(small, tmp_path):
    told = []
    record = record_frontier(replace(small, methods=("hlf", "half")), None, tmp_path / "f.json", told.append)
    frame = table(record).set_index(["method", "speedup", "seed"])
    assert frame["error"]["hlf", 1.2, 0] == "unknown method 'hlf': the nearest known are half"
    assert frame["accuracy"].notna()["half", 1.2, 0]
    assert any(line.startswith("method hlf, speedup 1.2, seed 1: failed: unknown method 'hlf'") for line in told)


def test_what_is_missing_when_the_hours_are_over(small):
    told = []
    record_frontier(small, 0.0, None, told.append)
    assert "missing: method half, speedup 1.2, seed 0 (the same command with the same --out makes it)" in told


def test_settings_are_checked(small, monkeypatch):
    with pytest.raises(BadConfig, match="repeated: expected some of the speedups"):
        Frontier(speedups=(2.0,), repeated=(3.0,))
    monkeypatch.setattr(frontier, "load_model", lambda *_, **__: Loaded(wide(), False))
    with pytest.raises(BadModel, match="is not trained for the classes of imagenette"):
        record_frontier(small)


def _add_rows(out, log):
    """A worker: rows that take a moment each; one of them fails."""

    def make(number):
        with log.open("a") as file:
            file.write(f"{number}\n")
        time.sleep(0.05)
        if number == 5:
            raise BadConfig("five")
        return {"made": 1}

    rows = Rows(Record("x", "x", {}, {}, {}, "c"), out, shared=True)
    frontier._work(rows, [({"number": number}, partial(make, number)) for number in range(12)], lambda _: None)


def test_two_workers_share_the_rows_of_a_record(tmp_path, monkeypatch):
    monkeypatch.setattr(frontier, "PAUSE", 0.02)
    out, log = tmp_path / "x.json", tmp_path / "log"
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_add_rows, args=(out, log)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert sorted(row["number"] for row in Record.load(out).values["rows"]) == list(range(12))
    assert sorted(map(int, log.read_text().split())) == list(range(12))  # each once, the one that failed too


def test_a_second_process_of_other_settings_is_refused_before_the_first_row(tmp_path):
    Rows(Record("x", "x", {"seconds": 1}, {}, {}, "c"), tmp_path / "x.json", shared=True)
    with pytest.raises(BadConfig, match="is a record of other settings"):
        Rows(Record("x", "x", {"seconds": 2}, {}, {}, "c"), tmp_path / "x.json", shared=True)


def test_a_record_that_is_not_shared_is_written_by_one_process(tmp_path):
    blank, other = Record("x", "x", {}, {}, {}, "c"), FileLock(tmp_path / ".x.json.lock")
    other.acquire()
    with pytest.raises(BadConfig, match=r"x\.json is being written by another run: wait for it, or"):
        Rows(blank, tmp_path / "x.json")
    other.release()
    first, again = (Rows(blank, tmp_path / "x.json") for _ in range(2))
    first.add({"a": 1}, dict)
    with pytest.raises(Timeout):
        other.acquire(blocking=False)
    del first, again
    other.acquire(blocking=False)


def test_a_row_that_another_process_makes_is_not_claimed(tmp_path):
    out = tmp_path / "x.json"
    one, other = (Rows(Record("x", "x", {}, {}, {}, "c"), out, shared=True) for _ in range(2))
    with one.claimed({"a": 1}) as mine, other.claimed({"a": 1}) as theirs, other.claimed({"a": 2}) as second:
        assert (mine, theirs, second) == (True, False, True)
    with other.claimed({"a": 1}) as theirs:
        assert theirs
    one.add({"a": 1}, lambda: {"b": 2})
    assert other.find({"a": 1}) == {"a": 1, "b": 2, "commit": "c"}


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
    frame = table(Record("frontier", "x", {"latency_batch": 8}, {"rows": [failed]}, {}, "abc"))
    assert frame["error"].tolist() == ["not that fast"]
    assert frame["images_per_s"].isna().all()
    assert seed_means(frame).empty
