"""The command line through its installed entry point: each verb, and what it refuses."""

import importlib
import re
from pathlib import Path
from unittest.mock import create_autospec

import pytest
import torch
from click.testing import CliRunner
from conftest import MODEL, SHORT, call, one_line

import dslib
from dslib.cli.bench import bench
from dslib.errors import BadConfig
from dslib.records import Record

OURS = "conftest:Tiny"  # what recipes are trusted to call
TRUST = ("--trust", OURS)


def test_the_stages_one_by_one(tmp_path, npz):
    status, _, err = call("run", *MODEL, "--data", npz, "--k", "2", "--out", "r", *SHORT, cwd=tmp_path)
    assert status == 0, err
    trained = ("--model", "conftest:Tiny", "--weights", "r/original.safetensors")
    short = ("--epochs", "1", "--batch-size", "32", "--lr", "0.1")
    steps = [
        ("sites", *trained, "--image-size", "16"),
        ("profile", *trained, "--image-size", "16", "--batch-size", "2", "--out", "cost.json"),
        (
            "profile",
            *trained,
            "--image-size",
            "16",
            "--batch-size",
            "2",
            "--runtime",
            "nchw",
            "--precision",
            "bfloat16",
            "--mask",
            "mask.json",
        ),
        (
            "search",
            *trained,
            "--data",
            npz,
            "--k",
            "1",
            *short,
            "--cost",
            "cost.json",
            "--latency-weight",
            "0.1",
            "--out",
            "s.json",
        ),
        (
            "shrink",
            *trained,
            "--data",
            npz,
            "--search",
            "s.json",
            "--k",
            "1",
            "--boundary",
            "ReLU6",
            "--out",
            "small.json",
        ),
        ("finetune", "small.json", "--data", npz, *short, "--teacher", "r/original.json", "--out", "done.json", *TRUST),
        ("merge", "done.json", "--out", "merged.json", *TRUST),
    ]
    dslib.Mask({f"blocks.{i}": i == 1 for i in range(3)}).save(tmp_path / "mask.json")
    outs = []
    for words in steps:
        status, out, err = call(*words, cwd=tmp_path)
        assert status == 0, err
        outs.append(out)
    assert "blocks.2" in outs[0]
    assert "saving_ms" in outs[1]
    assert "cpu, nchw (eager, contiguous), bfloat16" in outs[2]
    # of so small a network the sum of the blocks' savings may be more than all of it takes
    assert re.search(r"mask.json: -?[\d.]+ ms predicted, -?[\d.]+ times as fast", outs[2])
    assert "rank" in outs[3]
    assert "removed: " in outs[4]
    assert "accuracy" in outs[5]
    assert "merged 2 sites" in outs[6]
    records = {name: Record.load(tmp_path / f"{name}.record.json") for name in ("s", "done")}
    assert [record.name for record in records.values()] == ["search", "finetune"]
    assert records["s"].config["k"] == records["s"].config["epochs"] == 1
    assert records["done"].command.startswith("dslib finetune small.json --data ")
    assert f"accuracy {records['done'].values['accuracy']:.2%}" in outs[5]
    merged, recipe = dslib.load(tmp_path / "merged.json", OURS)
    assert not dslib.unmerged(merged)
    assert len(recipe.merged) == 2


def test_a_function_in_the_current_folder_and_other_classes(tmp_path, npz, refused):
    (tmp_path / "mynet.py").write_text(
        "from conftest import Tiny\n\n\ndef net(num_classes):\n    return Tiny(num_classes)\n"
    )
    weights = str(_weights(tmp_path))
    words = ("--model", "mynet:net", "--weights", weights, "--data", npz, "--mask", "m.json", "--out", "s.json")
    dslib.Mask({f"blocks.{i}": i == 1 for i in range(3)}).save(tmp_path / "m.json")
    assert call("shrink", *words, cwd=tmp_path)[0] == 0
    finetune = ("finetune", "s.json", "--data", "digits", "--out", "d.json")
    line = refused(*finetune, "--trust", "mynet:net")
    assert "is for 2 classes (0, 1, ...), digits has 10" in line
    for other in ((), TRUST):
        line = refused(*finetune, *other)
        assert "s.json would import and call mynet:net: if that is your own code, give --trust mynet:net" in line


def test_plans_borders_and_export_on_the_command_line(tmp_path, npz, refused):
    """A run of sites, then exact borders of both kinds, each rebuilt from its recipe; ONNX at the end."""
    status, _, err = call("run", *MODEL, "--data", npz, "--k", "2", "--out", "r", *SHORT, cwd=tmp_path)
    assert status == 0, err
    trained = ("--model", "conftest:Tiny", "--weights", "r/original.safetensors", "--data", npz)
    mask = dslib.Mask(dict.fromkeys(("blocks.0", "blocks.1", "blocks.2"), False))
    dslib.Plan(mask, [("blocks.0", "blocks.1")]).save(tmp_path / "plan.json")
    mask.save(tmp_path / "mask.json")
    steps = [
        ("shrink", *trained, "--plan", "plan.json", "--out", "run.json"),
        ("merge", "run.json", "--out", "run_merged.json", *TRUST),
        ("shrink", *trained, "--mask", "mask.json", "--no-hoist", "--out", "kept.json"),
        ("merge", "kept.json", "--out", "ones.json", *TRUST),
        ("merge", "kept.json", "--border-size", "16", "--out", "bias.json", *TRUST),
        ("export", "bias.json", "--out", "bias.onnx", *TRUST),
        ("bench", "merge", "--cases", "3", "--out", "fuzz.json"),
    ]
    outs = [call(*words, cwd=tmp_path) for words in steps]
    assert [status for status, _, _ in outs] == [0] * len(steps), outs
    assert "merged 2 sites" in outs[1][1]
    assert "3 cases, 0 failures" in outs[6][1]
    nets = {
        name: dslib.load(tmp_path / f"{name}.json", OURS)[0] for name in ("run", "run_merged", "kept", "ones", "bias")
    }
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(nets["run_merged"](x), nets["run"](x))
        torch.testing.assert_close(nets["ones"](x), nets["kept"](x))
        torch.testing.assert_close(nets["bias"](x), nets["kept"](x))
    assert (tmp_path / "bias.onnx").stat().st_size > 0
    assert "ending in .onnx or .pt2" in refused("export", "bias.json", "--out", "x.tflite", *TRUST)
    assert "--cases: expected 1 or more" in refused("bench", "merge", "--cases", "0")
    (tmp_path / "wrong.json").write_text('{"mask": {"blocks.0": true}, "runs": [["blocks.0", "blocks.1"]]}')
    assert "kept or unknown: blocks.0, blocks.1" in refused(
        "shrink", *trained, "--plan", "wrong.json", "--out", "w.json"
    )


