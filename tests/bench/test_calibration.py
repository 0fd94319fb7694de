"""Benchmarks of calibration: a short run of each."""

import pytest
import torch
from benches import run, shrink_all
from conftest import wide

import dslib
from dslib import compressing
from dslib.bench import networks, speedup, starts
from dslib.errors import BadConfig

FEW = {"model": "tiny", "data": "digits", "count": 64, "rank_count": 32}


@pytest.fixture
def small(monkeypatch, digits):
    return shrink_all(monkeypatch, digits)


def test_every_depth_without_labels(small):
    record, told = run("depths", **FEW, random_masks=1, model_option={"width": 2, "wide": True})
    assert record.command.endswith("--weights default --model-option width=2 --model-option wide=true")
    values = record.values
    assert [row["k"] for row in values["depths"]] == [3, 2, 1, 0]
    assert [len(row["removed"]) for row in values["depths"]] == [0, 1, 2, 3]
    assert values["depths"][0]["agreement"] == 1.0
    assert all(0 <= row["agreement"] <= 1 and row["seconds"] > 0 for row in values["depths"][1:])
    assert all(0 < row["q25"] <= row["q75"] for row in values["depths"][1:])
    assert [row["k"] for row in values["random"]] == [1]
    assert values["val_images"] == 96
    assert len(told) == 5


def test_memory_of_a_calibration():
    record, _ = run("memory", model="conftest:Tiny", image_size=32, count=64, last=2)
    row = record.values
    assert row["removed"] == ["blocks.1", "blocks.2"]
    assert row["images_gib"] == 64 * 3 * 32 * 32 * 4 / 2**30
    assert 0 < row["peak_memory_before_gib"] <= row["peak_memory_gib"] < 4


def test_ingredients_of_calibration(small):
    record, _ = run("ingredients", **FEW, k=(2, 1), images=(16, 64), seeds=2)
    rows = record.values["rows"]
    whole = [row for row in rows if row["ingredients"] == "+ ridge on images held back"]
    masks = [("ranked k=2", 64), ("ranked k=1", 64), ("ranked k=2", 16)]
    expected = [(mask, images, seed) for mask, images in masks for seed in range(2)]
    assert [(row["mask"], row["images"], row["seed"]) for row in whole] == expected
    assert len(rows) == 6 + 2 * 3
    assert all(0 <= row["accuracy"] <= 1 and row["seconds"] > 0 for row in rows)
    assert "--k 2 --k 1 --images 16 --images 64 --seeds 2" in record.command
    with pytest.raises(BadConfig, match="k: expected 1 or more, found 0"):
        run("ingredients", k=())


def test_speedup_on_each_runtime(small, monkeypatch):
    mask = dslib.find_sites(small, 16).mask(["blocks.1"])
    monkeypatch.setattr(compressing, "for_speedup", lambda *_, **__: (dslib.Plan(mask), (2.0, 1.9, 2.1)))
    monkeypatch.setattr(speedup, "profile", lambda *given, runtime: dslib.profile(*given, rounds=2))
    record, _ = run("speedup", **FEW, speedup=1.2, batch_size=4, rounds=3)
    rows = record.values["networks"]
    assert list(rows) == ["original", "for eager", "for openvino"]
    assert rows["for eager"]["removed"] == list(mask.removed)
    fastest = {name: min(t["latency_ms"] for t in row["timing"].values()) for name, row in rows.items()}
    for name, row in rows.items():
        assert len(row["timing"]) == 2
        assert row["speedup_best_runtimes"] == pytest.approx(fastest["original"] / fastest[name])
    assert "--runtime eager --runtime openvino" in record.command


