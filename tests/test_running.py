"""The whole way through all stages on the command line: taken up again, from a calibrated network, interrupted."""

import dataclasses
import json
import signal
import time

import pytest
import torch
from conftest import MODEL, SHORT, start

import dslib
from dslib.cli.run import as_time
from dslib.models.weights import load_tensors
from dslib.running import CALIBRATED
from dslib.training.state import claimed


def test_run_does_all_stages_and_a_second_call_takes_everything_up(tmp_path, npz, cli, refused):
    words = ("run", *MODEL, "--data", npz, "--k", "1", "--out", "r", "--boundary", "ReLU6", *SHORT)
    out = cli(*words)
    for text in ("accuracy %", "MMACs", "images/s", "times as fast", "interleaved", "other top-1 on 0 of 32 images"):
        assert text in out
    assert "next: dslib export r/merged.json --trust conftest:Tiny --out net.onnx" in out
    names = {"config", "original", "cost", "search", "mask", "shrunk", "merged", "record"}
    assert names <= {path.stem for path in (tmp_path / "r").iterdir()}
    assert not list((tmp_path / "r").glob("*partial*"))
    record = dslib.records.Record.load(tmp_path / "r" / "record.json")
    assert record.values["k"] == 1
    assert record.values["largest_relative_difference"] < 1e-4
    assert record.values["networks"]["merged"]["accuracy"] > 0.8
    assert dslib.Mask.load(tmp_path / "r" / "mask.json").k == 1
    stages = (tmp_path / "r" / "merged.safetensors").stat().st_mtime_ns
    assert cli(*words).count("taken from") == 5
    assert (tmp_path / "r" / "merged.safetensors").stat().st_mtime_ns == stages
    assert "holds a run with other settings (k" in refused(*words[: -len(SHORT)], "--k", "2", *SHORT)


def test_run_from_a_calibrated_network(tmp_path, npz, cli, refused):
    words = ("run", *MODEL, "--data", npz, "--k", "1", "--out", "r", "--calibrate")
    assert "a calibrated network has no boundary activation" in refused(*words, "--boundary", "ReLU6")
    cli(*words, *SHORT)
    record = dslib.records.Record.load(tmp_path / "r" / "record.json")
    assert record.values["removed"] == record.values["merged"]
    assert len(record.values["merged"]) == 2
    assert record.values["networks"]["merged"]["accuracy"] > 0.8
    assert {"calibrated", "shrunk", "merged"} <= set(record.values["seconds"])
    start, recipe = dslib.load(tmp_path / "r" / "calibrated.json", "conftest:Tiny")
    merged, last = dslib.load(tmp_path / "r" / "merged.json", "conftest:Tiny")
    assert recipe == last
    weights = zip(start.parameters(), merged.parameters(), strict=True)
    assert not all(torch.equal(a, b) for a, b in weights)  # it was finetuned from there
    assert "--calibrate" in record.command
    assert "--finetune-epochs 2" in record.command
    assert "--finetune-lr" not in record.command
    config = json.loads((tmp_path / "r" / "config.json").read_text())["finetune"]
    assert (config["epochs"], config["lr"]) == (2, CALIBRATED.lr)  # one was given, the other is usual
    assert (config["augment"], config["freeze_batchnorm"]) == (False, True)
    assert cli(*words, *SHORT).count("taken from") == 6


def test_ctrl_c_keeps_what_was_done_and_the_same_command_goes_on(tmp_path, npz, cli):
    long = tuple("25" if word == "2" and SHORT[i - 1] == "--finetune-epochs" else word for i, word in enumerate(SHORT))
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
    assert [name for name in done if name.startswith(".")] == [".lock"]
    assert cli(*words).count("taken from") == 3
    assert (tmp_path / "r" / "record.json").exists()


def test_a_network_without_mergeable_site_is_refused_before_it_is_trained(tmp_path, npz, refused):
    words = [
        "run",
        "--model",
        "vgg11_bn",
        "--weights",
        "none",
        "--image-size",
        "32",
        "--k",
        "1",
        "--out",
        "r",
        "--data",
    ]
    assert "no mergeable site" in refused(*words, npz)
    assert not list((tmp_path / "r").glob("original*"))


def test_what_a_kill_left_of_the_first_write_is_no_run(tmp_path):
    config = dslib.Run("mobilenet_v2", "digits", 8)
    (tmp_path / ".config.123.partial.json").write_text("{")
    dslib.running._claim(tmp_path, config)
    assert (tmp_path / "config.json").exists()


