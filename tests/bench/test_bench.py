"""The benchmarks: a short run of each, and that the fuzzer finds a broken fold."""

from dataclasses import replace

import pytest
import torch
from conftest import Tiny, randomise_batchnorm

import dslib
from dslib import finetuning
from dslib.algebra import affine, interpreting, layers
from dslib.algebra import padding as hoisting
from dslib.bench.borders import record_borders
from dslib.bench.depths import record_depths
from dslib.bench.exact import record_exact
from dslib.bench.families import TIMM, TORCHVISION, frame, record_families
from dslib.bench.fuzz import LIMIT32, LIMIT64, fuzz_merge
from dslib.bench.memory import record_memory
from dslib.data.datasets import find_file
from dslib.errors import BadConfig, BadModel
from dslib.models.networks import Loaded
from dslib.records import Record


def test_random_blocks_merge():
    tally = fuzz_merge(150, seed=7, progress=False)
    assert tally.failures == ()
    assert tally.cases == tally.exact + tally.refused == 150
    assert tally.exact > 15
    assert 0 < tally.worst64 < LIMIT64
    assert 0 < tally.worst32 < LIMIT32


def no_epsilon(bn, dtype=torch.float64):
    found = layers.from_batchnorm(bn, dtype)
    wrong = (bn.running_var + bn.eps).sqrt() / bn.running_var.sqrt()
    return affine.scale(found, wrong.double())


def first_stride_only(first, second, compose=affine.compose):
    whole = compose(first, second)
    return affine.replace(whole, stride=first.stride)


def other_sign(value, sides, pad_input=affine.pad_input):
    return pad_input(value, tuple(-side for side in sides))


def other_corner(first, second, groups, step, convolve=affine._full_convolution):
    return convolve(first, second, groups, step).flip(3)


def no_mean(bn, dtype=torch.float64):
    found = layers.from_batchnorm(bn, dtype)
    return affine.shift(found, bn.running_mean.double() * found.weight.flatten())


def smaller_ring(layer, ring, padding, through=hoisting._through):
    return tuple(max(side - 1, 0) for side in through(layer, ring, padding))


