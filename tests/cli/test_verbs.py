"""The command line: each verb, and what it refuses."""

import re

import click
import pytest
import torch
from click.testing import CliRunner
from conftest import MODEL, SHORT, call, write_npz

import dslib
from dslib.cli import app
from dslib.cli.options import argument_texts
from dslib.models.weights import save_tensors
from dslib.records import Record

OURS = "conftest:Tiny"  # what recipes are trusted to call
TRUST = ("--trust", OURS)
SIZE = ("--image-size", 16)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A folder with a dataset, and a run on it: words for its original network."""
    folder = tmp_path_factory.mktemp("ran")
    words = ("run", *MODEL, "--data", write_npz(folder), "--k", 2, "--out", folder / "r", *SHORT)
    assert CliRunner().invoke(app, [*map(str, words)], catch_exceptions=False).exit_code == 0
    return folder


@pytest.fixture
def trained(ran):
    return ("--model", OURS, "--weights", ran / "r" / "original.safetensors")


def test_the_stages_one_by_one(tmp_path, cli, ran, trained):
    data, short = ("--data", ran / "easy.npz"), ("--epochs", 1, "--batch-size", 32, "--lr", 0.1)
    mask = dslib.Mask({f"blocks.{i}": i == 1 for i in range(3)})
    mask.save(tmp_path / "mask.json")
    assert "blocks.2" in cli("sites", *trained, *SIZE)
    profile = ("profile", *trained, *SIZE, "--batch-size", 2)
    assert "saving_ms" in cli(*profile, "--out", "cost.json")
    out = cli(*profile, "--runtime", "nchw", "--precision", "bfloat16", "--mask", "mask.json")
    assert "cpu, nchw (eager, contiguous), bfloat16" in out
    # of so small a network the sum of the blocks' savings may be more than all of it takes
    assert re.search(r"mask.json: -?[\d.]+ ms predicted, -?[\d.]+ times as fast", out)
    search = ("search", *trained, *data, "--k", 1, *short, "--cost", "cost.json", "--latency-weight", 0.1)
    assert "rank" in cli(*search, "--out", "s.json")
    shrink = ("shrink", *trained, *data, "--search", "s.json", "--k", 1, "--boundary", "ReLU6")
    assert "removed: " in cli(*shrink, "--out", "small.json")
    teacher = ("--teacher", ran / "r" / "original.json")
    out = cli("finetune", "small.json", *data, *short, *teacher, "--out", "done.json", *TRUST)
    assert "merged 2 sites" in cli("merge", "done.json", "--out", "merged.json", *TRUST)
    records = {name: Record.load(tmp_path / f"{name}.record.json") for name in ("s", "done")}
    assert [record.name for record in records.values()] == ["search", "finetune"]
    assert records["s"].config["k"] == records["s"].config["epochs"] == 1
    assert records["done"].command.startswith("dslib finetune small.json --data ")
    accuracy = f"accuracy {records['done'].values['accuracy']:.2%}"
    assert accuracy in out
    assert accuracy in cli("eval", "merged.json", *data, *TRUST)
    merged, recipe = dslib.load(tmp_path / "merged.json", OURS)
    assert not dslib.unmerged(merged)
    assert len(recipe.merged) == 2


def test_plans_borders_and_export(tmp_path, cli, refused, ran, trained):
    """A run of sites, then exact borders of both kinds, each rebuilt from its recipe; an exported file at the end."""
    mask = dslib.Mask(dict.fromkeys(("blocks.0", "blocks.1", "blocks.2"), False))
    dslib.Plan(mask, [("blocks.0", "blocks.1")]).save(tmp_path / "plan.json")
    mask.save(tmp_path / "mask.json")
    shrink = ("shrink", *trained, "--data", ran / "easy.npz")
    cli(*shrink, "--plan", "plan.json", "--out", "run.json")
    assert "merged 2 sites" in cli("merge", "run.json", "--out", "run_merged.json", *TRUST)
    cli(*shrink, "--mask", "mask.json", "--no-hoist", "--out", "kept.json")
    cli("merge", "kept.json", "--out", "ones.json", *TRUST)
    cli("merge", "kept.json", "--border-size", 16, "--out", "bias.json", *TRUST)
    cli("export", "bias.json", "--out", "bias.pt2", *TRUST)
    names = ("run", "run_merged", "kept", "ones", "bias")
    nets = {name: dslib.load(tmp_path / f"{name}.json", OURS)[0] for name in names}
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(nets["run_merged"](x), nets["run"](x))
        torch.testing.assert_close(nets["ones"](x), nets["kept"](x))
        torch.testing.assert_close(nets["bias"](x), nets["kept"](x))
        torch.testing.assert_close(torch.export.load(tmp_path / "bias.pt2").module()(x), nets["bias"](x))
    assert "ending in .onnx or .pt2" in refused("export", "bias.json", "--out", "x.tflite", *TRUST)
    (tmp_path / "wrong.json").write_text('{"mask": {"blocks.0": true}, "runs": [["blocks.0", "blocks.1"]]}')
    line = refused(*shrink, "--plan", "wrong.json", "--out", "w.json")
    assert "kept or unknown: blocks.0, blocks.1" in line


def test_a_function_in_the_current_folder_and_other_classes(tmp_path, cli, npz, refused):
    (tmp_path / "mynet.py").write_text("from conftest import Tiny as net")
    words = ("--model", "mynet:net", "--weights", weights(tmp_path), "--data", npz, "--mask", "m.json")
    dslib.Mask({f"blocks.{i}": i == 1 for i in range(3)}).save(tmp_path / "m.json")
    cli("shrink", *words, "--out", "s.json")
    finetune = ("finetune", "s.json", "--data", "digits", "--out", "d.json")
    assert "is for 2 classes (0, 1, ...), digits has 10" in refused(*finetune, "--trust", "mynet:net")
    for other in ((), TRUST):
        line = refused(*finetune, *other)
        assert "s.json would import and call mynet:net: if that is your own code, give --trust mynet:net" in line


def test_the_current_folder_shadows_no_library(tmp_path, cli, monkeypatch):
    (tmp_path / "libraries").mkdir()
    (tmp_path / "libraries" / "some_library.py").write_text("from conftest import Tiny as net")
    (tmp_path / "some_library.py").write_text("raise RuntimeError('not this one')")
    monkeypatch.syspath_prepend(tmp_path / "libraries")
    assert "blocks.2" in cli("sites", "--model", "some_library:net", *SIZE)


def test_bad_input_is_one_line(tmp_path, npz, refused):
    def run(*more, data=npz, out="r"):
        return refused("run", *MODEL, "--data", data, "--out", out, *SHORT, *more)

    assert "expected 0 to 3 for this network, found 4" in run("--k", 4)
    assert "found -1" in run("--k", -1)
    assert "unknown model 'mobilnet'" in refused("sites", "--model", "mobilnet")
    assert "NAME=VALUE" in refused("sites", "--model", "resnet18", "--model-option", "x")
    assert "Missing option '--k'" in refused("run", "--model", "resnet18", "--data", "digits", "--out", "q")
    assert "unknown dataset 'nowhere.npz'" in run("--k", 1, data="nowhere.npz")
    assert "rounds: expected 1 or more" in run("--k", 1, "--rounds", 0)
    assert "momentum: expected 0 to less than 1" in run("--k", 1, "--search-momentum", -1)
    assert "does not run on 64 x 64" in refused("sites", "--model", "vit_tiny_patch16_224", "--image-size", 64)
    assert "no device 'gpu9'" in refused("profile", "--model", "resnet18", "--device", "gpu9")
    shrink = ("shrink", *MODEL[:2], "--weights", weights(tmp_path), "--data", npz, "--out", "s.json")
    assert "expected either --mask (--plan), or --search with --k" in refused(*shrink)
    assert "is not trained for the 2 classes" in refused("search", *MODEL, "--data", npz, "--out", "s.json")
    assert "no file" in refused("merge", "nowhere.json", "--out", "m.json")
    searching = ("search", *MODEL, "--data", npz, "--k", 1, "--out", "s.json", "--tensorboard")
    assert "--tensorboard: expected --curves too" in refused(*searching)
    assert "0 is not in the range" in refused("eval", "r.json", "--data", npz, "--batch-size", 0)
    assert "cases: expected 1 or more" in refused("bench", "merge", "--cases", 0)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("")
    assert "is not empty and holds no run" in run("--k", 1, out="full")
    assert (tmp_path / "full" / "mine.txt").exists()
    (tmp_path / "file").write_text("")
    assert "cannot write" in run("--k", 1, out="file/r")


def test_the_installed_program(tmp_path):
    """Once as a user's shell starts it: the version, and the line and status of a mistake."""
    assert call("--version", cwd=tmp_path)[1].strip().endswith(dslib.__version__)
    status, _, err = call("sites", "--model", "mobilnet", cwd=tmp_path)
    assert (status, err.count("\n")) == (2, 1)
    assert err.startswith("dslib: unknown model 'mobilnet'")


