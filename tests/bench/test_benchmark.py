"""What the mechanism promises of every benchmark: options, record, resuming, sharing, hours, refusals."""

from __future__ import annotations

import json
import multiprocessing
import shlex
import time
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import pytest
from benches import benchmark_called, run, shrink_all
from click.testing import CliRunner
from filelock import FileLock, Timeout

from dslib.bench import GROUPS, benchmark
from dslib.bench.benchmark import Benchmark, Row, Rows
from dslib.bench.settings import BenchSettings, setting
from dslib.cli.bench import LISTED, bench, command_of
from dslib.cli.options import parse_options
from dslib.errors import BadConfig, BadModel, DslibError
from dslib.records import Record

RESULTS = Path(__file__).parents[2] / "data" / "results"
RECORDS = {path.stem: Record.load(path) for path in sorted(RESULTS.glob("*.json"))}
OLDER = ("sign-mobilenet_v2-digits", "table1-cpu-2-threads")  # than one of their settings
OURS = [name for name, record in RECORDS.items() if record.name in LISTED and name not in OLDER]
BLANK = Record("x", "x", {}, {}, {}, "c")


def given(name, words):
    """Settings, file and hours that a command's words give."""
    with command_of(name).make_context(name, words) as context:
        names = {field.name for field in fields(benchmark_called(name).settings)}
        settings = benchmark_called(name).settings(**{k: v for k, v in context.params.items() if k in names})
        return settings, context.params.get("out"), context.params.get("hours")


@pytest.mark.parametrize("name", LISTED)
def test_each_benchmark_is_a_question_and_settings(name):
    group, question = LISTED[name]
    made, command = benchmark_called(name), command_of(name)
    assert group in GROUPS
    assert question.endswith("?")
    assert (made.name, made.group) == (name, group)
    assert question in " ".join(CliRunner().invoke(bench, [name, "--help"]).output.split())
    assert all(option.help for option in command.params if isinstance(option, click.Option))
    common = {"out", "hours"} & {parameter.name for parameter in command.params}
    assert common == (set() if name == "compare" else {"out", "hours"} if made.has_rows else {"out"})
    if name not in ("compare", "retime"):
        usual = replace(made.settings(), **{"options": {}} if hasattr(made.settings, "options") else {})
        usual = replace(usual, **{"model_option": {}} if hasattr(made.settings, "model_option") else {})
        assert given(name, []) == (usual, None, None)
        words = shlex.split(made.command(usual, Path("x y.json")))
        assert words[:3] == ["dslib", "bench", name]
        assert given(name, words[3:]) == (usual, Path("x y.json"), None)


@pytest.mark.parametrize("name", OURS)
def test_standing_records_can_be_gone_on_with(name):
    """Names, values and command of their settings are what these settings give."""
    record, made = RECORDS[name], benchmark_called(RECORDS[name].name)
    config = {key: tuple(value) if isinstance(value, list) else value for key, value in record.config.items()}
    for key in {"options", "model_option"} & set(config):
        config[key] = parse_options(config[key])
    alone = {field.name for field in fields(made.settings) if not field.init}
    settings = made.settings(**{key: value for key, value in config.items() if key not in alone})
    assert json.loads(json.dumps(made.config_of(settings))) == record.config
    if ";" not in record.command:
        assert sorted(shlex.split(made.command(settings))) == sorted(shlex.split(record.command))
        found, *_ = given(made.name, shlex.split(record.command)[3:])
        assert made.config_of(found) == made.config_of(settings)


def test_bench_lists_the_benchmarks_by_question():
    out = " ".join(CliRunner().invoke(bench, ["--help"]).output.split())
    at = [out.index(group if group.endswith("?") else f"{group}: ") for group in GROUPS]
    assert at == sorted(at)
    assert "memory How much memory does a calibration take?" in out
    assert CliRunner().invoke(bench, ["nothing"]).exit_code == 2


@dataclass(frozen=True)
class Toy(BenchSettings):
    """Count.

    Args:
        sizes: what is counted.
        steps: how far.
        options: for the model's function.
        loud: whether it says so.
        device: where.
    """

    sizes: tuple[int, ...] = setting((1, 2), "1 or more", option="size", least=1)
    steps: int = setting(3, "1 or more")
    options: dict[str, Any] | None = setting(None, option="model_option")
    loud: bool = True
    device: str = setting("cpu", recorded=False)


