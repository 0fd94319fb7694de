"""The command line through its installed entry point, and the whole way through all stages."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import dslib
from dslib.cli import main
from dslib.running import CALIBRATED

HERE = Path(__file__).parent
SCRIPT = Path(sys.executable).with_name("dslib")
MODEL = ("--model", "conftest:Tiny", "--weights", "none")
SHORT = (
    "--pretrain-epochs", "12", "--pretrain-batch-size", "16", "--search-epochs", "1", "--finetune-epochs", "2",
    "--rounds", "3", "--batch-size", "4",
    "--device", "cpu",
)  # fmt: skip


def start(*words, cwd, **popen) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "2"}
    return subprocess.Popen([SCRIPT, *map(str, words)], cwd=cwd, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **popen)  # fmt: skip


def call(*words, cwd) -> tuple[int, str, str]:
    process = start(*words, cwd=cwd)
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Runs a command in this process, in tmp_path; gives the one line that it is refused with."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run(*words) -> str:
        monkeypatch.setattr(sys, "argv", ["dslib", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 2
        return one_line(capsys.readouterr().err)

    return run


def one_line(err: str) -> str:
    lines = [line for line in err.splitlines() if line.startswith("dslib: ")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0]


@pytest.fixture
def npz(tmp_path):
    """Sixteen-pixel images of two classes that are easy to tell apart."""
    generator = np.random.default_rng(0)
    y = np.arange(160) % 2
    x = (generator.integers(0, 120, (160, 16, 16, 3)) + 120 * y[:, None, None, None]).astype(np.uint8)
    np.savez(tmp_path / "easy.npz", x_train=x[:128], y_train=y[:128], x_test=x[128:], y_test=y[128:])
    return tmp_path / "easy.npz"


def test_run_does_all_stages_and_a_second_call_takes_everything_up(tmp_path, npz, refused):
    words = ("run", *MODEL, "--data", npz, "--k", "1", "--out", "r", "--boundary", "ReLU6", *SHORT)
    status, out, err = call(*words, cwd=tmp_path)
    assert status == 0, err
    for text in (
        "accuracy %",
        "MMACs",
        "images/s",
        "times as fast",
        "interleaved",
        "other top-1 on 0 of 32 images",
    ):
        assert text in out
    names = {"config", "original", "cost", "search", "mask", "shrunk", "merged", "record"}
    assert names <= {path.stem for path in (tmp_path / "r").iterdir()}
    assert not list((tmp_path / "r").glob("*partial*"))
    record = dslib.records.Record.load(tmp_path / "r" / "record.json")
    assert record.values["k"] == 1
    assert record.values["largest_relative_difference"] < 1e-4
    assert record.values["networks"]["merged"]["accuracy"] > 0.8
    assert dslib.Mask.load(tmp_path / "r" / "mask.json").k == 1
    stages = (tmp_path / "r" / "merged.safetensors").stat().st_mtime_ns
    status, out, _ = call(*words, cwd=tmp_path)
    assert status == 0
    assert out.count("taken from") == 5
    assert (tmp_path / "r" / "merged.safetensors").stat().st_mtime_ns == stages
    assert "holds a run with other settings (k" in refused(*words[: -len(SHORT)], "--k", "2", *SHORT)


def test_run_from_a_calibrated_network(tmp_path, npz, refused):
    words = ("run", *MODEL, "--data", npz, "--k", "1", "--out", "r", "--calibrate")
    assert "a calibrated network has no boundary activation" in refused(*words, "--boundary", "ReLU6")
    status, out, err = call(*words, *SHORT, cwd=tmp_path)
    assert status == 0, err
    record = dslib.records.Record.load(tmp_path / "r" / "record.json")
    assert record.values["removed"] == record.values["merged"]
    assert len(record.values["merged"]) == 2
    assert record.values["networks"]["merged"]["accuracy"] > 0.8
    assert {"calibrated", "shrunk", "merged"} <= set(record.values["seconds"])
    start, recipe = dslib.load(tmp_path / "r" / "calibrated.json")
    merged, last = dslib.load(tmp_path / "r" / "merged.json")
    assert recipe == last
    weights = zip(start.parameters(), merged.parameters(), strict=True)
    assert not all(torch.equal(a, b) for a, b in weights)  # it was finetuned from there
    assert "--calibrate" in record.command
    assert "--finetune-epochs 2" in record.command
    assert "--finetune-lr" not in record.command
    config = json.loads((tmp_path / "r" / "config.json").read_text())["finetune"]
    assert (config["epochs"], config["lr"]) == (2, CALIBRATED.lr)  # one was given, the other is usual
    assert (config["augment"], config["freeze_batchnorm"]) == (False, True)
    status, out, _ = call(*words, *SHORT, cwd=tmp_path)
    assert out.count("taken from") == 6


def test_the_stages_one_by_one(tmp_path, npz):
    status, _, err = call("run", *MODEL, "--data", npz, "--k", "2", "--out", "r", *SHORT, cwd=tmp_path)
    assert status == 0, err
    trained = ("--model", "conftest:Tiny", "--weights", "r/original.safetensors")
    short = ("--epochs", "1", "--batch-size", "32", "--lr", "0.1")
    steps = [
        ("sites", *trained, "--image-size", "16"),
        ("profile", *trained, "--image-size", "16", "--batch-size", "2", "--out", "cost.json"),
        ("search", *trained, "--data", npz, "--k", "1", *short, "--cost", "cost.json", "--latency-weight", "0.1",
         "--out", "s.json"),
        ("shrink", *trained, "--data", npz, "--search", "s.json", "--k", "1", "--boundary", "ReLU6",
         "--out", "small.json"),
        ("finetune", "small.json", "--data", npz, *short, "--teacher", "r/original.json", "--out", "done.json"),
        ("merge", "done.json", "--out", "merged.json"),
    ]  # fmt: skip
    outs = []
    for words in steps:
        status, out, err = call(*words, cwd=tmp_path)
        assert status == 0, err
        outs.append(out)
    assert "blocks.2" in outs[0]
    assert "saving_ms" in outs[1]
    assert "rank" in outs[2]
    assert "removed: " in outs[3]
    assert "accuracy" in outs[4]
    assert "merged 2 sites" in outs[5]
    merged, recipe = dslib.load(tmp_path / "merged.json")
    assert not dslib.unmerged(merged)
    assert len(recipe.merged) == 2


def test_ctrl_c_keeps_what_was_done_and_the_same_command_goes_on(tmp_path, npz):
    long = tuple("400" if word == "2" and SHORT[i - 1] == "--finetune-epochs" else word for i, word in enumerate(SHORT))
    words = ("run", *MODEL, "--data", npz, "--k", "1", "--out", "r", *long)
    # a job that a shell put into the background ignores SIGINT, and so would its children
    process = start(*words, cwd=tmp_path, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    partial = tmp_path / "r" / "finetune.partial.safetensors"
    deadline = time.monotonic() + 300
    while not partial.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err.splitlines()[-1] == "dslib: interrupted: what was finished is kept; the same command goes on from there"
    assert partial.exists()
    done = {path.name for path in (tmp_path / "r").iterdir()}
    assert "search.json" in done
    assert not {"shrunk.json", "shrunk.safetensors", "merged.json", "record.json"} & done
    assert not [name for name in done if name.startswith(".")]
    config = json.loads((tmp_path / "r" / "config.json").read_text())
    config["finetune"]["epochs"] = 2  # the same folder, a shorter way: what was done is taken, the rest is done
    (tmp_path / "r" / "config.json").write_text(json.dumps(config))
    status, out, err = call("run", *MODEL, "--data", npz, "--k", "1", "--out", "r", *SHORT, cwd=tmp_path)
    assert status == 0, err
    assert out.count("taken from") == 3
    assert (tmp_path / "r" / "record.json").exists()


def test_a_function_in_the_current_folder_and_other_classes(tmp_path, npz, refused):
    (tmp_path / "mynet.py").write_text(
        "from conftest import Tiny\n\n\ndef net(num_classes):\n    return Tiny(num_classes)\n"
    )
    weights = str(_weights(tmp_path))
    words = ("--model", "mynet:net", "--weights", weights, "--data", npz, "--mask", "m.json", "--out", "s.json")
    dslib.Mask({f"blocks.{i}": i == 1 for i in range(3)}).save(tmp_path / "m.json")
    assert call("shrink", *words, cwd=tmp_path)[0] == 0
    line = refused("finetune", "s.json", "--data", "digits", "--out", "d.json")
    assert "is for 2 classes (0, 1, ...), digits has 10" in line


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
        ("merge", "run.json", "--out", "run_merged.json"),
        ("shrink", *trained, "--mask", "mask.json", "--no-hoist", "--out", "kept.json"),
        ("merge", "kept.json", "--out", "ones.json"),
        ("merge", "kept.json", "--border-size", "16", "--out", "bias.json"),
        ("export", "bias.json", "--out", "bias.onnx"),
        ("bench", "merge", "--cases", "3", "--out", "fuzz.json"),
    ]  # fmt: skip
    outs = [call(*words, cwd=tmp_path) for words in steps]
    assert [status for status, _, _ in outs] == [0] * len(steps), outs
    assert "merged 2 sites" in outs[1][1]
    assert "3 cases, 0 failures" in outs[6][1]
    nets = {name: dslib.load(tmp_path / f"{name}.json")[0] for name in ("run", "run_merged", "kept", "ones", "bias")}
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(nets["run_merged"](x), nets["run"](x))
        torch.testing.assert_close(nets["ones"](x), nets["kept"](x))
        torch.testing.assert_close(nets["bias"](x), nets["kept"](x))
    assert (tmp_path / "bias.onnx").stat().st_size > 0
    assert "ending in .onnx or .pt2" in refused("export", "bias.json", "--out", "x.tflite")
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
    assert "momentum: expected 0 to 1" in refused(*run, "--k", "1", "--search-momentum", "-1")
    assert "does not run on 64 x 64" in refused("sites", "--model", "vit_tiny_patch16_224", "--image-size", "64")
    assert "no device 'gpu9'" in refused("profile", "--model", "resnet18", "--device", "gpu9")
    assert "expected either --mask (--plan), or --search with --k" in refused(
        "shrink", *MODEL[:2], "--weights", str(_weights(tmp_path)), "--data", npz, "--out", "s.json"
    )
    assert "is not trained for the 2 classes" in refused("search", *MODEL, "--data", npz, "--out", "s.json")
    assert "no file" in refused("merge", "nowhere.json", "--out", "m.json")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("")
    other = tuple("full" if word == "r" else word for word in run)
    assert "is not empty and holds no run" in refused(*other, "--k", "1")
    assert (tmp_path / "full" / "mine.txt").exists()
    (tmp_path / "file").write_text("")
    other = tuple("file/r" if word == "r" else word for word in run)
    assert "cannot write" in refused(*other, "--k", "1")


def test_a_network_without_mergeable_site_is_refused_before_it_is_trained(tmp_path, npz, refused):
    words = (
        "run",
        "--model",
        "vgg11_bn",
        "--weights",
        "none",
        "--data",
        npz,
        "--image-size",
        "32",
        "--k",
        "1",
        "--out",
        "r",
    )
    started = time.monotonic()
    assert "no mergeable site" in refused(*words)
    assert time.monotonic() - started < 120


def test_help_and_version(tmp_path):
    status, out, _ = call("run", "--help", cwd=tmp_path)
    assert status == 0
    assert "--finetune-alpha" in out
    assert "weight of the teacher's soft labels" in " ".join(out.split())
    assert call("--version", cwd=tmp_path)[1].strip().endswith(dslib.__version__)


def _weights(folder: Path) -> Path:
    """Weights of a two-class Tiny."""
    from dslib.checkpoints import save_tensors

    model = dslib.load_model("conftest:Tiny", ["0", "1"]).model
    return save_tensors(folder / "tiny.safetensors", model.state_dict())


def test_a_records_command_repeats_the_run():
    config = dslib.Run("mobilenet_v2", "/somewhere/photos", 8, boundary="ReLU6", options={"width_mult": 0.5},
                       finetune=dslib.Finetune(epochs=3, lr=0.03, batch_size=64, augment=False))  # fmt: skip
    words = dslib.running._command(config)
    assert words == (
        "dslib run --model mobilenet_v2 --data /somewhere/photos --k 8 --boundary ReLU6 --model-option width_mult=0.5 "
        "--finetune-epochs 3 --no-finetune-augment --out runs/x"
    )
    assert json.dumps(dataclasses.asdict(config))
