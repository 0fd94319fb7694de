"""Benchmarks of training: three accuracies, expanding, what a step costs, kills."""

import json
from pathlib import Path

import pytest
import torch

import dslib
from dslib.bench import ablation, expand, kills, overhead
from dslib.errors import BadConfig, DslibError
from dslib.models.weights import save_tensors
from dslib.records import Record
from dslib.running import Run, pretrain


@pytest.fixture
def teacher(tmp_path):
    """Weights of a small MobileNetV2, trained for a moment on the digits."""
    data = dslib.load_data("digits")
    model = dslib.load_model("mobilenet_v2", data.classes, options={"width_mult": 0.1}).model
    config = dslib.Train(epochs=4, lr=0.4, batch_size=64, warmup=1)
    pretrain(model, data, Run("mobilenet_v2", "digits", 8, pretrain=config), head_only=False)
    return save_tensors(tmp_path / "w.safetensors", model.state_dict())


def test_three_accuracies_of_a_mask_resumable(tmp_path, teacher):
    given = {
        "model": "mobilenet_v2",
        "weights": str(teacher),
        "options": {"width_mult": 0.1},
        "data": "digits",
        "epochs": 1,
        "device": "cpu",
        "out": tmp_path / "r.json",
    }
    said = []
    record = ablation.record_ablation("F", seeds=1, **given, echo=said.append)
    rows = record.values["rows"]
    assert [row.get("way") for row in rows] == ["original", "plain", "boundary", "distilled"]
    plain, boundary, distilled = rows[1:]
    assert plain["before"] != boundary["before"]
    assert boundary["before"] == distilled["before"]
    assert boundary["history"][0]["loss"] != distilled["history"][0]["loss"]
    assert list(ablation.table(record)["count"]) == [1, 1, 1]
    more = ablation.record_ablation("F", seeds=2, **given, echo=said.append)
    assert more.values["rows"][:4] == rows
    assert len(more.values["rows"]) == 7
    assert Record.load(tmp_path / "r.json").values == more.values
    with pytest.raises(BadConfig, match="other settings"):
        ablation.record_ablation("A", seeds=1, **given)


def test_a_mask_that_is_none_of_the_papers(tmp_path):
    with pytest.raises(BadConfig, match="unknown mask 'G'"):
        ablation.record_ablation("G")
    path = save_tensors(tmp_path / "w.safetensors", dslib.load_model("resnet18", list("0123456789")).model.state_dict())
    with pytest.raises(BadConfig, match="17 sites, found 8 in resnet18"):
        ablation.record_ablation("A", model="resnet18", weights=str(path), data="digits")


def test_a_network_trained_as_a_larger_one_against_itself_for_the_same_time(tmp_path, monkeypatch):
    monkeypatch.setattr(expand, "TRIED", 6)
    given = {
        "model": "mobilenet_v2",
        "options": {"width_mult": 0.1},
        "data": "digits",
        "epochs": 1,
        "lr": 0.4,
        "batch_size": 64,
        "device": "cpu",
        "out": tmp_path / "e.json",
    }
    record = expand.record_expand(seeds=1, **given, echo=lambda _: None)
    timing, expanded, plain = record.values["rows"]
    assert timing["slower"] > 1
    assert (expanded["way"], expanded["epochs"]) == ("expanded", 1)
    assert (plain["way"], plain["epochs"]) == ("as it is", round(timing["slower"]))
    assert expanded["config"]["ratio"] == 2.0
    more = expand.record_expand(seeds=2, **given, echo=lambda _: None)
    assert more.values["rows"][:3] == record.values["rows"]
    assert list(expand.table(more)["count"]) == [2, 2]


def test_a_step_is_measured_against_a_bare_loop_in_turns():
    record = overhead.record_overhead("conftest:Tiny", "digits", batch_size=16, rounds=5, device="cpu")
    values = record.values
    assert set(values["networks"]) == {"dslib", "bare"}
    ms = {name: row["latency_ms"] for name, row in values["networks"].items()}
    assert values["dslib_over_bare"] == pytest.approx(ms["dslib"] / ms["bare"])
    assert 0 < values["q25"] <= values["q75"]
    with pytest.raises(BadConfig, match="expected 2000006 batches, found 1437 images"):
        overhead.record_overhead("conftest:Tiny", "digits", rounds=2_000_000)


@pytest.mark.timeout(900)
def test_a_run_killed_in_each_training_ends_as_one_that_was_not():
    record = kills.record_kills(2, seed=3, epochs=3)
    assert record.values["bit_for_bit"]
    assert (record.values["in_search"], record.values["in_finetune"]) == (1, 1)


@pytest.mark.parametrize(
    ("differs", "named"),
    [("weights", "the weights in shrunk.safetensors, .*merged.safetensors$"), ("m", "what was learnt$")],
)
def test_a_killed_run_that_differs_is_an_error(monkeypatch, differs, named):
    monkeypatch.setattr(kills, "_to_the_end", lambda words: _made(Path(words[-1]), differs))
    monkeypatch.setattr(kills, "_kill_once", lambda *_: {"training": "search"})
    with pytest.raises(DslibError, match=f"differs from one that was not killed: {named}"):
        kills.record_kills(2)


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


RESULTS = Path(__file__).parents[2] / "data" / "results"


@pytest.mark.parametrize("mask", ["A", "C"])
def test_the_recorded_ablation_is_whole_and_says_what_the_chapter_says(mask):
    record = Record.load(RESULTS / f"ablation-mobilenet_v2-imagenette-{mask}.json")
    found = ablation.table(record)
    assert list(found["count"]) == [3, 3, 3]
    rows = {(row["way"], row["seed"]): row["accuracy"] for row in record.values["rows"] if "seed" in row}
    assert all(rows["plain", seed] - rows["boundary", seed] > 0.1 for seed in range(3))
    gained = found["mean"]["distilled"] - found["mean"]["boundary"]
    assert (gained > 1) if mask == "A" else abs(gained) < found["std"]["distilled"]
