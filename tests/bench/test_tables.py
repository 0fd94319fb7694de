"""Tables of measurements: the paper's networks, and records of the benchmarks that fill the tables."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from benches import run
from conftest import randomise_batchnorm, wide
from torch import nn

import dslib
from dslib.baselines import PAPER_KEPT
from dslib.bench import masks, paper_mflops, predict, side_by_side, tables, waterfall
from dslib.bench.compare import SHOWN
from dslib.bench.masks import STEM_ACTIVE
from dslib.bench.tables import MODELS, Case, Measured, cases
from dslib.errors import BadConfig, BadRecord
from dslib.measuring import Peaks, Timing
from dslib.models.networks import Loaded
from dslib.records import Record

PAPER = Path(__file__).parents[2] / "data" / "paper"
PEAKS = Peaks(100.0, 80.0, 10.0, "cpu", "float32", "eager")
ONE = {"device": "cpu", "image_size": 32, "batch_size": (2,), "runtime": ("eager",), "precision": ("float32",)}


def published(name):
    with (PAPER / name).open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def papers():
    return masks.paper_networks(64)


@pytest.fixture
def small(monkeypatch):
    """The benchmarks on a tiny network."""
    model = randomise_batchnorm(wide())
    for module in (tables, predict):
        monkeypatch.setattr(module, "load_model", lambda *_, **__: Loaded(model, False))
    monkeypatch.setattr(tables, "find_peaks", lambda *_: PEAKS)
    return model


@pytest.mark.parametrize("letter", PAPER_KEPT)
def test_the_papers_masks_have_the_published_mflops(papers, letter):
    """Within 1 M. The t=1 block is never merged in the paper, also where its activation is removed."""
    wanted = next(float(row["mflops"]) for row in published("pruning.csv") if row["model"] == f"MBV2-1.4-DS-{letter}")
    merged = papers[letter]
    assert abs(paper_mflops(merged) - wanted) <= 1
    kept, stem = PAPER_KEPT[letter], letter in STEM_ACTIVE
    assert isinstance(merged.features[0][2], nn.ReLU6) == stem
    blocks = [merged.get_submodule(f"features.{i}") for i in range(1, 18)]
    convolutions = [sum(isinstance(m, nn.Conv2d) for m in block.modules()) for block in blocks]
    assert convolutions == [2 if i == 0 else 3 if i in kept else 1 for i in range(17)]


def test_the_papers_networks(papers):
    assert list(papers) == ["original", *"ABCDEF", "width 0.65", "width 0.35", "dense"]
    macs = {name: dslib.count_macs(network, (3, 64, 64)) for name, network in papers.items()}
    assert macs["width 0.35"] < macs["width 0.65"] < macs["F"] < macs["E"] < macs["D"] < macs["A"] < macs["original"]
    assert macs["dense"] == pytest.approx(macs["original"], rel=0.01)


@pytest.mark.parametrize("name", MODELS)
def test_the_originals_have_the_published_gflops(name):
    """MACs and five operations for each output of a BatchNorm; the printed digits are cut off, not rounded."""
    wanted = next(row["gflops"] for row in published("table1.csv") if row["model"] == name)
    known, options = MODELS[name]
    mflops = paper_mflops(dslib.load_model(known, options=options).model.eval())
    assert int(mflops / 10) == round(100 * float(wanted))


def test_published_ratios_are_of_the_published_throughputs():
    for row in published("table1.csv"):
        ratio = float(row["dense_fps"]) / float(row["original_fps"])
        assert abs(ratio - float(row["printed_speedup"])) < 0.02 * ratio
    rows = published("pruning.csv")
    for device in ("v100", "2080ti", "tx2"):
        for row in rows:
            ratio = float(row[f"{device}_fps"]) / float(rows[0][f"{device}_fps"])
            assert abs(ratio - float(row[f"{device}_printed_speedup"])) < 0.01 * ratio + 0.005


def test_cases_of_a_device():
    cpu = cases(torch.device("cpu"))
    assert Case("compile", "float32", 8) in cpu
    assert not [case for case in cpu if case.runtime == "compile" and case.batch_size == 1]
    assert {case.batch_size for case in cases(torch.device("cuda"))} == {128, 256}
    assert Case("eager", "tf32", 128) in cases(torch.device("cuda"))
    assert cases(torch.device("cpu"), [2], ["openvino"], ["bfloat16"]) == [Case("openvino", "bfloat16", 2)]
    assert cases(torch.device("cpu"), [2], (), ["bfloat16"]) == [Case("eager", "bfloat16", 2)]


def test_table1_goes_on_where_it_stopped(small, tmp_path, monkeypatch):
    monkeypatch.setattr(Timing, "busy", property(lambda _: False))  # rows of a busy machine are measured again
    given = {**ONE, "model": ("tiny",), "runtime": ("eager", "cudagraph"), "rounds": 6, "passes": 2}
    record, told = run("table1", tmp_path / "x.json", **given)
    row = next(r for r in record.values["rows"] if r.get("runtime") == "eager" and "model" in r)
    assert row["networks"]["original"]["speedup"] == 1
    values = row["networks"]["dense"]
    assert values["speedup_q25"] <= values["speedup_q75"]
    assert values["images_per_s"] == pytest.approx(2e3 / values["latency_ms"])
    assert values["share_of_peak"] == pytest.approx(values["gflops"] / 100)
    assert values["working_memory_mib"] > 0
    assert {"busy", "others"} <= set(row)
    passes = [r["ms"] for r in record.values["rows"] if r.get("of") == "tiny" and r["runtime"] == "eager"]
    assert [len(ms["dense"]) for ms in passes] == [3, 3]
    assert values["latency_ms"] == pytest.approx(np.median([*passes[0]["dense"], *passes[1]["dense"]]))
    failed = next(r for r in record.values["rows"] if r.get("runtime") == "cudagraph")
    assert failed["error"] == "runtime cudagraph runs on cuda, the images are on cpu"
    blocks = next(r for r in record.values["rows"] if "blocks" in r)["ms"]
    assert list(blocks) == list(dslib.find_sites(small, 32).names)
    assert all(ms > 0 for block in blocks.values() for ms in block.values())
    sizes = next(r for r in record.values["rows"] if "sizes" in r)["networks"]
    assert sizes["dense"]["macs"] == pytest.approx(sizes["original"]["macs"], rel=0.01)
    assert len(told) == 2
    assert "cudagraph runs on cuda" in told[1]
    again, _ = run("table1", tmp_path / "x.json", **given)
    good = [[row for row in one.values["rows"] if "error" not in row] for one in (again, record)]
    assert good[0] == good[1]
    with pytest.raises(BadConfig, match="expected one pass or more, of one round or more each, found 4 and 3"):
        Measured(rounds=3, passes=4)


def test_what_is_missing_of_a_table_when_the_hours_are_over(small):
    record, told = run("table1", hours=0.0, **ONE, model=("tiny",), rounds=3)
    assert [set(row) & {"peaks", "error"} for row in record.values["rows"]] == [{"peaks"}]
    assert told[0] == "tiny, eager float32, batch 2: not begun"
    assert len(told) == 1 + 6  # sizes, three passes, the case, the blocks


def test_passes_are_spread_and_the_smallest_batch_counts(small, monkeypatch):
    seen, sizes = [], iter([2, 2, 1, 2])

    def timed(networks, images, rounds, runtime, precision):
        seen.append(runtime)
        return Timing({name: np.full(rounds, 2.0) for name in networks}, next(sizes), "cpu", runtime, None)

    monkeypatch.setattr(tables, "measure", timed)
    monkeypatch.setattr(masks, "paper_networks", lambda *_: {"original": small})
    record, _ = run("masks", **{**ONE, "runtime": ("eager", "nchw")}, rounds=4, passes=2)
    assert seen == ["eager", "nchw", "eager", "nchw"]
    rows = [row for row in record.values["rows"] if "model" in row]
    assert [row["measured_batch_size"] for row in rows] == [1, 2]
    assert [row["networks"]["original"]["images_per_s"] for row in rows] == [500.0, 1000.0]


def test_a_network_without_a_dense_counterpart_does_not_end_the_table(monkeypatch):
    monkeypatch.setattr(tables, "find_peaks", lambda *_: PEAKS)
    given = {**ONE, "model": ("benches:plain", "no_such_net"), "batch_size": (1,), "precision": ()}
    record, told = run("table1", **given, rounds=1, passes=1)
    errors = {row["sizes"]: row["error"] for row in record.values["rows"] if "sizes" in row}
    assert errors["benches:plain"].startswith("no site")
    assert "no_such_net" in errors["no_such_net"]
    assert len(told) == 2


def test_only_tables_are_put_side_by_side():
    with pytest.raises(BadRecord, match="expected records of table1 or masks, found one of run"):
        side_by_side([Record("run", "dslib run", {}, {}, {})])


def test_masks_in_one_run_beside_another_machines(monkeypatch, small, tmp_path):
    monkeypatch.setattr(masks, "paper_networks", lambda *_: {"original": small, "A": small})
    record, _ = run("masks", tmp_path / "a.json", **ONE, rounds=3)
    row = record.values["rows"][-1]
    assert set(row["networks"]) == {"original", "A"}
    machine = {"processor": "P", "threads": 16}
    other = Record("table1", "dslib bench table1", {}, {"rows": [row]}, machine).save(tmp_path / "b.json")
    frame = side_by_side([record, Record.load(other)])
    assert frame.shape == (2, 2 * len(SHOWN))
    assert (frame.index.get_level_values("network") == ["original", "A"]).all()
    _, (told,) = run("compare", files=(tmp_path / "a.json", other))
    assert "P, 16 threads" in told
    assert told == frame.round(2).to_string()


def test_prediction(small):
    given = {"model": "tiny", "image_size": 32, "batch_size": 2, "device": "cpu", "masks": 3, "rounds": 3}
    record, told = run("predict", **given)
    rows = record.values["rows"]
    assert len(rows) == 3
    for row in rows:
        assert row["error"] == pytest.approx(row["predicted_ms"] / row["measured_ms"] - 1)
    errors = sorted(abs(row["error"]) for row in rows)
    assert (record.values["median_error"], record.values["largest_error"]) == (errors[1], errors[2])
    assert len(told) == 4


def test_a_waterfall_begins_untuned(small, monkeypatch):
    given = {"model": "tiny", "device": "cpu", "image_size": 32, "batch_size": 2, "rounds": 2}
    with pytest.raises(BadConfig, match="tuned already"):
        dslib.measure({"x": small}, torch.randn(1, 3, 32, 32), 1)
        run("waterfall", **given)
    monkeypatch.setattr(waterfall, "allocator_is_tuned", lambda: False)
    tuned = []
    plain = dslib.measure
    monkeypatch.setattr(waterfall, "measure", lambda *a, **k: tuned.append(k["tuned"]) or plain(*a, **k))
    few = tuple(step for step in waterfall.STEPS if step.runtime in ("nchw", "eager", "cudagraph"))
    monkeypatch.setattr(waterfall, "STEPS", few)
    record, told = run("waterfall", **given)
    rows = record.values["rows"]
    assert [row["name"] for row in rows] == [step.name for step in few if step.device in ("any", "cpu")]
    assert tuned == [row["tuned"] for row in rows]
    assert tuned[0] is False
    assert all(row["speedup_q25"] <= row["speedup_q75"] for row in rows)
    assert len(told) == len(rows)