def test_an_arguments_whole_text_is_its_help(cli):
    told = " ".join(cli("search", "--help").split())
    assert "falls from all to k; 0 is the paper's: k from the first step." in told
    assert "Learning rate of m, relative to the weights'" in told
    told = " ".join(cli("run", "--help").split())
    assert "--finetune-alpha FLOAT Weight of the teacher's soft labels" in told
    for missing in ("its share of the machine's cores, 16 at most", "relative to their variance; 0 is none"):
        assert missing in told


def test_a_continued_text_is_no_argument():
    def painted(coats: int, colour: str) -> None:
        """A wall.

        Args:
            coats, layers: how many, all of one colour
                or none: never two.
            colour: of the coats.
        Raises:
            nothing: whatever comes.
        """

    assert argument_texts(painted) == {
        "coats": "How many, all of one colour or none: never two.",
        "layers": "How many, all of one colour or none: never two.",
        "colour": "Of the coats.",
    }


def test_every_option_says_what_it_is_for():
    """From a docstring, as a rule; a name that the docstring does not explain would have none."""
    for name in sorted(set(app.commands) - {"bench"}):
        command = app.get_command(None, name)
        options = [option for option in command.params if isinstance(option, click.Option)]
        assert [option.name for option in options if not option.help] == [], name


def weights(folder):
    """Weights of a two-class Tiny, in a file."""
    model = dslib.load_model("conftest:Tiny", ["0", "1"]).model
    return save_tensors(folder / "tiny.safetensors", model.state_dict())
