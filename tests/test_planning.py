"""Planning without labels, and `dslib calibrate`."""

import itertools
import sys

import numpy as np
import pytest
from conftest import Tiny, photos

import dslib
from dslib import planning
from dslib.calibration import Calibrate, calibrate, logits_of
from dslib.errors import DslibError, MaskMismatch
from dslib.measuring import Timing
from dslib.planning import agreement, cheapest, divergence, for_speedup, rank
from dslib.profiling import CostTable
from dslib.searching import Found


def test_ranking_gives_a_mask_for_every_k(tiny):
    x = photos(48)
    sites = dslib.find_sites(tiny, 32)
    found = rank(tiny, sites, x, progress=False)
    assert all(value > 0 for value in found.m.values())
    assert [found.mask(k).k for k in range(4)] == [0, 1, 2, 3]
    alone = calibrate(tiny, sites.mask(["blocks.0", "blocks.1"]), x, Calibrate(refit=False)).model
    assert found.m["blocks.2"] == divergence(logits_of(alone, x), logits_of(tiny, x))
    assert agreement(logits_of(tiny, x), logits_of(tiny, x)) == 1.0


def test_the_cheapest_mask_within_a_latency():
    """Against every subset."""
    names = tuple("abcdef")
    losses = dict(zip(names, (0.5, 0.1, 0.3, 0.05, 0.9, 0.2), strict=True))
    saved = dict(zip(names, (3.0, 1.0, 2.0, -1.0, 4.0, 1.5), strict=True))
    cost = CostTable({n: 5.0 for n in names}, {n: 9.0 for n in names}, {n: 5 - s for n, s in saved.items()}, 40.0, 1,
                     32, "cpu", "eager")  # fmt: skip
    found = Found(losses, ("always",), ("always", *names))
    subsets = [set(s) for n in range(7) for s in itertools.combinations(names, n)]
    for latency in (40.0, 39.5, 38.0, 35.01, 33.0, 29.0, 28.5):
        mask = cheapest(found, cost, latency)
        assert cost.predict(dslib.Mask({n: mask[n] for n in names})) <= latency + 1e-9
        fits = [s for s in subsets if 40 - sum(saved[n] for n in s) <= latency - 0.01 * (40 - latency)]
        best = min((sum(losses[n] for n in s) for s in fits), default=float("inf"))
        assert sum(losses[n] for n in mask.removed) <= best + 1e-12
        assert mask["always"]
    with pytest.raises(MaskMismatch, match="the least that can be reached is 28.50 ms"):
        cheapest(found, cost, 28.0)
    with pytest.raises(MaskMismatch, match="no measured cost for \\['z'\\]"):
        cheapest(Found({"z": 1.0}, (), ("z",)), cost, 39.0)


@pytest.mark.parametrize("measured", [[1.5], [1.0, 1.2]])
def test_a_mask_is_as_fast_as_asked_when_measured(tiny, monkeypatch, measured):
    """What falls short when measured is asked for again, with more removed."""
    names = tuple(dslib.find_sites(tiny, 32).names)
    cost = CostTable(dict.fromkeys(names, 5.0), dict.fromkeys(names, 9.0), dict.fromkeys(names, 2.0), 20.0, 4, 32,
                     "cpu", "eager")  # fmt: skip
    found = Found(dict(zip(names, (0.1, 0.3, 0.2), strict=True)), (), names)
    times = iter(measured)

    def measured_next(networks, images, *_, **__):
        ms = {"small": np.array([10 / next(times)]), "original": np.array([10.0])}
        return Timing(ms, len(images), "cpu", "eager")

    monkeypatch.setattr(planning, "measure", measured_next)
    mask, reached = for_speedup(tiny, found, cost, 1.15)
    assert mask.removed == (("blocks.0",) if len(measured) == 1 else ("blocks.0", "blocks.2"))
    assert reached[0] == pytest.approx(measured[0] if len(measured) == 1 else 1.2)
    assert reached[0] == pytest.approx(reached[1]) == pytest.approx(reached[2])
    times = iter([1.1, 1.2, 1.3])
    unreached = "without all 3 sites whose removal saves time the network is 1.30 times as fast"
    for speedup, text in ((1.0, "speedup: expected more than 1"), (1.4, unreached)):
        with pytest.raises(DslibError, match=text):
            for_speedup(tiny, found, cost, speedup)


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """`dslib calibrate` in this process, in tmp_path, for a trained Tiny; gives its output."""
    from dslib.checkpoints import save_tensors
    from dslib.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    save_tensors(tmp_path / "tiny.safetensors", dslib.load_model("conftest:Tiny").model.state_dict())

    def run(*words) -> str:
        given = ("calibrate", "--model", "conftest:Tiny", "--weights", "tiny.safetensors", "--device", "cpu")
        monkeypatch.setattr(sys, "argv", ["dslib", *given, *map(str, words)])
        main()
        return capsys.readouterr().out

    return run


def test_a_folder_of_photos_is_enough(tmp_path, command):
    from PIL import Image

    for i in range(12):
        path = tmp_path / "photos" / str(i % 3) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((40, 30), 80).convert("RGB").save(path)
    words = ("--images", "photos", "--image-size", 32, "--k", 1, "--rank-count", 8, "--out", "net.json")
    out = command(*words, "--ranking", "ranking.json", "--no-refit")
    assert "k=1 of 3" in out
    assert "agrees with the original on" in out
    model, recipe = dslib.load(tmp_path / "net.json")
    assert len(recipe.merged) == 2
    assert not dslib.unmerged(model)
    assert Found.load(tmp_path / "ranking.json").mask(1) == dslib.Mask(recipe.mask)
    (tmp_path / "photos" / "0" / "broken.png").write_bytes(b"no image")
    with pytest.raises(SystemExit):
        command(*words)
    assert "k=1 of 3" in command(*words, "--skip-corrupt")


def test_a_labelled_dataset_and_a_mask(tmp_path, command, monkeypatch):
    dslib.find_sites(Tiny(), 32).mask(["blocks.1"]).save(tmp_path / "mask.json")
    out = command("--images", "digits", "--count", 128, "--mask", "mask.json", "--out", "net.json")
    assert "accuracy" in out
    assert dslib.load(tmp_path / "net.json")[1].classes == tuple("0123456789")
    mask = dslib.Mask.load(tmp_path / "mask.json")
    monkeypatch.setattr(planning, "for_speedup", lambda *_, **__: (mask, (1.5, 1.4, 1.6)))
    out = command("--images", "digits", "--count", 64, "--speedup", 1.4, "--out", "fast.json")
    assert "1.50 times as fast as the original (quartiles 1.40 to 1.60; eager, channels_last, float32)" in out
    assert dslib.Mask(dslib.load(tmp_path / "fast.json")[1].mask) == mask
    for words in (
        ("--images", "digits"),
        ("--images", "digits", "--k", 1, "--speedup", 2),
        ("--images", tmp_path, "--k", 1),
        ("--images", "digits", "--k", 7),
    ):
        with pytest.raises(SystemExit):
            command(*words, "--out", "other.json")
    assert not (tmp_path / "other.json").exists()
