"""Expand, then shrink: exactly the small network's shape again."""

import copy
from dataclasses import replace

import pytest
import torch
from conftest import Tiny, photos, randomise_batchnorm, relative
from torch import nn

import dslib
from dslib.errors import BadModel
from dslib.shrinking import Fade, set_fade, settle
from dslib.training.expanding import Boost, Expanded, boost, contract, expand


def random_again(model):
    """Other weights and statistics everywhere, as training leaves them."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return randomise_batchnorm(model, seed=5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["resnet18", "efficientnet_lite0", "mobilenet_v3_small"])
def test_an_expanded_network_comes_back_exactly(name):
    small = randomise_batchnorm(dslib.load_model(name).model).double().eval()
    before = {key: value.clone() for key, value in small.state_dict().items()}
    larger = random_again(expand(small, 1.5, 32)).eval()
    assert sum(isinstance(m, Fade) for m in larger.modules()) > 10
    back = contract(larger, small)
    assert list(back.state_dict()) == list(before)
    assert all(value.shape == before[key].shape for key, value in back.state_dict().items())
    x = photos(3, 32)
    assert relative(back(x), settle(larger)(x)) < 1e-10
    assert relative(back(x), small(x)) > 1e-3
    assert all(torch.equal(value, before[key]) for key, value in small.state_dict().items())
    set_fade(larger, 0.5)
    assert relative(larger(x), back(x)) > 1e-6  # activations that are still there make a difference


def biased() -> nn.Module:
    """A network whose convolutions have biases."""
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3, 2, 1), nn.BatchNorm2d(4))


def test_a_convolution_with_its_own_bias_takes_it_back():
    small = randomise_batchnorm(biased()).double().eval()
    larger = random_again(expand(small, 2, 16)).eval()
    back, x = contract(larger, small), photos(2, 16)
    assert relative(back(x), settle(larger)(x)) < 1e-10
    assert torch.equal(back[4].running_mean, larger[4].running_mean)


class Shuffled(nn.Module):
    """Its BatchNorm is registered behind a convolution that it does not follow."""

    def __init__(self):
        super().__init__()
        self.stem, self.one, self.norm = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.two, self.last = nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)

    def forward(self, x):
        return self.norm(self.two(torch.relu(self.last(self.one(self.stem(x))))))


def test_what_could_not_be_put_back_is_refused_before_training():
    with pytest.raises(BadModel, match="not called in the order in which they are registered"):
        expand(randomise_batchnorm(Shuffled()).eval(), image_size=16)
    with pytest.raises(BadModel, match="nothing to expand"):
        expand(dslib.load_model("vgg11").model, image_size=32)
    with pytest.raises(BadModel, match="was not expanded from that one"):
        contract(expand(biased(), image_size=16), Tiny())


def test_boosting_trains_the_small_network_and_leaves_its_argument(digits):
    small = Tiny()
    before = copy.deepcopy(small.state_dict())
    config = Boost(epochs=15, lr=0.5, batch_size=32)
    done = boost(small, digits, config)
    assert all(torch.equal(value, before[key]) for key, value in small.state_dict().items())
    assert dslib.evaluate(done.model, digits.val) > 0.3
    assert list(done.model.state_dict()) == list(before)
    assert done.history[-1]["val_accuracy"] == pytest.approx(dslib.evaluate(done.model, digits.val), abs=0.02)
    again = boost(small, digits, replace(config, epochs=1))
    assert torch.equal(again.model.head.weight, boost(small, digits, replace(config, epochs=1)).model.head.weight)
    block = Expanded(nn.Conv2d(4, 6, 5, 2, 2), 2)
    assert block(torch.randn(2, 4, 16, 16)).shape == (2, 6, 8, 8)
