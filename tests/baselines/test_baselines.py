"""Rivals: each meets its budget, ends trained, and says what it did; equal time; widths of a slim network are exact."""

import copy
import json
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import randomise_batchnorm, wide
from torch import nn

import dslib
from dslib import shrinking
from dslib.algebra.blocks import droppable
from dslib.baselines import (
    METHODS,
    PAPER_KEPT,
    Budget,
    Effort,
    Pruned,
    Trial,
    blocks,
    channels,
    depth,
    evolution,
    rebuilt,
    tuning,
)
from dslib.baselines import budget as budget_module
from dslib.baselines.budget import least
from dslib.baselines.coupling import coupled, cut
from dslib.baselines.tuning import Clock
from dslib.errors import BadConfig, BadModel
from dslib.profiling import CostTable
from dslib.sites import find_sites
from dslib.training.loop import cross_entropy, train
from dslib.training.settings import Train

FULL = {"width_mult": 0.35}


@pytest.fixture
def network():
    """A narrow MobileNetV2 with random statistics."""
    return randomise_batchnorm(dslib.load_model("mobilenet_v2", list("0123456789"), options=FULL).model).eval()


@pytest.fixture
def by_work(monkeypatch):
    """Latencies as multiply-accumulates and layers say: the same on every machine, however busy."""

    def cost(network, size):
        convolutions = sum(isinstance(module, nn.Conv2d) for module in network.modules())
        return dslib.count_macs(network, (3, size, size)) / 1e4 + 6 * convolutions

    def reached(self, original, network):
        return cost(original, self.image_size) / cost(network, self.image_size)

    monkeypatch.setattr(Budget, "reached", reached)


@pytest.fixture
def steady(monkeypatch):
    """A clock that every part of the work moves by a tenth of a second, and images that take a hundredth each."""

    @contextmanager
    def part(self, name):
        yield
        self.spent[name] = self.spent.get(name, 0.0) + 0.1

    monkeypatch.setattr(tuning.Clock, "part", part)
    for module in (tuning, depth):
        monkeypatch.setattr(module, "per_image", lambda *_: 0.01)
    monkeypatch.setattr(depth, "SEARCHING", 1.0)
    monkeypatch.setattr(Budget, "cost", lambda _, __, sites: costs(sites.names))


def costs(names):
    """The same for each block: merged it is quicker."""
    return CostTable(*(dict.fromkeys(names, ms) for ms in (5.0, 4.0, 3.0)), 20.0, 2, 16, "cpu", "eager")


@pytest.fixture(scope="module")
def trained(digits):
    """A network that has learnt the digits, with widths to choose from; no method changes it."""
    torch.manual_seed(0)
    model = wide()
    train(model, digits, cross_entropy(), Train(epochs=15, lr=0.4, batch_size=32))
    return model.eval()


def shapes(network):
    return {name: value.shape for name, value in network.state_dict().items()}


EFFORT = Effort(seconds=5.0, batch_size=16, images=128, search_lr=0.2)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "given-masks"])
@pytest.mark.parametrize("pretrained", [True, False])
def test_every_method_meets_its_budget(method, pretrained, trained, digits, by_work, steady):
    model = trained if pretrained else wide()
    before = copy.deepcopy(model.state_dict())
    effort = replace(EFFORT, pretrained=pretrained, distil=pretrained)
    budget = Budget(1.2, 16, rounds=2)
    done = METHODS[method](Trial(model, digits, budget, effort))
    assert budget.reached(model, done.model) >= 1.2
    assert done.model(torch.zeros(2, 3, 16, 16)).shape == (2, 10)
    assert not done.model.training
    assert done.record["seconds"]["training"] > 0
    found = json.loads(json.dumps(done.record))
    assert found["history"]
    again = rebuilt(method, model, 16, found)
    if method in ("magnitude", "taylor"):
        assert again is None
    else:
        assert shapes(again) == shapes(done.model)
    narrower = (
        "uniform",
        "magnitude",
        "taylor",
        "layers",
        "layer-folding",
        "narrow-and-shrunk",
    )  # their BatchNorms see other maps
    assert ("statistics" in done.record["seconds"]) == (method in narrower)
    whole = ("uniform", "metapruning", "narrow-and-shrunk")  # which train what they end with from nothing
    assert ("pretraining" in done.record["seconds"]) == (not pretrained and method not in whole)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    if pretrained:
        assert dslib.evaluate(done.model, digits.val) > 0.2  # twice chance, in a moment