MUTATIONS = {
    "epsilon": (interpreting, "from_batchnorm", no_epsilon),
    "mean": (interpreting, "from_batchnorm", no_mean),
    "stride": (affine, "compose", first_stride_only),
    "sign of padding": (affine, "pad_input", other_sign),
    "flipped taps": (affine, "_full_convolution", other_corner),
    "hoisted too little": (hoisting, "_through", smaller_ring),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_fuzzer_finds_a_broken_fold(name, monkeypatch):
    home, attribute, wrong = MUTATIONS[name]
    monkeypatch.setattr(home, attribute, wrong)
    assert fuzz_merge(12, seed=3, progress=False).failures


@pytest.mark.filterwarnings("ignore:The default weight initialization:FutureWarning")
def test_the_table_of_families(tmp_path):
    record = record_families(["torchvision/mobilenet_v3_large", "timm/repvgg_a0", "torchvision/vgg11_bn"], 64)
    table = frame(Record.load(record.save(tmp_path / "families.json")))
    assert table.loc["torchvision/mobilenet_v3_large", ["sites", "mergeable"]].tolist() == [15, 7]
    assert table.loc["torchvision/mobilenet_v3_large", "reasons"].startswith("AdaptiveAvgPool2d: is not affine")
    assert table.loc["timm/repvgg_a0", ["sites", "foldable", "batchnorms_folded"]].tolist() == [0, 22, 61]
    assert table.loc["torchvision/vgg11_bn", ["sites", "batchnorms", "batchnorms_folded"]].tolist() == [0, 8, 8]
    assert len(TORCHVISION) > 20
    assert len(TIMM) > 25


def test_borders_are_measured_in_one_run():
    values = record_borders("mobilenet_v2", 32, 1, 3).values
    assert set(values["networks"]) == {"hoisted", "bias", "ones"}
    assert values["networks"]["hoisted"]["times_hoisted"] == 1.0
    assert values["sites"] == 17
    assert min(values["merge_seconds"]) > 0


def test_every_depth_without_labels(monkeypatch, digits):
    from dslib.bench import depths

    model = Loaded(randomise_batchnorm(Tiny()), True)
    monkeypatch.setattr(depths, "load_data", lambda *_: digits)
    monkeypatch.setattr(depths, "load_model", lambda *_: model)
    record = record_depths(
        "tiny", "digits", count=64, rank_count=32, random_masks=1, options={"width": 2, "wide": True}
    )
    assert record.command.endswith("--weights default --model-option width=2 --model-option wide=true")
    values = record.values
    assert [row["k"] for row in values["depths"]] == [3, 2, 1, 0]
    assert [len(row["removed"]) for row in values["depths"]] == [0, 1, 2, 3]
    assert values["depths"][0]["agreement"] == 1.0
    assert all(0 <= row["agreement"] <= 1 and row["seconds"] > 0 for row in values["depths"][1:])
    assert all(0 < row["q25"] <= row["q75"] for row in values["depths"][1:])
    assert [row["k"] for row in values["random"]] == [1]
    assert values["val_images"] == 96
    monkeypatch.setattr(depths, "load_model", lambda *_: model._replace(trained=False))
    with pytest.raises(BadModel, match="with weights 'none' is not trained for digits"):
        record_depths("tiny", "digits", weights="none")


def test_memory_of_a_calibration():
    row = record_memory("mobilenet_v2", 32, 64, 2).values
    assert row["removed"] == ["features.16", "features.17"]
    assert row["images_gib"] == 64 * 3 * 32 * 32 * 4 / 2**30
    assert 0 < row["peak_memory_before_gib"] <= row["peak_memory_gib"] < 4


def test_ingredients_of_calibration(monkeypatch, digits):
    from dslib.bench import ingredients

    model = Loaded(randomise_batchnorm(Tiny()), True)
    monkeypatch.setattr(ingredients, "load_data", lambda *_: digits)
    monkeypatch.setattr(ingredients, "load_model", lambda *_: model)
    record = ingredients.record_ingredients(
        "tiny", "digits", count=64, rank_count=32, ks=(2, 1), counts=(16, 64), seeds=2
    )
    rows = record.values["rows"]
    found = [
        (row["mask"], row["images"], row["seed"]) for row in rows if row["ingredients"] == "+ ridge on images held back"
    ]
    assert found == [
        ("ranked k=2", 64, 0),
        ("ranked k=2", 64, 1),
        ("ranked k=1", 64, 0),
        ("ranked k=1", 64, 1),
        ("ranked k=2", 16, 0),
        ("ranked k=2", 16, 1),
    ]
    assert len(rows) == 6 + 2 * 3
    assert all(0 <= row["accuracy"] <= 1 and row["seconds"] > 0 for row in rows)
    assert "--k 2 --k 1 --images 16 --images 64 --seeds 2" in record.command


def test_speedup_and_starts(monkeypatch, digits, tmp_path):
    from dslib.bench import speedup, starts

    model = Loaded(randomise_batchnorm(Tiny()), True)
    mask = dslib.find_sites(model.model, 32).mask(["blocks.1"])
    for module in (speedup, starts):
        monkeypatch.setattr(module, "load_data", lambda *_: digits)
        monkeypatch.setattr(module, "load_model", lambda *_: model)
    monkeypatch.setattr(speedup, "for_speedup", lambda *_, **__: (dslib.Plan(mask), (2.0, 1.9, 2.1)))
    record = speedup.record_speedup("tiny", "digits", None, 1.2, ("eager", "openvino"), 4, 64, 32, rounds=3)
    rows = record.values["networks"]
    assert list(rows) == ["original", "for eager", "for openvino"]
    assert rows["for eager"]["removed"] == list(mask.removed)
    fastest = {name: min(t["latency_ms"] for t in row["timing"].values()) for name, row in rows.items()}
    for name, row in rows.items():
        assert len(row["timing"]) == 2
        assert row["speedup_best_runtimes"] == pytest.approx(fastest["original"] / fastest[name])
    assert "--runtime eager --runtime openvino" in record.command

    monkeypatch.setattr(finetuning, "check_teacher", lambda *_: None)
    given = ("tiny", "digits", None, 1, (0.04, 0.05), (0.01,), 0.04, 2, 16, 32, 32)
    record = starts.record_starts(*given, tmp_path / "starts.json")
    rows = [row for row in record.values["rows"] if not row["tuning"]]
    found = [(row["start"], row["seed"], row["minutes"]) for row in rows]
    assert found == [
        ("fading", 0, 0.04),
        ("calibrated", 0, 0.04),
        ("fading", 1, 0.04),
        ("calibrated", 1, 0.04),
        ("fading", 0, 0.05),
        ("calibrated", 0, 0.05),
    ]
    for start in starts.STARTS:
        tried = [row for row in record.values["rows"] if row["tuning"] and row["start"] == start]
        assert {(row["recipe"], row["lr"]) for row in tried} == {("usual", 0.01), ("gentle", 0.01)}
        best = max(tried, key=lambda row: row["accuracy"])
        chosen = [(row["recipe"], row["lr"]) for row in rows if row["start"] == start]
        assert set(chosen) == {(best["recipe"], best["lr"])}
    assert all(row["seconds"] > row["seconds_to_calibrate"] > 0 for row in rows)
    with pytest.raises(BadConfig, match="were gone before the first step"):
        starts.record_starts("tiny", "digits", None, 1, (1e-6,), (0.01,), 0.005, 1, 16, 32, 32)
    monkeypatch.setattr(starts, "finetune", None)  # all rows stand
    again = starts.record_starts(*given, tmp_path / "starts.json")
    assert again.values["rows"] == record.values["rows"]


def test_rows_stand_once_they_are_measured(tmp_path):
    from dslib.bench.rows import Rows
    from dslib.errors import DslibError

    path, made = tmp_path / "x.json", []

    def measure(i):
        made.append(i)
        if i == 2 and len(made) == 2:
            raise DslibError("not today")
        return {"ms": i}

    blank = Record("x", "dslib bench x", {"sizes": (1, 2)}, {"n": 3}, {"device": "cpu"}, "abc")
    rows = Rows(blank, path)
    for i in (1, 2):
        rows.add({"i": i, "at": (i,)}, lambda i=i: measure(i), keep_errors=True)
    assert Record.load(path).values == {
        "n": 3,
        "rows": [{"i": 1, "at": [1], "ms": 1, "commit": "abc"}, {"i": 2, "at": [2], "error": "not today"}],
    }
    again = Rows(replace(blank, commit="def"), path)
    for i in (1, 2):
        again.add({"i": i, "at": (i,)}, lambda i=i: measure(i))
    assert made == [1, 2, 2]
    assert [row["ms"] for row in Record.load(path).values["rows"]] == [1, 2]
    assert Record.load(path).commit == "abc, def"
    assert [row["commit"] for row in Record.load(path).values["rows"]] == ["abc", "def"]
    with pytest.raises(DslibError, match="not today"):
        made[:] = [0]
        again.add({"i": 3}, lambda: measure(2))
    path.unlink()
    noted = [{"busy": True, "ms": 1}, {"busy": False, "ms": 2}, {"busy": False, "ms": 3}]
    for idle, ms in ((False, 1), (False, 1), (True, 2), (True, 2)):
        assert Rows(blank, path, idle).add({"i": 1}, lambda: noted.pop(0))["ms"] == ms
    assert [row["ms"] for row in Record.load(path).values["rows"]] == [2]
    for other in ({"config": {"sizes": (1, 3)}}, {"values": {"n": 4}}, {"machine": {"device": "cuda"}}, {"name": "y"}):
        with pytest.raises(BadConfig, match="other settings or of another machine"):
            Rows(replace(blank, **other), path)


@pytest.mark.skipif(find_file("weights/mobilenet_v2.safetensors") is None, reason="needs DSLIB_DATA with weights")
def test_exact_borders_on_real_photos(monkeypatch):
    """One batch of the real benchmark, which the record was made with."""

    from dslib.bench import exact

    load = exact.load_data
    monkeypatch.setattr(exact, "load_data", lambda *a: replace(load(*a), val=load(*a).val.first(64)))
    values = record_exact("mobilenet_v2", "imagenette", 75).values
    assert values["images"] == 64
    for network in values["networks"].values():
        assert network["largest_relative_difference"] < 1e-4
        assert network["other_top1"] == 0


def test_networks_are_made_once_and_what_is_told_is_of_the_files(monkeypatch, digits, tmp_path):
    from conftest import wide

    from dslib.bench import networks
    from dslib.models.networks import Loaded

    torch.manual_seed(0)
    trained = wide()
    monkeypatch.setattr(networks, "load_data", lambda *_: digits)
    monkeypatch.setattr(networks, "load_model", lambda *_: Loaded(trained, True))
    asked = []

    def for_speedup(model, found, cost, speedup, runtime):
        asked.append((speedup, runtime, cost.runtime, cost.batch_size))
        (name, *_) = found.dropped
        return dslib.Plan(dslib.Mask({site: site != name for site in found.sites}), dropped=[name]), (1.5, 1.4, 1.6)

    monkeypatch.setattr(networks, "for_speedup", for_speedup)
    given = {
        "model": "conftest:wide",
        "data": "digits",
        "image_size": 16,
        "ks": (1, 2),
        "count": 64,
        "rank_count": 32,
        "runtimes": ("eager",),
        "planned_on": "nchw",
        "echo": lambda _: None,
    }
    record = networks.record_networks(tmp_path, **given)
    rows = {row["network"]: row for row in record.values["rows"]}
    assert {name: len(row["removed"]) for name, row in rows.items()} == {"original": 0, "k1": 2, "k2": 1, "x1.5": 1}
    assert rows["x1.5"]["dropped"] == rows["x1.5"]["removed"]
    assert rows["x1.5"]["parameters"] < rows["k2"]["parameters"]
    assert asked == [(1.5, "nchw", "nchw (eager, contiguous), float32", 1)]
    assert [row["network"] for row in record.values["timings"]] == ["original", "k1", "k2", "x1.5", networks.DENSE]
    stored, _ = dslib.load(tmp_path / "original", "conftest:wide")
    assert torch.equal(stored.state_dict()["0.0.weight"], trained.state_dict()["0.0.weight"].half().float())
    assert rows["original"]["accuracy"] == dslib.evaluate(stored, digits.val)
    monkeypatch.setattr(networks, "calibrate", None)  # all stand
    again = networks.record_networks(tmp_path, **given).values["rows"]
    assert again == record.values["rows"]
    with pytest.raises(BadConfig, match="original.json is of conftest:wide at 16 px: give another folder"):
        networks.record_networks(tmp_path, **{**given, "image_size": 32})
    with pytest.raises(BadConfig, match=r"speedups: expected more than 1, found \(1.5, 1.0\)"):
        networks.record_networks(tmp_path, **given, speedups=(1.5, 1.0))
    with pytest.raises(BadModel, match="is not trained for the classes of digits"):
        monkeypatch.setattr(networks, "load_model", lambda *_: Loaded(trained, False))
        networks.record_networks(tmp_path, **given)