made: list[int] = []


def count(config, _):
    """Rows that need each other."""
    yield {"steps": config.steps * len([size for size in config.sizes if size < 5])}
    first = yield Row({"first": True}, lambda: {"found": len(made)}, short=True)
    rows = []
    for size in config.sizes:
        rows.append((yield Row({"size": size}, partial(measured, size), keep_errors=True)))
    yield Row({"last": True}, lambda: {"sum": sum(row.get("ms", 0) for row in rows) + first["found"]})
    yield Row({"never": True}, None)


def measured(size):
    made.append(size)
    if size == 9:
        raise BadConfig("too large")
    if size == 8:
        raise KeyError("width")
    return {"ms": size}


TOY = Benchmark("Training", Toy, count, lambda _: ["done"], selecting=("sizes",))


@pytest.fixture
def toy(monkeypatch):
    made.clear()
    monkeypatch.setattr(Benchmark, "name", "toy")

    def go(out=None, hours=None, **settings):
        told = []
        return TOY.run(Toy(**settings), out, hours, told.append), told

    return go


def test_rows_stand_once_they_are_made(toy, tmp_path):
    out = tmp_path / "x.json"
    settings = {"sizes": (1, 9), "options": {"a": 0.5}, "loud": False}
    record, told = toy(out, **settings)
    assert record.command == "dslib bench toy --size 1 --size 9 --steps 3 --model-option a=0.5 --no-loud"
    assert record.config == {"sizes": (1, 9), "steps": 3, "options": ("a=0.5",), "loud": False}
    found = Record.load(out).values
    assert found["steps"] == 3
    assert [{key: row[key] for key in row if key != "commit"} for row in found["rows"]] == [
        {"first": True, "found": 0},
        {"size": 1, "ms": 1},
        {"size": 9, "error": "too large"},
        {"last": True, "sum": 1},
    ]
    assert told == ["missing: never True (the same command with the same --out makes it)", "done"]
    again, _ = toy(out, **settings)
    assert sorted(map(str, again.values["rows"])) == sorted(map(str, found["rows"]))
    assert made == [1, 9, 9]  # the one that failed is tried again


def test_a_record_grows_by_what_selects_its_rows(toy, tmp_path):
    out = tmp_path / "x.json"
    first, _ = toy(out, sizes=(2, 9))
    more, _ = toy(out, sizes=(2, 9, 8))
    assert made == [2, 9, 9, 8]
    assert more.command.endswith("--size 2 --size 9 --size 8 --steps 3")  # makes what the first one did
    assert toy(out, sizes=(2, 8))[0].command == more.command  # a part does not make it a record of that part
    other, _ = toy(out, sizes=(2, 7))
    assert other.config["sizes"] == [2, 9, 8, 7]
    assert other.command == f"{more.command}; dslib bench toy --size 2 --size 7 --steps 3"
    assert first.command == "dslib bench toy --size 2 --size 9 --steps 3"


@pytest.mark.parametrize("change", [{"options": {"a": 1}}, {"loud": False}, {"steps": 4}, {"sizes": (1, 2)}])
def test_a_file_of_other_settings_is_refused(toy, tmp_path, change):
    """The last one would have other values beside the rows."""
    toy(tmp_path / "x.json", sizes=(1,))
    with pytest.raises(BadConfig, match=r"x\.json is a record of other settings or of another machine"):
        toy(tmp_path / "x.json", **{"sizes": (1,), **change})


@pytest.mark.parametrize("other", [{"machine": {"device": "cuda"}}, {"name": "y"}, {"config": {"n": 2}}])
@pytest.mark.parametrize("shared", [False, True])
def test_a_file_of_another_machine_or_benchmark_is_refused(tmp_path, other, shared):
    """By a second process before the first row too."""
    rows = Rows(BLANK, tmp_path / "x.json", shared=shared)
    if not shared:
        rows.add(Row({"a": 1}, dict))
    with pytest.raises(BadConfig, match="other settings or of another machine"):
        Rows(replace(BLANK, **other), tmp_path / "x.json", shared=shared)


