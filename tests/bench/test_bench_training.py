"""Benchmarks of training: three accuracies, expanding, what a step costs, kills."""

import json
from pathlib import Path

import pytest
import torch
from benches import run, shrink_all

import dslib
from dslib.bench import ablation, benchmark, expand, kills, overhead
from dslib.errors import BadConfig, DslibError
from dslib.models import save_tensors
from dslib.records import Record

RESULTS = Path(__file__).parents[2] / "data" / "results"


def test_three_accuracies_of_a_mask_resumable(tmp_path, monkeypatch, digits):
    network = dslib.load_model("mobilenet_v2", digits.classes, options={"width_mult": 0.1}).model
    shrink_all(monkeypatch, digits, network)
    given = {"mask": "F", "data": "digits", "epochs": 1, "batch_size": 64, "device": "cpu"}
    record, _ = run("ablation", tmp_path / "r.json", seeds=1, **given)
    rows = record.values["rows"]
    assert [row.get("way") for row in rows] == ["original", "plain", "boundary", "distilled"]
    plain, boundary, distilled = rows[1:]
    assert boundary["before"] == distilled["before"]
    assert boundary["history"][0]["loss"] != distilled["history"][0]["loss"] != plain["history"][0]["loss"]
    assert list(ablation.table(record)["count"]) == [1, 1, 1]
    assert "device" not in record.config
    monkeypatch.setattr(ablation, "WAYS", {"plain": (False, False)})
    more, _ = run("ablation", tmp_path / "r.json", seeds=2, **given)
    assert more.values["rows"][:4] == rows
    assert len(more.values["rows"]) == 5


def test_a_mask_that_is_none_of_the_papers(monkeypatch, digits):
    with pytest.raises(BadConfig, match="unknown mask 'G'"):
        ablation.Ablation("G")
    shrink_all(monkeypatch, digits)
    with pytest.raises(BadConfig, match="17 sites, found 3 in mobilenet_v2"):
        run("ablation")


def test_a_network_trained_as_a_larger_one_against_itself_for_the_same_time(tmp_path, monkeypatch, digits):
    monkeypatch.setattr(expand, "TRIED", 6)
    monkeypatch.setattr(benchmark, "load_data", lambda *_: digits)
    given = {"model": "conftest:Tiny", "data": "digits", "epochs": 1, "lr": 0.4, "batch_size": 32}
    record, _ = run("expand", tmp_path / "e.json", seeds=1, device="cpu", **given)
    timing, expanded, plain = record.values["rows"]
    assert timing["slower"] > 1
    assert (expanded["way"], expanded["epochs"]) == ("expanded", 1)
    assert (plain["way"], plain["epochs"]) == ("as it is", round(timing["slower"]))
    assert expanded["config"]["ratio"] == 2.0
    monkeypatch.setattr(expand, "WAYS", {"expanded": expand.Boost})
    more, _ = run("expand", tmp_path / "e.json", seeds=2, device="cpu", **given)
    assert more.values["rows"][:3] == record.values["rows"]
    assert expand.table(more)["count"].to_dict() == {"as it is": 1, "expanded": 2}


def test_a_step_is_measured_against_a_bare_loop_in_turns(monkeypatch, digits):
    monkeypatch.setattr(benchmark, "load_data", lambda *_: digits)
    given = {"model": "conftest:Tiny", "data": "digits", "device": "cpu"}
    values = run("overhead", batch_size=16, rounds=5, **given)[0].values
    assert set(values["networks"]) == {"dslib", "bare"}
    ms = {name: row["latency_ms"] for name, row in values["networks"].items()}
    assert values["dslib_over_bare"] == pytest.approx(ms["dslib"] / ms["bare"])
    assert 0 < values["q25"] <= values["q75"]
    with pytest.raises(BadConfig, match=f"expected {20 + overhead.WARMUP + 1} batches, found 192 images"):
        run("overhead", rounds=20, **given)


@pytest.mark.timeout(900)
def test_a_run_killed_in_each_training_ends_as_one_that_was_not():
    record, told = run("kills", kills=2, seed=3, epochs=3)
    assert record.values["bit_for_bit"]
    assert (record.values["in_search"], record.values["in_finetune"]) == (1, 1)
    assert len(told) == 3


@pytest.mark.parametrize(
    ("differs", "named"),
    [("weights", "the weights in shrunk.safetensors, .*merged.safetensors$"), ("m", "what was learnt$")],
)
def test_a_killed_run_that_differs_is_an_error(monkeypatch, differs, named):
    monkeypatch.setattr(kills, "_to_the_end", lambda words: _made(Path(words[-1]), differs))
    monkeypatch.setattr(kills, "_kill_once", lambda *_: {"training": "search"})
    with pytest.raises(DslibError, match=f"differs from one that was not killed: {named}"):
        run("kills", kills=2)


def _made(out, differs):
    """A run's folder; what is named differs from folder to folder."""
    out.mkdir(exist_ok=True)
    own = float(out.name == "whole")
    for name in ("config", "original", "cost", "search", "finetune", "seconds"):
        made = {"search": 1.0, "shrunk": 1.0, "history": [], "m": {"a": own if differs == "m" else 0.0}}
        (out / f"{name}.json").write_text(json.dumps(made))
    for name in ("original", "shrunk", "merged"):
        value = own if differs == "weights" else 0.0
        save_tensors(out / f"{name}.safetensors", {"a": torch.full((2,), value)})


@pytest.mark.parametrize("mask", ["A", "C"])
def test_the_recorded_ablation_is_whole_and_says_what_the_chapter_says(mask):
    record = Record.load(RESULTS / f"ablation-mobilenet_v2-imagenette-{mask}.json")
    found = ablation.table(record)
    assert list(found["count"]) == [3, 3, 3]
    rows = {(row["way"], row["seed"]): row["accuracy"] for row in record.values["rows"] if "seed" in row}
    assert all(rows["plain", seed] - rows["boundary", seed] > 0.1 for seed in range(3))
    gained = found["mean"]["distilled"] - found["mean"]["boundary"]
    assert (gained > 1) if mask == "A" else abs(gained) < found["std"]["distilled"]