def test_starts_have_the_same_time(small, monkeypatch, tmp_path):
    given = {**FEW, "count": 32, "k": 1, "minutes": (0.02, 0.025), "lr": (0.01,), "tuning_minutes": 0.02, "seeds": 2}
    record, told = run("starts", tmp_path / "starts.json", **given, batch_size=16)
    assert set(record.values) == {"removed", "val_images", "held_back", "rows"}
    rows = [row for row in record.values["rows"] if not row["tuning"]]
    expected = [(seed, minutes) for seed, minutes in ((0, 0.02), (1, 0.02), (0, 0.025))]
    found = [(row["start"], row["seed"], row["minutes"]) for row in rows]
    assert found == [(start, *one) for one in expected for start in starts.STARTS]
    for start in starts.STARTS:
        tried = [row for row in record.values["rows"] if row["tuning"] and row["start"] == start]
        assert {(row["recipe"], row["lr"]) for row in tried} == {("usual", 0.01), ("gentle", 0.01)}
        best = max(tried, key=lambda row: row["accuracy"])
        assert {(row["recipe"], row["lr"]) for row in rows if row["start"] == start} == {(best["recipe"], best["lr"])}
    assert all(row["seconds"] > row["seconds_to_calibrate"] > 0 for row in rows)
    assert len(told) == len(record.values["rows"])
    monkeypatch.setattr(starts, "finetune", None)  # all rows stand
    again, _ = run("starts", tmp_path / "starts.json", **given, batch_size=16)
    assert again.values["rows"] == record.values["rows"]


def test_starts_without_time(small):
    with pytest.raises(BadConfig, match="were gone before the first step"):
        run("starts", **FEW, k=1, lr=(0.01,), tuning_minutes=1e-6, seeds=1, batch_size=16)
    _, told = run("starts", hours=0.0, **FEW, k=1, lr=(0.01,))
    assert [line.partition(": ")[0] for line in told[-2:]] == ["missing", "missing"]


def test_networks_are_made_once_and_what_is_told_is_of_the_files(monkeypatch, digits, tmp_path):
    torch.manual_seed(0)
    trained = shrink_all(monkeypatch, digits, wide())
    monkeypatch.setattr(networks, "ROUNDS", 5)
    asked = []

    def for_speedup(model, found, cost, speedup, runtime, precision):
        asked.append((speedup, runtime, cost.runtime, cost.batch_size))
        (name, *_) = found.dropped
        return dslib.Plan(dslib.Mask({site: site != name for site in found.sites}), dropped=[name]), (1.5, 1.4, 1.6)

    monkeypatch.setattr(compressing, "for_speedup", for_speedup)
    given = {**FEW, "model": "conftest:wide", "folder": tmp_path, "image_size": 16, "k": (1, 2)}
    given |= {"runtime": ("eager",), "planned_on": "nchw"}
    record, _ = run("networks", **given)
    rows = {row["network"]: row for row in record.values["rows"]}
    assert {name: len(row["removed"]) for name, row in rows.items()} == {"original": 0, "k1": 2, "k2": 1, "x1.5": 1}
    assert rows["x1.5"]["dropped"] == rows["x1.5"]["removed"]
    assert rows["x1.5"]["parameters"] < rows["k2"]["parameters"]
    assert asked == [(1.5, "nchw", "nchw (eager, contiguous), float32", 1)]
    assert [row["network"] for row in record.values["timings"]] == ["original", "k1", "k2", "x1.5", networks.DENSE]
    stored, _ = dslib.load(tmp_path / "original", "conftest:wide")
    assert torch.equal(stored.state_dict()["0.0.weight"], trained.state_dict()["0.0.weight"].half().float())
    assert rows["original"]["accuracy"] == dslib.evaluate(stored, digits.val)
    monkeypatch.setattr(networks, "compress", None)  # all stand
    assert run("networks", **given)[0].values["rows"] == record.values["rows"]
    text = (tmp_path / "original.json").read_text()
    (tmp_path / "original.json").write_text(text.replace('"image_size": 16', '"image_size": 32'))
    with pytest.raises(BadConfig, match="original.json is of conftest:wide at 32 px: give another folder"):
        run("networks", **given)
    with pytest.raises(BadConfig, match=r"speedup: expected more than 1, found 1.0"):
        run("networks", **given, speedup=(1.5, 1.0))