def test_rows_of_a_busy_machine_are_measured_again_and_commits_add_up(tmp_path):
    path = tmp_path / "x.json"
    noted = [{"busy": True, "ms": 1}, {"busy": False, "ms": 2}, {"busy": False, "ms": 3}]
    for idle, ms in ((False, 1), (False, 1), (True, 2), (True, 2)):
        assert Rows(BLANK, path, idle).add(Row({"i": (1,)}, lambda: noted.pop(0)))["ms"] == ms
    Rows(replace(BLANK, commit="def"), path).add(Row({"i": 2}, dict))
    found = Record.load(path)
    assert [row["commit"] for row in found.values["rows"]] == ["c", "def"]
    assert found.commit == "c, def"


def test_when_the_hours_are_over_nothing_is_begun_and_what_is_missing_is_told(toy):
    record, told = toy(hours=0.0)
    assert [row.get("first") for row in record.values["rows"]] == [True]  # that one is short
    missing = ["size 1", "size 2", "last True", "never True"]
    assert [line.partition(" (")[0] for line in told[:-1]] == [f"missing: {name}" for name in missing]
    assert made == []


def test_errors_are_kept_where_other_rows_are_still_wanted(toy):
    record, _ = toy(sizes=(8, 1))
    assert [row.get("error") for row in record.values["rows"] if "size" in row] == ["KeyError: 'width'", None]
    with pytest.raises(KeyError):
        Rows(record).add(Row({"size": 8}, partial(measured, 8)))
    for sizes, found in (((), 0), ((-1,), -1)):
        with pytest.raises(BadConfig, match=f"sizes: expected 1 or more, found {found}"):
            Toy(sizes=sizes)


def test_a_record_that_is_not_shared_is_written_by_one_process(tmp_path):
    other = FileLock(tmp_path / ".x.json.lock")
    other.acquire()
    with pytest.raises(BadConfig, match=r"x\.json is being written by another run: wait for it, or"):
        Rows(BLANK, tmp_path / "x.json")
    other.release()
    first, again = (Rows(BLANK, tmp_path / "x.json") for _ in range(2))
    first.add(Row({"a": 1}, dict))
    with pytest.raises(Timeout):
        other.acquire(blocking=False)
    del first, again
    other.acquire(blocking=False)


def test_a_row_that_another_process_makes_is_not_claimed(tmp_path):
    one, other = (Rows(BLANK, tmp_path / "x.json", shared=True) for _ in range(2))
    with one.claimed({"a": 1}) as mine, other.claimed({"a": 1}) as theirs, other.claimed({"a": 2}) as second:
        assert (mine, theirs, second) == (True, False, True)
    with other.claimed({"a": 1}) as theirs:
        assert theirs
    one.add(Row({"a": 1}, lambda: {"b": 2}))
    assert other.find({"a": 1}) == {"a": 1, "b": 2, "commit": "c"}


def _share(out, log):
    """A worker: rows that take a moment each; one of them fails."""

    def make(number):
        with log.open("a") as file:
            file.write(f"{number}\n")
        time.sleep(0.05)
        if number == 5:
            raise DslibError("five")
        return {"made": number}

    def steps():
        found = yield [Row({"number": i}, partial(make, i), keep_errors=True) for i in range(12)]
        assert [row.get("made", row.get("error")) for row in found] == [*range(5), "five", *range(6, 12)]

    Rows(BLANK, out, shared=True).fill(steps(), print)


def test_two_workers_share_the_rows_of_a_record(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "PAUSE", 0.02)
    out, log = tmp_path / "x.json", tmp_path / "log"
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_share, args=(out, log)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert sorted(row["number"] for row in Record.load(out).values["rows"]) == list(range(12))
    assert sorted(map(int, log.read_text().split())) == list(range(12))  # each once, the one that failed too


@pytest.mark.parametrize("name", ["ablation", "depths", "methods", "networks"])
def test_a_network_that_is_not_trained_for_the_data_is_refused(name, monkeypatch, digits):
    shrink_all(monkeypatch, digits, trained=False)
    with pytest.raises(BadModel, match="with weights 'default' is not trained for the classes of digits"):
        run(name, data="digits")
