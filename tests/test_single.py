"""Activations outside all blocks as sites: the stem's and the head's."""

import pytest
import torch
from conftest import photos
from torch import nn

import dslib
from dslib.calibrating import calibrate
from dslib.errors import BadConfig, MaskMismatch
from dslib.ranking import rank
from dslib.searching import add_gates
from dslib.shrinking import possible_runs


@pytest.fixture
def sites(tiny):
    return dslib.find_sites(tiny, 32, single=True)


def test_they_are_found_on_request_in_the_networks_order(tiny, sites):
    assert sites.names == ("stem.2", "blocks.0", "blocks.1", "blocks.2")
    assert sites.always_kept == ()
    assert sites[0].convolutions == 0
    assert sites[0].input_shape == (4, 16, 16)
    tiny.head = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), tiny.head).double()  # whose ReLU sees no map
    assert dslib.find_sites(tiny, 32, single=True).names == sites.names


def test_one_that_two_places_share_is_kept(tiny):
    tiny.again = tiny.stem[2]
    site = dslib.find_sites(tiny, 32, single=True)[0]
    assert not site.mergeable
    assert "again" in site.reason


def test_without_it_the_stem_is_linear_and_nothing_else_changes(tiny, sites):
    x = photos(2)
    small = dslib.shrink(tiny, sites.mask(sites.names[1:]), image_size=32)
    assert isinstance(small.stem[2], nn.Identity)
    assert isinstance(tiny.stem[2], nn.ReLU)
    expected = tiny.head(tiny.blocks(tiny.stem[:2](x)).mean((2, 3)))
    torch.testing.assert_close(small(x), expected)
    merged = dslib.merge(dslib.shrink(tiny, sites.mask(["blocks.0"]), image_size=32))
    assert not dslib.unmerged(merged)
    with pytest.raises(MaskMismatch, match="not sites here: stem.1"):
        dslib.shrink(tiny, dslib.Mask({"stem.1": False, **dict.fromkeys(sites.names[1:], True)}))


def test_it_fades_and_settles(tiny, sites):
    x = photos(2)
    faded = dslib.fade(tiny, sites.mask(sites.names[1:]))
    torch.testing.assert_close(faded(x), tiny(x))
    dslib.shrinking.set_fade(faded, 1.0)
    settled = dslib.shrinking.settle(faded)
    assert isinstance(settled.stem[2], nn.Identity)
    torch.testing.assert_close(settled(x), faded(x))


def test_it_has_a_gate(tiny, sites):
    x = photos(2)
    gated, gates = add_gates(tiny, sites)
    assert gates.names[0] == "stem.2"
    torch.testing.assert_close(gated(x), tiny(x))
    gates.m.data[0] = 0
    gates.keep(3)
    small = dslib.shrink(tiny, sites.mask(sites.names[1:]), image_size=32)
    torch.testing.assert_close(gated(x), small(x))
    gated(x).square().sum().backward()
    assert bool(gates.m.grad.ne(0).all())


def test_it_is_profiled_ranked_and_calibrated(tiny, sites):
    x = photos(48)
    table = dslib.profile(tiny, sites, 2, rounds=2)
    assert table.linear["stem.2"] == table.merged["stem.2"] == 0
    assert table.kept["stem.2"] >= 0
    assert "stem.2" in sites.mask([]).removed
    assert "stem.2" not in table.worth_merging(sites.mask([]))  # nothing of it is merged
    found = rank(tiny, sites, x, progress=False, longest=2)
    assert set(found.scores) == set(sites.names)
    assert all("stem" not in run for run in found.runs)
    done = calibrate(tiny, found.mask(1), x)
    assert set(done.errors) == set(found.mask(1).removed) - {"stem.2"}
    alone = calibrate(tiny, sites.mask(sites.names[1:]), x)
    assert alone.errors == {}
    with torch.no_grad():
        torch.testing.assert_close(alone.model(x), dslib.shrink(tiny, sites.mask(sites.names[1:]), image_size=32)(x))


def test_a_recipe_rebuilds_it(tiny, sites, tmp_path):
    x = photos(2).float()
    small = dslib.shrink(tiny.float(), sites.mask(["blocks.0"]), image_size=32).eval()
    recipe = dslib.Recipe("conftest:Tiny", tuple("0123456789"), 32, mask=dict(sites.mask(["blocks.0"])))
    dslib.save(tmp_path / "small.json", small, recipe)
    found = dslib.load(tmp_path / "small.json", "conftest:Tiny")[0].eval()
    assert isinstance(found.stem[2], nn.Identity)
    with torch.no_grad():
        torch.testing.assert_close(found(x), small(x))


def test_a_single_activation_is_no_part_of_a_run(tiny, sites):
    plan = dslib.Plan(sites.mask(sites.names[2:]), [sites.names[:2]])
    with pytest.raises(BadConfig, match=r"a run is of blocks: stem\.2 is an activation by itself"):
        dslib.shrink(tiny, plan, image_size=32)
    assert [run for run, _ in possible_runs(tiny, sites, 2)] == [("blocks.0", "blocks.1"), ("blocks.1", "blocks.2")]