def test_bad_input_is_one_line(tmp_path, npz, refused):
    run = ("run", *MODEL, "--data", npz, "--out", "r", *SHORT)
    status, _, err = call(*run, "--k", "4", cwd=tmp_path)
    assert status == 2
    assert "expected 0 to 3 for this network, found 4" in one_line(err)
    assert "found -1" in refused(*run, "--k", "-1")
    assert "unknown model 'mobilnet'" in refused("sites", "--model", "mobilnet")
    assert "NAME=VALUE" in refused("sites", "--model", "resnet18", "--model-option", "x")
    assert "Missing option '--k'" in refused("run", "--model", "resnet18", "--data", "digits", "--out", "q")
    other = tuple("nowhere.npz" if word == npz else word for word in run)
    assert "unknown dataset 'nowhere.npz'" in refused(*other, "--k", "1")
    assert "rounds: expected 1 or more" in refused(*run, "--k", "1", "--rounds", "0")
    assert "momentum: expected 0 to less than 1" in refused(*run, "--k", "1", "--search-momentum", "-1")
    assert "does not run on 64 x 64" in refused("sites", "--model", "vit_tiny_patch16_224", "--image-size", "64")
    assert "no device 'gpu9'" in refused("profile", "--model", "resnet18", "--device", "gpu9")
    assert "expected either --mask (--plan), or --search with --k" in refused(
        "shrink", *MODEL[:2], "--weights", str(_weights(tmp_path)), "--data", npz, "--out", "s.json"
    )
    assert "is not trained for the 2 classes" in refused("search", *MODEL, "--data", npz, "--out", "s.json")
    assert "no file" in refused("merge", "nowhere.json", "--out", "m.json")
    searching = ("search", *MODEL, "--data", npz, "--k", "1", "--out", "s.json", "--tensorboard")
    assert "--tensorboard: expected --curves too" in refused(*searching)
    assert "0 is not in the range" in refused("eval", "r.json", "--data", npz, "--batch-size", "0")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("")
    other = tuple("full" if word == "r" else word for word in run)
    assert "is not empty and holds no run" in refused(*other, "--k", "1")
    assert (tmp_path / "full" / "mine.txt").exists()
    (tmp_path / "file").write_text("")
    other = tuple("file/r" if word == "r" else word for word in run)
    assert "cannot write" in refused(*other, "--k", "1")


def test_help_and_version(tmp_path):
    status, out, _ = call("run", "--help", cwd=tmp_path)
    assert status == 0
    assert "--finetune-alpha" in out
    assert "weight of the teacher's soft labels" in " ".join(out.split())
    assert call("--version", cwd=tmp_path)[1].strip().endswith(dslib.__version__)


def _weights(folder: Path) -> Path:
    """Weights of a two-class Tiny."""
    from dslib.models.weights import save_tensors

    model = dslib.load_model("conftest:Tiny", ["0", "1"]).model
    return save_tensors(folder / "tiny.safetensors", model.state_dict())


@pytest.mark.parametrize("name", sorted(set(bench.commands) - {"compare", "retime"}))
def test_each_benchmark_is_called_with_what_it_takes(name, monkeypatch):
    module = importlib.import_module(f"dslib.bench.{'fuzz' if name == 'merge' else name}")
    function = next(key for key in vars(module) if key.startswith("record_"))
    called = create_autospec(getattr(module, function), side_effect=BadConfig("called"))
    monkeypatch.setattr(module, function, called)
    found = CliRunner().invoke(bench, [name])
    assert isinstance(found.exception, BadConfig), found.exception  # a TypeError if it takes something else
    assert called.call_count == 1


def test_records_are_compared_on_the_command_line(tmp_path):
    row = {
        "model": "m",
        "runtime": "eager",
        "precision": "float32",
        "batch_size": 1,
        "networks": {"dense": {"images_per_s": 8.0, "speedup": 1.25, "speedup_q25": 1.2, "speedup_q75": 1.3}},
    }
    for name, threads in (("a", 2), ("b", 16)):
        machine = {"processor": "P", "threads": threads}
        Record("table1", "dslib bench table1", {}, {"rows": [row]}, machine).save(tmp_path / f"{name}.json")
    found = CliRunner().invoke(bench, ["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    assert found.exit_code == 0, found.exception
    assert "P, 2 threads" in found.output
    assert "P, 16 threads" in found.output
    assert found.output.count("1.25") == 2
