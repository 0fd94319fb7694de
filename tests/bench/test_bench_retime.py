"""Latencies of a frontier's record once more."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import wide

from dslib.baselines import Budget
from dslib.bench import retime
from dslib.bench.points import table
from dslib.cli.bench import bench
from dslib.errors import BadConfig, BadRecord
from dslib.measuring.latency import Timing, count_parameters
from dslib.records import Record

CONFIG = {
    "model": "conftest:wide",
    "options": [],
    "data": "digits",
    "image_size": 16,
    "latency_batch": 4,
    "runtime": "eager",
    "precision": None,
    "device": "cpu",
}
KEY = {"speedup": 1.5, "seed": 0, "accuracy": 0.5, "measured_speedup": 9.0, "original_ms": 1.0, "timing_busy": True}
ROWS = [
    {"way": "original", "accuracy": 0.9},
    {"method": "layers", "tried_at": 1.5, "accuracy": 0.4, "measured_speedup": 9.0, "found": {"removed": ["1"]}},
    {"method": "layers", **KEY, "found": {"removed": ["1", "3"], "seconds": {}}},
    {"method": "taylor", **KEY, "found": {"strength": 0.5, "seconds": {}}},
    {"method": "planner", "speedup": 9.0, "seed": 0, "error": "not that fast"},
]


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
        ms = {"original": np.full(3, 2.96), "network": np.full(3, 2.0)}
        return Timing(ms, 4, "cpu", f"{budget.runtime}, float32", others=9.0 if len(seen) == 1 else 0.0)

    monkeypatch.setattr(Budget, "timing", timing)
    return seen


def test_budgets_met_with_other_threads_are_refused(record, asked, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    with pytest.raises(BadConfig, match=r"f\.json: its budgets were met with \d+ threads, these are 99: set OMP"):
        retime.record_retimed(record)
    assert not asked


def test_points_are_built_again_and_measured_in_turns_with_the_original(record, asked):
    told = []
    found = retime.record_retimed(record, echo=told.append)
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
    frame = table(found)
    assert frame["measured_speedup"].dropna().tolist() == [1.48]


def test_on_another_runtime_and_on_the_command_line(record, asked, tmp_path):
    words = ["retime", str(record), "--runtime", "nchw", "--out", str(tmp_path / "n.json")]
    done = CliRunner().invoke(bench, words, catch_exceptions=False)
    assert "written: " in done.output
    found = Record.load(tmp_path / "n.json")
    assert found.config == {**CONFIG, "runtime": "nchw"}
    assert found.values["rows"][2]["runtime"] == "nchw, float32"
    assert found.command.endswith("; dslib bench retime FRONTIER --runtime nchw --device cpu")
    assert Record.load(record).values["rows"] == ROWS


def test_a_record_of_another_benchmark_is_refused(record):
    other = replace(Record.load(record), name="table1").save(record.with_name("t.json"))
    with pytest.raises(BadRecord, match=r"t\.json: expected a record of frontier, found one of table1"):
        retime.record_retimed(other)
