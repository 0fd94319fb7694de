"""Rivals of the search: each gives a mask for every k, and is what its name says."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from conftest import Tiny

import dslib
from dslib.baselines.choosing import CHOICES, Slope, evenly_spaced, keep_cheapest, paper_masks, train_slopes, within
from dslib.errors import MaskMismatch
from dslib.profiling import CostTable
from dslib.ranking import Importances
from dslib.searching import add_gates
from dslib.sites import Sites
from dslib.training.settings import Train

NAMES = ("blocks.0", "blocks.1", "blocks.2")
COST = CostTable(
    *(dict(zip(NAMES, ms, strict=True)) for ms in ([5.0] * 3, [9.0] * 3, [4.0, 1.0, 3.0])), 20.0, 1, 16, "cpu", "eager"
)


@pytest.mark.parametrize("name", [name for name in CHOICES if name != "the paper's masks"])
def test_each_rival_gives_a_mask_for_every_k(name, tiny, digits):
    model = tiny.float()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    sites = dslib.find_sites(model, 16)
    found = [CHOICES[name](model, digits, sites, COST, seed) for seed in (0, 0, 1)]
    assert found[0] == found[1]
    assert [mask.k for mask in found[0]] == [3, 2, 1, 0]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    if name in ("random", "evenly spaced"):
        assert found[0] != found[2]


def test_the_costliest_go_first():
    found = keep_cheapest(Tiny(), None, dslib.find_sites(Tiny(), 16), COST)
    assert [mask.removed for mask in found[1:3]] == [("blocks.1",), ("blocks.1", "blocks.2")]


@pytest.mark.parametrize("rival", [CHOICES["keep the cheapest"], CHOICES["evenly spaced"], CHOICES["learned slopes"]])
def test_what_rivals_cannot_do_is_said(rival, tiny, digits):
    none = Sites([], [], 16)
    with pytest.raises(MaskMismatch, match="no mergeable site"):
        rival(tiny, digits, none, COST, 0)
    other = CostTable({"a": 1.0}, {"a": 1.0}, {"a": 1.0}, 2.0, 1, 16, "cpu", "eager")
    if rival is keep_cheapest:
        with pytest.raises(MaskMismatch, match="no measured cost for"):
            rival(tiny, digits, dslib.find_sites(tiny, 16), other, 0)


@pytest.fixture(scope="module")
def seventeen():
    """The sites of a narrow MobileNetV2."""
    return dslib.find_sites(dslib.load_model("mobilenet_v2", options={"width_mult": 0.25}).model, 32)


def test_the_papers_masks_are_for_mobilenet_v2(tiny, seventeen):
    found = paper_masks(None, None, seventeen, COST)
    assert [mask.k for mask in found] == [11, 8, 8, 6, 6, 0]
    assert found[3].kept == tuple(f"features.{i}" for i in (4, 5, 14, 15, 16, 17))
    with pytest.raises(MaskMismatch, match="17 sites, found 3"):
        paper_masks(tiny, None, dslib.find_sites(tiny.float(), 16), COST)


def test_even_spacing(seventeen):
    found = evenly_spaced(None, None, seventeen, COST)
    names = tuple(found[0])
    for k in range(1, 18):
        places = [names.index(name) for name in found[17 - k].kept]
        assert len(places) == k
        gaps = [b - a for a, b in pairwise(places)]
        assert max(gaps, default=1) - min(gaps, default=1) <= 1
        assert abs(places[0] - (16 - places[-1])) <= 1


def test_slopes_blend_and_are_pushed_to_the_identity(tiny, digits):
    model = tiny.float()
    sites = dslib.find_sites(model, 16)
    sloped, gates = add_gates(model, sites, Slope)
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(sloped(x), model(x))
    gates.m.data.zero_()
    linear = add_gates(model, sites)
    linear[1].keep(0)
    torch.testing.assert_close(sloped(x), linear[0](x))
    config = Train(epochs=2, lr=0.1, batch_size=32)
    (free, _), (pushed, trained) = (train_slopes(model, digits, sites, config, weight) for weight in (0.0, 100.0))
    assert sum(pushed.values()) < sum(free.values())
    assert trained.state_dict().keys() == model.state_dict().keys()
    assert not torch.equal(trained.head.weight, model.head.weight)


def test_slopes_move_at_the_defaults(tiny, digits):
    sites = dslib.find_sites(tiny, 16)
    left, _ = train_slopes(tiny.float(), digits, sites, Train(epochs=2, lr=0.04, batch_size=64))
    assert len(set(left.values())) == len(sites)  # no ties
    assert max(abs(1 - one) for one in left.values()) > 0.02


def test_the_first_mask_within_a_budget():
    masks = [
        Importances({"blocks.0": 1.0, "blocks.1": 3.0, "blocks.2": 2.0}, (), tuple(COST.kept)).mask(k)
        for k in (3, 2, 1, 0)
    ]
    assert within(masks, COST, 20.0).k == 3
    assert within(masks, COST, 17.0).k == 1
    costly = replace(COST, merged={**COST.merged, "blocks.2": 6.0})
    assert within(masks, costly, 17.0).removed == ("blocks.0", "blocks.1")  # blocks.2 would only cost time
    with pytest.raises(MaskMismatch, match="the quickest of these masks takes 13.00 ms per batch, found 5"):
        within(masks, COST, 5.0)