def test_a_file_of_settings_that_is_none_is_one_line(tmp_path, refused):
    (tmp_path / "c.json").write_text('{"search": "x"}')
    assert "c.json: search: expected settings by name, found 'x'" in refused("run", "--config", "c.json")


def test_a_records_command_repeats_the_run():
    config = dslib.Run(
        "mobilenet_v2",
        "/somewhere/photos",
        8,
        boundary="ReLU6",
        options={"width_mult": 0.5},
        finetune=dslib.Finetune(epochs=3, lr=0.03, batch_size=64, augment=False),
    )
    words = dslib.running._command(config)
    assert words == (
        "dslib run --model mobilenet_v2 --data /somewhere/photos --k 8 --boundary ReLU6 --model-option width_mult=0.5 "
        "--finetune-epochs 3 --no-finetune-augment --out runs/x"
    )
    assert json.dumps(dataclasses.asdict(config))


def test_a_runs_own_settings_repeat_it(tmp_path, npz, cli, refused):
    words = ("run", *MODEL, "--data", npz, "--k", "1", *SHORT, "--search-lr", "0.02", "--boundary", "ReLU6")
    assert "--out: expected a folder" in refused(*words)
    cli(*words, "--out", "r", "--tensorboard")
    made = {path.name for path in (tmp_path / "r").iterdir()}
    assert {"search.csv", "finetune.csv", "train_the_original.csv", "tensorboard"} <= made
    config = json.loads((tmp_path / "r" / "config.json").read_text())
    cli("run", "--config", "r/config.json", "--finetune-epochs", "1", "--out", "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert again["finetune"].pop("epochs") == 1
    assert config["finetune"].pop("epochs") == 2
    assert again == config
    first, second = (load_tensors(tmp_path / f / "original.safetensors")[0] for f in ("r", "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    out = cli("eval", "r/merged.json", "--data", npz, "--trust", "conftest:Tiny")
    record = dslib.records.Record.load(tmp_path / "r" / "record.json")
    assert out.startswith(f"accuracy {record.values['networks']['merged']['accuracy']:.2%}, cross-entropy ")
    words = (*words, "--out", "r")
    cli(*words, "--finetune-workers", "3")  # how it is computed may differ
    assert "holds a run with other settings (finetune)" in refused(*words, "--finetune-lr", "0.9")
    (tmp_path / "odd.json").write_text(json.dumps(config | {"speed": 3}))
    assert "odd.json: unknown settings speed" in refused("run", "--config", "odd.json", "--out", "x")
    assert "no file none.json" in refused("run", "--config", "none.json", "--out", "x")


@pytest.mark.parametrize(
    ("way", "rows"),
    [((), ["original", "search", "finetune"]), (("--calibrate",), ["original", "ranking", "calibration", "finetune"])],
)
def test_a_dry_run_tells_of_each_training_and_writes_nothing(tmp_path, npz, cli, way, rows):
    out = cli("run", *MODEL, "--data", npz, "--k", "1", *SHORT, *way, "--dry-run")
    table = [line.split() for line in out.splitlines()]
    assert [row[0] for row in table] == ["images", *rows]
    assert "time" in table[0]
    assert "16 x 3 x 16 x 16" in out  # the pretraining's batch
    steps = {row[0]: row[8] for row in table[1:]}
    assert steps["original"] == "96"  # twelve epochs
    assert not way or (steps["ranking"], steps["calibration"]) == ("4", "1")  # each site and none of them, the plan
    assert {path.name for path in tmp_path.iterdir()} == {"easy.npz"}


def test_hours_are_told_in_units_that_people_read():
    told = [as_time(hours) for hours in (0.000588, 0.024, 0.026, 1.4, 1.6, 300, "")]
    assert told == ["2.1 s", "86.4 s", "1.6 min", "84.0 min", "1.6 h", "300.0 h", ""]


def test_a_second_run_in_the_same_folder_is_refused(tmp_path, npz, refused):
    with claimed(tmp_path / "r", folder=True):
        line = refused("run", *MODEL, "--data", npz, "--k", "1", "--out", "r", *SHORT)
    assert "r is being written by another run" in line
    assert {path.name for path in (tmp_path / "r").iterdir()} == {".lock"}
