"""Benchmarks of merging: random blocks, families, borders; and that the fuzzer finds a broken fold."""

from dataclasses import replace

import pytest
import torch
from benches import run
from conftest import Tiny

from dslib.algebra import affine, interpreting, layers
from dslib.algebra import padding as hoisting
from dslib.bench import benchmark, frame, fuzz_merge, merge
from dslib.bench.families import FAMILIES
from dslib.bench.merge import LIMIT32, LIMIT64
from dslib.data import find_file
from dslib.errors import DslibError
from dslib.records import Record


def test_random_blocks_merge():
    tally = fuzz_merge(150, seed=7, progress=False)
    assert tally.failures == ()
    assert tally.cases == tally.exact + tally.refused == 150
    assert tally.exact > 6
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


def smaller_ring(*given, required=hoisting._required_of_input):
    return tuple(max(side - 1, 0) for side in required(*given))


MUTATIONS = {
    "epsilon": (interpreting, "from_batchnorm", no_epsilon),
    "mean": (interpreting, "from_batchnorm", no_mean),
    "stride": (affine, "compose", first_stride_only),
    "sign of padding": (affine, "pad_input", other_sign),
    "flipped taps": (affine, "_full_convolution", other_corner),
    "hoisted too little": (hoisting, "_required_of_input", smaller_ring),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_fuzzer_finds_a_broken_fold(name, monkeypatch):
    home, attribute, wrong = MUTATIONS[name]
    monkeypatch.setattr(home, attribute, wrong)
    assert fuzz_merge(12, seed=3, progress=False).failures


def test_a_wrong_merge_is_recorded_and_an_error(monkeypatch, tmp_path):
    tally = merge.Tally(2, ("case 1: relative error 1.0e+00",))
    monkeypatch.setattr(merge, "fuzz_merge", lambda *_: tally)
    with pytest.raises(DslibError, match="1 of 2 blocks were merged wrongly: please report them"):
        run("merge", tmp_path / "m.json", cases=2)
    assert Record.load(tmp_path / "m.json").values["failed"] == list(tally.failures)


@pytest.mark.filterwarnings("ignore:The default weight initialization:FutureWarning")
def test_the_table_of_families(tmp_path):
    names = ("torchvision/mobilenet_v3_large", "timm/repvgg_a0", "torchvision/vgg11_bn")
    record, told = run("families", tmp_path / "families.json", names=names, image_size=64)
    table = frame(Record.load(tmp_path / "families.json"))
    assert told == [f"written: {tmp_path / 'families.json'}", table.to_string()]
    assert table.loc[names[0], ["sites", "mergeable"]].tolist() == [15, 7]
    assert table.loc[names[0], "reasons"].startswith("AdaptiveAvgPool2d: is not affine")
    assert table.loc[names[1], ["sites", "foldable", "batchnorms_folded"]].tolist() == [0, 22, 61]
    assert table.loc[names[2], ["sites", "batchnorms", "batchnorms_folded"]].tolist() == [0, 8, 8]
    assert len(FAMILIES) > 45
    assert record.command.endswith("--image-size 64")


def test_borders_are_measured_in_one_run():
    record, told = run("borders", model="conftest:Tiny", image_size=32, batch_size=1, rounds=3)
    values = record.values
    assert record.config["seed"] == 0
    assert set(values["networks"]) == {"hoisted", "bias", "ones"}
    assert values["networks"]["hoisted"]["times_hoisted"] == 1.0
    assert values["sites"] == len(Tiny().blocks)
    assert min(values["merge_seconds"]) > 0
    assert len(told) == 4


@pytest.mark.skipif(find_file("weights/mobilenet_v2.safetensors") is None, reason="needs DSLIB_DATA with weights")
def test_exact_borders_on_real_photos(monkeypatch):
    """One batch of the real benchmark, which the record was made with."""
    load = benchmark.load_data
    monkeypatch.setattr(benchmark, "load_data", lambda *a: replace(data := load(*a), val=data.val.first(32)))
    values = run("exact", image_size=75)[0].values
    assert values["images"] == 32
    for network in values["networks"].values():
        assert network["largest_relative_difference"] < 1e-4
        assert network["other_top1"] == 0
