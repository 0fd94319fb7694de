"""The label-free way in one call: it does what its parts do, and says what it did."""

from dataclasses import replace

import pytest
import torch
from conftest import same

import dslib
from dslib import compressing
from dslib.calibrating import Calibrate, calibrate
from dslib.errors import BadConfig, BadData, MaskMismatch
from dslib.ranking import Importances, rank

CONFIG = Calibrate(ridges=1, refit=False)


@pytest.fixture
def model(tiny):
    return tiny.float()


@pytest.fixture
def images():
    return torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_k_sites_are_kept_as_by_hand(model, images, digits, tmp_path):
    before, told = {key: value.clone() for key, value in model.state_dict().items()}, []
    model.train()
    done = dslib.compress(model, images, k=1, rank_count=32, config=CONFIG, echo=told.append)
    assert model.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    found = rank(model.eval(), dslib.find_sites(model, 16), images[:32], CONFIG, progress=False)
    assert done.importances == found
    assert done.plan == dslib.Plan(found.mask(1))
    by_hand = calibrate(model, done.plan, images, CONFIG, progress=False)
    assert same(done.model, by_hand.model)
    assert done.errors == by_hand.errors
    assert done.costs is done.speedup is None
    assert told == ["ranking 3 sites on 32 photos, 4 calibrations", "calibrating on 64 photos"]
    recipe = done.recipe(dslib.Recipe("conftest:Tiny", tuple("0123456789"), 16))
    dslib.save(tmp_path / "net", done.model, recipe)
    assert same(dslib.load(tmp_path / "net", "conftest:Tiny")[0], done.model)
    by_split = dslib.compress(model, digits.train, k=1, ranking=done.importances, config=CONFIG)
    assert by_split.plan == done.plan


def test_a_speedup_is_planned_with_costs_measured_or_given(model, images, monkeypatch):
    asked = []

    def planned(network, found, costs, speedup, **where):
        asked.append((found, costs, speedup, where))
        return dslib.Plan(found.mask(1), dropped=found.dropped and found.mask(1).removed[:1]), (1.5, 1.4, 1.6)

    monkeypatch.setattr(compressing, "for_speedup", planned)
    told = []
    words = {"runtime": "nchw", "precision": "bfloat16", "config": CONFIG}
    done = dslib.compress(model, images, speedup=1.3, drop=True, batch_size=2, echo=told.append, **words)
    found, costs, speedup, where = asked[0]
    assert (speedup, where) == (1.3, {"runtime": "nchw", "precision": "bfloat16"})
    assert (done.costs, done.speedup, done.plan.dropped) == (costs, (1.5, 1.4, 1.6), done.plan.mask.removed[:1])
    assert costs.batch_size == 2
    assert "nchw" in costs.runtime and "bfloat16" in costs.runtime
    assert list(found.dropped) == ["blocks.0", "blocks.2"]
    assert told[1] == "measuring 3 sites on nchw"
    assert told[2].startswith("1.50 times as fast as the original (quartiles 1.40 to 1.60; nchw")
    monkeypatch.setattr(compressing, "profile", None)
    monkeypatch.setattr(compressing, "rank", None)
    again = dslib.compress(model, images, speedup=1.3, ranking=found, costs=costs, **words)
    assert asked[1][0].dropped == {}  # nothing may go whole
    assert again.plan.dropped == ()


def test_a_speedup_is_reached_as_measured(model, images):
    done = dslib.compress(model, images, speedup=1.01, drop=True, batch_size=1, config=CONFIG)
    assert done.speedup[0] >= 1.01
    assert done.speedup[1] <= done.speedup[0] <= done.speedup[2]
    assert done.plan.mask.removed


def test_a_plan_or_a_mask_needs_no_ranking(model, images, monkeypatch):
    monkeypatch.setattr(compressing, "rank", None)
    mask = dslib.find_sites(model, 16).mask(["blocks.1"])
    done = dslib.compress(model, images, plan=dslib.Plan(mask, dropped=["blocks.2"]), config=CONFIG)
    assert done.importances is done.costs is done.speedup is None
    assert set(done.errors) == {"blocks.0"}
    assert dslib.compress(model, images, plan=mask, config=CONFIG).plan == dslib.Plan(mask)


def test_a_ranking_is_written_once_and_checked(model, images, tmp_path, monkeypatch):
    file, told = tmp_path / "ranking.json", []

    def compress(ranking=file, **given):
        return dslib.compress(model, images, ranking=ranking, config=CONFIG, echo=told.append, **given)

    found = compress(k=1).importances
    assert Importances.load(file) == found
    assert compress(k=2).importances == found
    assert f"ranking: taken from {file}" in told
    with pytest.raises(MaskMismatch, match=r"ranking\.json says nothing of whole blocks: remove it, to rank anew"):
        compress(speedup=1.1, drop=True)
    with pytest.raises(MaskMismatch, match="the ranking only orders the sites, and a speed-up adds importances"):
        compress(replace(found, unit=""), speedup=1.1)
    with pytest.raises(MaskMismatch, match="the ranking is of another network: rank this one"):
        compress(replace(found, network="another"), k=1)
    monkeypatch.setattr(compressing, "droppable", lambda *_: ())  # then there is nothing to be said
    monkeypatch.setattr(compressing, "for_speedup", lambda *_, **__: (dslib.Plan(found.mask(1)), (1.5, 1.4, 1.6)))
    assert compress(speedup=1.1, drop=True, batch_size=1).plan == dslib.Plan(found.mask(1))


@pytest.mark.parametrize(
    ("words", "error", "text"),
    [
        ({}, BadConfig, "expected one of k, speedup and plan"),
        ({"k": 1, "speedup": 2}, BadConfig, "expected one of k, speedup and plan"),
        ({"speedup": 1.0}, BadConfig, r"speedup: expected more than 1, found 1\.0"),
        ({"speedup": float("nan")}, BadConfig, "speedup: expected more than 1, found nan"),
        ({"k": 1, "drop": True}, BadConfig, "drop is for speedup"),
        ({"k": 1, "rank_count": 0}, BadConfig, "rank_count: expected 1 or more, found 0"),
        ({"k": 4}, MaskMismatch, "expected 0 to 3 for this network, found 4"),
        ({"k": 1, "runtime": "fast"}, BadConfig, "runtime: expected one of .*, found 'fast'"),
        ({"speedup": 2, "precision": "int1"}, BadConfig, "precision: expected one of .*, found 'int1'"),
        ({"k": 1, "images": torch.zeros(2, 1, 16, 16)}, BadData, r"expected normalised floats of shape \(N, 3, S, S\)"),
        ({"k": 1, "images": torch.zeros(0, 3, 16, 16)}, BadData, "images: expected one or more, found none"),
    ],
)
def test_what_cannot_be_is_refused_before_the_work(model, images, monkeypatch, words, error, text):
    monkeypatch.setattr(compressing, "rank", None)
    with pytest.raises(error, match=text):
        dslib.compress(model, **{"images": images, **words})