def test_evolved_widths_are_better_than_random_ones_within_the_budget(trained, digits, by_work, steady, monkeypatch):
    seen, loss_on = [], evolution.loss_on
    monkeypatch.setattr(evolution, "loss_on", lambda net, images: seen.append(images) or loss_on(net, images))
    found = METHODS["metapruning"](Trial(trained, digits, Budget(1.5, 16), EFFORT)).record
    assert len(found["random_losses"]) == evolution.FIRST
    assert found["candidates"] > evolution.FIRST
    assert found["loss"] < np.mean(found["random_losses"])
    chosen_by, compared_on = ({image.numpy().tobytes() for image in split.images} for split in (seen[0], seen[-1]))
    assert not chosen_by & compared_on  # images that did not choose
    assert len(found["random_macs"]) == evolution.FIRST
    assert max(found["random_macs"]) < dslib.count_macs(trained, (3, 16, 16))


def test_a_budget_that_cannot_be_met_says_how_far_it_goes(trained, digits, by_work, steady):
    for method in ("uniform", "layers", "metapruning", "layer-folding"):
        with pytest.raises(BadConfig, match=r"is \d+\.\d\d times as fast as the original .*, expected 1000"):
            METHODS[method](Trial(trained, digits, Budget(1000.0, 16), EFFORT))


def test_the_papers_masks_as_a_baseline(network, digits, by_work, steady):
    effort = replace(EFFORT, pretrained=False, distil=False)
    done = METHODS["given-masks"](Trial(network, digits, Budget(1.2, 32), effort))
    kept = [f"features.{i + 1}" for i in range(17) if f"features.{i + 1}" not in done.record["removed"]]
    assert kept in [[f"features.{i + 1}" for i in part] for part in PAPER_KEPT.values()]
    assert "pretraining" not in done.record["seconds"]


def test_a_method_spends_what_it_may(trained, digits):
    """On the real clock, of this process alone."""
    effort = replace(EFFORT, seconds=4.0, distil=False)
    done = METHODS["uniform"](Trial(trained, digits, Budget(1.01, 16, rounds=1), effort))
    assert 2 < sum(done.record["seconds"].values()) < 6


def test_layers_are_ranked_on_as_many_images_as_the_planner_has(trained, digits, by_work, steady, monkeypatch):
    seen = set()
    monkeypatch.setattr(blocks, "loss_on", lambda network, images: seen.add(len(images)) or 0.0)
    METHODS["layers"](Trial(trained, digits, Budget(1.1, 16), EFFORT))
    assert seen == {EFFORT.few}


def test_a_narrow_network_is_taught_as_all_others_are(trained, digits, by_work, steady, monkeypatch):
    teachers, pretrain = [], Trial.pretrain
    monkeypatch.setattr(Trial, "pretrain", lambda *given: teachers.append(given[-1]) or pretrain(*given))
    for distil in (True, False):
        METHODS["narrow-and-shrunk"](Trial(trained, digits, Budget(1.2, 16), replace(EFFORT, distil=distil)))
    assert teachers == [trained, None]


def test_costs_of_blocks_are_measured_once_for_each_network(trained, monkeypatch):
    calls = []
    monkeypatch.setattr(budget_module, "profile", lambda model, *_, **__: calls.append(model) or len(calls))
    mild = Budget(1.2, 16)
    strong = replace(mild, speedup=1.5)
    sites = find_sites(trained, 16)
    assert [each.cost(trained, sites) for each in (mild, strong, mild)] == [1, 1, 1]
    assert strong.cost(trained[:4], sites) == 2
    assert Budget(1.2, 32).cost(trained, sites) == 3


def test_the_least_strength_that_meets_a_budget(by_work):
    original = nn.Conv2d(3, 10_000, 1)  # 192 units of work and 6

    strengths = []

    def make(strength):
        strengths.append(strength)
        width = round(10_000 * (1 - strength)) or 1
        return nn.Conv2d(3, width, 1), width

    clock = Clock(1.0, torch.device("cpu"))
    width = least(Budget(2.0, 8), original, make, clock, steps=12)
    assert width == pytest.approx((198 / 2 - 6) / 192 * 10_000, abs=4)
    assert set(clock.spent) == {"choosing"}
    with pytest.raises(BadConfig, match=r"it: at its quickest the network is 32\.\d\d times as fast .*, expected 65"):
        least(Budget(65.0, 8), original, make, clock)
    assert strengths.count(1.0) == 2, "made once in each call, though measured twice in the second"


