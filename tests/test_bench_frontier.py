"""The frontier's benchmark: every method at every budget, shared by workers, resumed, failures told."""

import multiprocessing
import time

import pytest
import torch
from conftest import wide

from dslib.baselines import METHODS, Pruned
from dslib.bench import frontier
from dslib.bench.frontier import Frontier, record_frontier, table
from dslib.bench.rows import Rows
from dslib.errors import BadConfig, BadModel
from dslib.models import Loaded
from dslib.records import Record


def half(model, data, budget, effort):
    """A method: the same network, better with the second rate."""
    if budget.speedup == 9.0:
        raise BadConfig("not that fast")
    calls.append((budget.speedup, effort.seed, effort.lr, len(data.train)))
    torch.manual_seed(round(1000 * effort.lr))
    return Pruned(model, {"seconds": {"training": 1.0}, "history": []})


calls = []


@pytest.fixture
def small(monkeypatch, digits):
    """Two budgets, one of them out of reach, two seeds; methods that do nothing."""
    calls.clear()
    monkeypatch.setitem(METHODS, "half", half)
    monkeypatch.setattr(frontier, "load_data", lambda *_: digits)
    monkeypatch.setattr(frontier, "load_model", lambda *_: Loaded(wide(), True))
    accuracies = iter([0.1, 0.5, 0.2, 0.3, *[0.4] * 20])
    monkeypatch.setattr(frontier, "evaluate", lambda *_: next(accuracies))
    return Frontier(methods=("half",), speedups=(1.5, 9.0), repeated=(1.5,), seeds=2, held=32, device="cpu")


def test_points_with_the_rate_that_was_best_on_images_held_back(small, digits, tmp_path, monkeypatch):
    monkeypatch.setattr(Frontier, "middle", 1.5)
    told, out = [], tmp_path / "f.json"
    record = record_frontier(small, None, out, told.append)
    rows = record.values["rows"]
    assert rows[0]["way"] == "original"
    tried = [row for row in rows if "lr_tried" in row]
    assert [row["accuracy"] for row in tried] == [0.5, 0.2, 0.3]
    assert [call[2:] for call in calls[:3]] == [(lr, len(digits.train) - 32) for lr in frontier.USUAL]
    assert calls[3:] == [(1.5, 0, frontier.USUAL[0], len(digits.train)), (1.5, 1, frontier.USUAL[0], len(digits.train))]
    (failed,) = [row for row in rows if "error" in row]
    assert (failed["speedup"], failed["seed"], failed["error"]) == (9.0, 0, "not that fast")
    assert any("failed: not that fast (the same command tries it again)" in line for line in told)
    frame = table(record)
    assert len(frame) == 3
    assert {"accuracy", "macs", "parameters", "ms", "original_ms", "measured_speedup", "timing_busy"} <= set(frame)
    assert "found" not in frame
    assert "--method half --speedup 1.5 --speedup 9.0" in record.command
    before = len(calls)
    again = record_frontier(small, None, out, told.append)
    assert len(calls) == before
    assert len(again.values["rows"]) == len(rows)


def test_what_is_missing_when_the_hours_are_over(small):
    told = []
    record_frontier(small, 0.0, None, told.append)
    assert "missing: method half, speedup 1.5, seed 0 (the same command with the same --out makes it)" in told


def test_settings_are_checked(small, monkeypatch):
    with pytest.raises(BadConfig, match="unknown method 'hlf': the nearest known are half"):
        Frontier(methods=("hlf",))
    with pytest.raises(BadConfig, match="repeated: expected some of the speedups"):
        Frontier(speedups=(2.0,), repeated=(3.0,))
    monkeypatch.setattr(frontier, "load_model", lambda *_: Loaded(wide(), False))
    with pytest.raises(BadModel, match="is not trained for the classes of imagenette"):
        record_frontier(small)


def _add_rows(out):
    """A worker: rows that take a moment each."""

    def make():
        time.sleep(0.05)
        return {"made": 1}

    rows = Rows(Record("x", "x", {}, {}, {}, "c"), out, shared=True)
    frontier._work(rows, [({"number": number}, make) for number in range(12)], lambda _: None)


def test_two_workers_share_the_rows_of_a_record(tmp_path, monkeypatch):
    monkeypatch.setattr(frontier, "PAUSE", 0.02)
    out = tmp_path / "x.json"
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_add_rows, args=(out,)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert sorted(row["number"] for row in Record.load(out).values["rows"]) == list(range(12))


def test_a_row_that_another_process_makes_is_not_claimed(tmp_path):
    out = tmp_path / "x.json"
    one, other = (Rows(Record("x", "x", {}, {}, {}, "c"), out, shared=True) for _ in range(2))
    with one.claimed({"a": 1}) as mine, other.claimed({"a": 1}) as theirs, other.claimed({"a": 2}) as second:
        assert (mine, theirs, second) == (True, False, True)
    with other.claimed({"a": 1}) as theirs:
        assert theirs
    one.add({"a": 1}, lambda: {"b": 2})
    assert other.find({"a": 1}) == {"a": 1, "b": 2, "commit": "c"}
