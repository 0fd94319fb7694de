"""Equal time for all: clocks, statistics, recipes, parts of the images; and timings that decide on a budget."""

import time

import numpy as np
import pytest
import torch
from torch import nn

from dslib.baselines import Budget, Effort, Trial, trial, tuning
from dslib.baselines.budget import least
from dslib.baselines.tuning import Clock
from dslib.data.splits import cut
from dslib.errors import BadConfig, BadData
from dslib.finetuning import Finetune
from dslib.measuring.latency import Timing
from dslib.shrinking import Fade
from dslib.training import Trained


def test_what_is_cut_has_the_statistics_of_what_is_left(digits):
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1))
    nn.init.constant_(network[0].running_mean, 9.0)
    effort = Effort(1.0, batch_size=16, images=4 * 33)  # the last batch is one image, and left out
    assert Trial(network, digits, Budget(2.0, 16), effort).with_new_statistics(network) is network
    seen = torch.cat([x for x, _ in digits.train.first(33, 0).batches(16)][:2])
    torch.testing.assert_close(network[0].running_mean, seen.mean((0, 2, 3)), rtol=1e-3, atol=1e-4)
    assert not network.training


@pytest.mark.parametrize(
    ("recipe", "fades", "frozen"), [("gentle", False, True), ("gentle", True, False), ("usual", False, False)]
)
def test_statistics_are_frozen_only_where_nothing_fades(recipe, fades, frozen, digits, monkeypatch):
    configs = []
    monkeypatch.setattr(trial, "timed", lambda *given: configs.append(given[2]) or Trained(network, []))
    network = nn.Sequential(nn.Conv2d(3, 3, 1), Fade(nn.ReLU(), 0.0) if fades else nn.ReLU())
    Trial(network, digits, Budget(2.0, 16), Effort(1.0, recipe=recipe)).finish(network)
    assert [config.freeze_batchnorm for config in configs] == [frozen]


def test_of_several_threads_waiting_counts_too(monkeypatch):
    clock = Clock(1.0, torch.device("cpu"))
    for threads, counted in ((1, False), (2, True)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        began = clock.now()
        time.sleep(0.2)
        assert (clock.now() - began > 0.15) == counted


def test_one_lucky_measurement_does_not_decide(monkeypatch):
    def reached(self, original, network):
        return network.out_channels / 4 * (1.3 if self.rounds == 1 else 1.0)

    def make(strength):
        return nn.Conv2d(3, round(16 * strength) or 1, 1), strength

    monkeypatch.setattr(Budget, "reached", reached)
    found = least(Budget(2.0, 8, rounds=1), nn.Conv2d(3, 1, 1), make, Clock(1.0, torch.device("cpu")), 4)
    assert found == 0.5


def test_one_unlucky_measurement_does_not_refuse(monkeypatch):
    asked = []

    def reached(self, original, network):
        asked.append(self.rounds)
        return network.out_channels / 8 * (0.9 if len(asked) == 1 else 1.0)

    def make(strength):
        return nn.Conv2d(3, round(16 * strength) or 1, 1), strength

    monkeypatch.setattr(Budget, "reached", reached)
    assert least(Budget(2.0, 8, rounds=1), nn.Conv2d(3, 1, 1), make, Clock(1.0, torch.device("cpu")), 4) == 1.0
    assert asked[:2] == [1, 3]


def test_a_timing_while_the_machine_changed_its_pace_is_made_again(monkeypatch):
    def timing(original, network, others=0.0):
        return Timing({"original": np.array(original), "network": np.array(network)}, 1, "cpu", "eager", others)

    skewed = timing([1.0, 1.0, 3.0, 3.0, 3.0], [1.0, 1.0, 1.0, 3.0, 3.0])  # medians 3 and 1, every ratio but one is 1
    even, busy = (timing([2.0, 2.1, 2.2, 2.3, 2.4], [1.0] * 5, others) for others in (0.0, 9.0))
    budget, network = Budget(1.5, 8), nn.Conv2d(3, 1, 1)
    for given, quiet, expected in (
        ([even], True, even),
        ([busy], False, busy),
        ([skewed, even], False, even),
        ([busy, even], True, even),
        ([skewed] * 3, False, skewed),
    ):
        found = iter(given)
        monkeypatch.setattr(Budget, "timing", lambda *_, found=found, **__: next(found))
        assert budget.steady(network, network, quiet) is expected
        assert next(found, None) is None


def test_a_part_of_the_images_fills_the_time(digits):
    config, clock = Finetune(batch_size=32), tuning.Clock(180.0, torch.device("cpu"), {"ranking": 170.0})
    part = tuning.portion_for(digits, 10.0, 0.1, config, clock)
    assert (len(part.data.train), part.epochs) == (100, 1)
    part = tuning.portion_for(digits, 50.0, 0.1, config, clock)
    assert (len(part.data.train), part.epochs) == (250, 2)
    seen, every = (split.images.flatten(1).unique(dim=0) for split in (part.data.train, digits.train))
    assert torch.equal(seen, every)
    assert part.data.train.augment is digits.train.augment
    told = r"1 of 180 s are left for a training \(took: ranking 170 s\), a batch takes 3.2 s: give more seconds"
    with pytest.raises(BadConfig, match=told):
        tuning.portion_for(digits, 1.0, 0.1, config, clock)


def test_held_back_images_are_not_among_the_rest(digits):
    rest, held = cut(digits.train, 40)
    assert (len(rest), len(held)) == (len(digits.train) - 40, 40)
    both = torch.cat([rest.images, held.images]).flatten(1).double().sum(1).sort()[0]
    assert torch.equal(both, digits.train.images.flatten(1).double().sum(1).sort()[0])
    with pytest.raises(BadData, match=f"expected more than {len(digits.train)} training images"):
        cut(digits.train, len(digits.train))