class Odd(nn.Module):
    """What gives maps of the shape that it takes, one of which can go, and why the others cannot."""

    def __init__(self):
        super().__init__()
        self.goes, self.named, self.changed, self.twice = (nn.Conv2d(3, 3, 1) for _ in range(4))
        self.act, self.two, self.same = nn.ReLU(inplace=True), nn.Bilinear(8, 8, 8), nn.Conv2d(3, 3, 1)
        self.other, self.sometimes = self.same, nn.AdaptiveAvgPool2d(8)

    def forward(self, x):
        x = self.named(input=self.goes(x)) + self.act(self.changed(x)) + self.two(x, x) + self.other(self.same(x))
        return self.sometimes(x) + self.sometimes(x[:, :, :4]) + self.twice(self.twice(x))


def test_blocks_that_can_go_whole(network, digits, monkeypatch):
    names = find_sites(network, 32).names
    assert droppable(network, names, 32) == tuple(f"features.{i}" for i in (3, 5, 6, 8, 9, 10, 12, 13, 15, 16))
    children = [name for name, _ in Odd().named_children()]
    assert droppable(Odd(), children, 8) == ("goes", "twice")
    sizes = []
    monkeypatch.setattr(shrinking, "droppable", lambda _, names, size: sizes.append(size) or tuple(names))
    monkeypatch.setattr(Trial, "finish", lambda _, small, **found: Pruned(small, found))
    monkeypatch.setattr(Trial, "least", lambda self, make, what: make(0.2)[1])
    done = blocks.layers(Trial(network, digits, Budget(1.5, 32), Effort(60, images=8)))
    assert len(done.record["removed"]) == 2
    assert set(sizes) == {digits.image_size}
    monkeypatch.setattr(blocks, "droppable", lambda *_: ())
    with pytest.raises(BadModel, match="no block gives maps of the shape that it takes"):
        blocks.layers(Trial(network, digits, Budget(1.5, 32), Effort(60)))


def test_pruned_networks_have_the_right_shapes_and_run_everywhere():
    pytest.importorskip("openvino")
    network, images = randomise_batchnorm(wide()), torch.randn(2, 3, 32, 32)
    before = copy.deepcopy(network.state_dict())
    gradients = [[torch.randn_like(parameter) for parameter in network.parameters()]]
    taylors = partial(channels.taylors, gradients)
    everywhere = ("eager", "nchw", "compile", "onnxruntime", "openvino")
    for score, compete, runtimes in ((channels.magnitudes, False, ()), (taylors, True, everywhere)):
        small = cut(network, 0.5, 32, score, compete)
        assert dslib.count_parameters(small) < 0.7 * dslib.count_parameters(network)
        assert small(images).shape == (2, 10)
        for runtime in runtimes:
            assert dslib.measure({"small": small}, images, rounds=1, runtime=runtime).median("small") > 0
    assert all(torch.equal(a, b) for a, b in zip(before.values(), network.state_dict().values(), strict=True))
    assert cut(network, 0.0, 32, channels.magnitudes, False) is not network


def test_taylor_scores_let_a_channels_products_cancel():
    model = nn.Sequential(nn.Conv2d(3, 16, 1, bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    with torch.no_grad():
        model[0].weight[:8] = torch.tensor([1.0, 1.0, -2.0]).reshape(3, 1, 1)
        model[0].weight[8:] = 1.0
    gradient = [torch.zeros_like(parameter) for parameter in model.parameters()]
    gradient[0] = torch.ones_like(gradient[0])
    groups = coupled(model, 32)[1]
    found = channels.taylors([gradient, gradient], model)(groups[0])
    assert found.tolist() == [0.0] * 8 + [2 * 3.0**2] * 8, "two batches, the square of a sum of three"


def test_small_channels_go_first(network):
    with torch.no_grad():
        for layer in (network.features[2].conv[0][0], network.features[2].conv[1][0]):
            layer.weight[::2] *= 1e-3
        network.features[2].conv[2].weight[:, ::2] *= 1e-3
    small = cut(network, 0.5, 32, channels.magnitudes, False)
    kept = small.features[2].conv[0][0].weight
    assert len(kept) == 24
    assert torch.equal(kept, network.features[2].conv[0][0].weight[1::2])
