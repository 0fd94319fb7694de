"""`dslib calibrate` and `dslib importance`, for a trained Tiny."""

import re
import warnings

import pytest
from conftest import Tiny
from PIL import Image
from torch import nn

import dslib
from dslib import compressing
from dslib.models.weights import save_tensors
from dslib.ranking import Importances
from dslib.records import Record

NETWORK = ("--model", "conftest:Tiny", "--weights", "tiny.safetensors", "--device", "cpu")


@pytest.fixture(autouse=True)
def weights(tmp_path):
    save_tensors(tmp_path / "tiny.safetensors", dslib.load_model("conftest:Tiny").model.state_dict())


def write_photos(folder, count):
    for i in range(count):
        path = folder / str(i % 3) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((40, 30), 80).convert("RGB").save(path)


def test_a_folder_of_photos_is_enough(tmp_path, cli, refused):
    write_photos(tmp_path / "photos", 12)
    words = ("calibrate", *NETWORK, "--images", "photos", "--image-size", 32, "--k", 1, "--out", "net.json")
    out = cli(*words, "--ranking", "ranking.json", "--rank-count", 8, "--no-refit")
    assert "k=1 of 3" in out
    assert "agrees with the original on" in out
    model, recipe = dslib.load(tmp_path / "net.json", "conftest:Tiny")
    assert len(recipe.merged) == 2
    assert not dslib.unmerged(model)
    assert Importances.load(tmp_path / "ranking.json").mask(1) == dslib.Mask(recipe.mask)
    (tmp_path / "photos" / "0" / "broken.png").write_bytes(b"no image")
    assert "broken.png" in refused(*words)
    assert "ranking: taken from" in cli(*words, "--ranking", "ranking.json", "--skip-corrupt")


def test_a_warning_is_one_line_and_a_ranking_says_it_once(tmp_path, cli, monkeypatch):
    def show(*warning, **_):  # as Python does where no test collects warnings
        shown.append(warnings.formatwarning(*warning[:4]))

    shown = []
    write_photos(tmp_path / "photos", 4)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        monkeypatch.setattr(warnings, "showwarning", show)
        words = ("calibrate", *NETWORK, "--images", "photos", "--count", 4, "--image-size", 16, "--k", 0)
        cli(*words, "--out", "net.json")
    err = "".join(shown)
    told = re.findall(r"^.*(?:warn|\.py).*$", err, re.MULTILINE | re.IGNORECASE)
    assert set(told) == {
        "warning: 4 images have fewer positions than some convolutions have weights to fit: give more images"
    }
    assert len(told) <= 2  # of the ranking's four calibrations, and of the last one


@pytest.mark.parametrize("labels", ["--labels", "--no-labels"])
def test_importances_on_the_command_line(tmp_path, cli, refused, labels):
    words = ("importance", *NETWORK, "--data", "digits", "--image-size", 16, "--longest", 2, "--drop", labels)
    out = cli(*words, "--count", 64, "--out", "found.json")
    found = Importances.load(tmp_path / "found.json")
    assert set(found.scores) == {f"blocks.{i}" for i in range(3)}
    assert f"blocks.0+blocks.1 as one convolution: {found.runs['blocks.0+blocks.1']:.4f}" in out
    assert f"blocks.2 dropped: {found.dropped['blocks.2']:.4f}" in out
    assert "--drop" in Record.load(tmp_path / "found.json").command.split()
    assert "count: expected 2 or more" in refused(*words, "--count", 0, "--out", "other.json")
    assert not (tmp_path / "other.json").exists()


def test_a_labelled_dataset_a_mask_and_a_speedup(tmp_path, cli, monkeypatch):
    mask = dslib.find_sites(Tiny(), 32).mask(["blocks.1"])
    mask.save(tmp_path / "mask.json")
    words = ("calibrate", *NETWORK, "--images", "digits", "--count", 64, "--out", "net.json")
    assert "accuracy" in cli(*words, "--mask", "mask.json")
    assert dslib.load(tmp_path / "net.json", "conftest:Tiny")[1].classes == tuple("0123456789")
    plan = dslib.Plan(dslib.Mask({**mask, "blocks.0": False}), dropped=["blocks.0"])
    monkeypatch.setattr(compressing, "for_speedup", lambda *_, **__: (plan, (1.5, 1.4, 1.6)))
    out = cli(*words, "--speedup", 1.4, "--drop")
    assert "ranking 3 sites on 64 photos, 6 calibrations" in out
    assert "1.50 times as fast as the original (quartiles 1.40 to 1.60; eager, channels_last, float32)" in out
    assert "k=1 of 3, removed: blocks.2; dropped: blocks.0" in out
    network, recipe = dslib.load(tmp_path / "net.json", "conftest:Tiny")
    assert (recipe.dropped, recipe.merged) == (("blocks.0",), ("blocks.2",))
    assert isinstance(network.blocks[0], nn.Identity)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ((), "expected one of k, speedup and plan"),
        (("--k", 1, "--speedup", 2), "expected one of k, speedup and plan"),
        (("--speedup", 1), "speedup: expected more than 1, found 1"),
        (("--k", 1, "--drop"), "drop is for speedup"),
        (("--k", 7), "expected 0 to 3 for this network, found 7"),
        (("--k", 1, "--count", 0), "--count: expected 1 or more, found 0"),
        (("--k", 1, "--weights", "none"), "is not trained for these images"),
        (("--k", 1, "--runtime", "tensorrt"), "runtime tensorrt"),
        (("--k", 1, "--images", "."), "expected a folder of photos"),
    ],
)
def test_wrong_words_are_refused(tmp_path, refused, words, text):
    assert text in refused("calibrate", *NETWORK, "--images", "digits", "--out", "other.json", *words)
    assert not (tmp_path / "other.json").exists()
