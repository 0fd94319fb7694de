"""What a site matters, with labels and without."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from conftest import photos
from torch import nn

import dslib
from dslib.algebra.padding import InteriorBatchNorm2d
from dslib.calibrating import Calibrate, calibrate, logits_of
from dslib.errors import BadConfig
from dslib.ranking import Importance, Importances, agreement, divergence, importance, rank
from dslib.training.evaluating import batchnorm_drift, recalibrate_batchnorm


def test_ranking_gives_a_mask_for_every_k(tiny):
    x = photos(24)
    sites = dslib.find_sites(tiny, 32)
    found = rank(tiny, sites, x, progress=False)
    assert all(value > 0 for value in found.scores.values())
    assert [found.mask(k).k for k in range(4)] == [0, 1, 2, 3]
    for name in sites.names:  # kept blocks behind the first one are refitted
        alone = calibrate(tiny, sites.mask(set(sites.names) - {name}), x, Calibrate()).model
        assert found.scores[name] == divergence(logits_of(alone, x), logits_of(tiny, x))
    assert agreement(logits_of(tiny, x), logits_of(tiny, x)) == 1.0
    flags = [module.training for module in tiny.train().modules()]
    assert torch.equal(logits_of(tiny, x), logits_of(copy.deepcopy(tiny).eval(), x))
    assert [module.training for module in tiny.modules()] == flags


def test_the_divergence_may_be_of_other_images(tiny):
    x, other = photos(40).split([24, 16])
    sites = dslib.find_sites(tiny, 32)
    found = rank(tiny, sites, x, progress=False, held=other)
    alone = calibrate(tiny, sites.mask(set(sites.names) - {"blocks.1"}), x, Calibrate()).model
    assert found.scores["blocks.1"] == divergence(logits_of(alone, other), logits_of(tiny, other))


def test_ranking_of_runs(tiny):
    x = photos(24)
    sites = dslib.find_sites(tiny, 32)
    found = rank(tiny, sites, x, progress=False, longest=3)
    assert list(found.runs) == ["blocks.0+blocks.1", "blocks.1+blocks.2", "blocks.0+blocks.1+blocks.2"]
    plan = dslib.Plan(sites.mask(["blocks.0"]), [("blocks.1", "blocks.2")])
    small = calibrate(tiny, plan, x, Calibrate()).model
    assert found.runs["blocks.1+blocks.2"] == divergence(logits_of(small, x), logits_of(tiny, x))


@pytest.mark.parametrize("labels", [True, False])
def test_dropped_blocks_are_ranked_as_well(tiny, digits, labels):
    model = tiny.float()
    sites = dslib.find_sites(model, 16)
    half = digits.train.first(128)
    x, y = next(half.batches(128))
    plan = dslib.Plan(sites.mask(["blocks.1", "blocks.2"]), dropped=["blocks.0"])
    small = calibrate(model, plan, x[:64], Calibrate(), progress=False).model
    if labels:
        config = Importance(count=64, drop=True, calibrate=Calibrate())
        found = importance(model, digits, sites, config, progress=False)
        with torch.no_grad():
            losses = [nn.functional.cross_entropy(network(x[64:]), y[64:]).item() for network in (small, model)]
        expected = losses[0] - losses[1]
    else:
        found = rank(model, sites, x[:64], progress=False, drop=True)
        expected = divergence(logits_of(small, x[:64]), logits_of(model, x[:64]))
    assert list(found.dropped) == ["blocks.0", "blocks.2"]  # the other one has a stride
    assert found.dropped["blocks.0"] == pytest.approx(expected, abs=1e-5)
    assert Importances.of(json.loads(json.dumps(found.as_json()))) == found


def test_importance_is_the_rise_of_the_loss_with_fresh_statistics(tiny, digits):
    model = tiny.float()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sites = dslib.find_sites(model, 16)
    config = Importance(count=64, longest=2)
    found = importance(model, digits, sites, config, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert set(found.scores) == set(sites.names)
    assert set(found.runs) == {"blocks.0+blocks.1", "blocks.1+blocks.2"}
    part = digits.train.first(128)
    x, y = next(part.batches(128))
    small = dslib.shrink(model, sites.mask(["blocks.0", "blocks.2"]), image_size=16)
    same = copy.deepcopy(model)
    for network in (small, same):
        recalibrate_batchnorm(network, [x[:64]])
    with torch.no_grad():
        losses = [nn.functional.cross_entropy(network(x[64:]), y[64:]) for network in (small, same)]
    assert found.scores["blocks.1"] == pytest.approx((losses[0] - losses[1]).item(), abs=1e-5)
    assert found.unit == "nats of cross-entropy"
    assert found.network == dslib.profile(model, sites, 2, rounds=1).network
    uneven = importance(model, digits, sites, replace(config, count=65), progress=False)  # no batch of one
    assert uneven.scores != found.scores
    assert importance(model, digits, sites, config, progress=False) == found
    config = replace(config, longest=1, finetune=dslib.Finetune(epochs=1, lr=0.1, batch_size=32, alpha=0.0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dslib.finetuning.check_teacher", lambda *_: None)
        tuned = importance(model, digits, sites, config, progress=False)
    assert tuned.scores != found.scores
    assert tuned.runs == {}
    removed = calibrate(model, sites.mask(["blocks.0", "blocks.2"]), x[:64], Calibrate(), progress=False).model
    fitted = importance(model, digits, sites, Importance(count=64, calibrate=Calibrate()), progress=False)
    with torch.no_grad():
        losses = [nn.functional.cross_entropy(network(x[64:]), y[64:]).item() for network in (removed, model)]
    assert fitted.base_loss == pytest.approx(losses[1], abs=1e-5)
    assert fitted.scores["blocks.1"] == pytest.approx(losses[0] - losses[1], abs=1e-5)
    with pytest.raises(BadConfig, match="longest: expected 1 or more"):
        Importance(longest=0)


def test_batchnorms_get_the_statistics_of_the_batches(tiny):
    images = torch.randn(8, 4, 6, 6, dtype=torch.float64) * 3 + 1
    norm = nn.Sequential(nn.BatchNorm2d(4, momentum=0.3), nn.Dropout()).double()
    recalibrate_batchnorm(norm, [images[:4], images[4:]])
    torch.testing.assert_close(norm[0].running_mean, images.mean((0, 2, 3)))
    variances = torch.stack([part.var((0, 2, 3)) for part in images.split(4)]).mean(0)
    torch.testing.assert_close(norm[0].running_var, variances)
    assert norm[0].momentum == 0.3
    assert not any(module.training for module in norm.modules())


def test_drift_is_how_far_inputs_are_from_what_is_stored():
    images = torch.randn(16, 3, 8, 8)
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3)).train()
    recalibrate_batchnorm(model, [images])
    model.train()
    still = batchnorm_drift(model, images)
    assert list(still.index) == ["0", "1"]
    assert still["mean"].abs().max() < 1e-3
    assert still["spread"].sub(1).abs().max() < 1e-2
    moved = batchnorm_drift(model, 4 * images + 2 * model[0].running_var.sqrt().reshape(1, 3, 1, 1))
    centre = model[0].running_mean / model[0].running_var.sqrt()
    torch.testing.assert_close(moved["mean"]["0"], (2 + 3 * centre).abs().median().item(), atol=1e-3, rtol=0)
    assert moved["spread"].tolist() == pytest.approx([4, 4], rel=1e-2)
    assert model.training
    assert not model[0]._forward_pre_hooks


def test_hoisted_padding_is_no_drift():
    norm = InteriorBatchNorm2d(3)
    norm.ring = (1, 2, 1, 1)  # left, right, top, bottom
    images = nn.functional.pad(torch.randn(32, 3, 8, 8), norm.ring, value=50.0)
    recalibrate_batchnorm(nn.Sequential(norm), [images])
    drift = batchnorm_drift(nn.Sequential(norm, nn.Conv2d(3, 3, 1)), images)
    assert drift["mean"].max() < 1e-3
    assert drift["spread"].sub(1).abs().max() < 1e-2


def test_an_interrupted_importance_goes_on(tiny, digits, tmp_path, monkeypatch):
    model, partial = tiny.float(), tmp_path / "x.partial.json"
    sites, calls = dslib.find_sites(model, 16), []
    config = Importance(count=64)
    whole = importance(model, digits, sites, config, progress=False)
    loss_on = dslib.ranking.loss_on

    def counted(*given):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return loss_on(*given)

    monkeypatch.setattr(dslib.ranking, "loss_on", counted)
    with pytest.raises(KeyboardInterrupt):
        importance(model, digits, sites, config, progress=False, partial=partial)
    assert importance(model, digits, sites, config, progress=False, partial=partial) == whole
    assert len(calls) == 5  # the third one twice
    importance(model, digits, sites, replace(config, seed=1), progress=False, partial=partial)
    assert len(calls) == 9  # other settings: nothing of the file is taken
    model.blocks[0].bn1.running_var.mul_(4.0)  # nor of other statistics of the same weights
    importance(model, digits, sites, replace(config, seed=1), progress=False, partial=partial)
    assert len(calls) == 13
