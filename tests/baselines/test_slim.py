"""Widths of a slim network are exact: what is extracted computes what the slim network does."""

import pytest
import torch
from conftest import randomise_batchnorm
from torch import nn

import dslib
from dslib.baselines.coupling import Macs, find_groups
from dslib.baselines.slim import Slim
from dslib.errors import BadModel

FULL = {"width_mult": 0.35}


@pytest.fixture
def network():
    """A narrow MobileNetV2 with random statistics."""
    return randomise_batchnorm(dslib.load_model("mobilenet_v2", list("0123456789"), options=FULL).model).eval()


@pytest.mark.parametrize("name", ["mobilenet_v2", "mobilenetv2_050", "resnet18"])
def test_a_slim_network_of_all_channels_is_the_network(name):
    model = randomise_batchnorm(dslib.load_model(name, list("01")).model).eval()
    images = torch.randn(4, 3, 32, 32)
    slim = Slim(model, 32, ordered=True)
    whole = [group.width for group in slim.groups]
    torch.testing.assert_close(slim.extract(whole)(images), model(images), rtol=1e-3, atol=1e-4)
    assert Macs(model, slim.groups, 32)(whole) == dslib.count_macs(model, (3, 32, 32))


def test_what_is_extracted_computes_what_the_slim_network_does(network):
    slim = Slim(network, 32, ordered=True).train()
    for module in slim.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.Linear) and module.in_features == 8:  # the generators' second layers
            nn.init.normal_(module.weight, std=0.01)
    widths = slim.rounded([0.3 + 0.05 * (i % 9) for i in range(len(slim.groups))])
    images = torch.randn(8, 3, 32, 32)
    slim.choose(widths)
    expected = slim(images)
    small = slim.extract(widths)
    assert dslib.count_macs(small, (3, 32, 32)) == Macs(network, slim.groups, 32)(widths)
    dslib.training.evaluating.recalibrate_batchnorm(small, [images])
    for norm in small.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.train()  # by the batch, as the slim one
    torch.testing.assert_close(small(images), expected, rtol=1e-3, atol=1e-4)
    assert not torch.equal(small.features[1].conv[0][0].weight, network.features[1].conv[0][0].weight[: widths[-1]])


def test_channels_are_put_in_the_order_of_their_norms(network):
    slim = Slim(network, 32, ordered=True)
    for group in slim.groups:
        layers = [slim.network.get_submodule(name) for name in group.makers]
        norms = sum(layer.conv.weight.abs().flatten(1).sum(1) for layer in layers if hasattr(layer, "conv"))
        assert norms.tolist() == sorted(norms.tolist(), reverse=True)


def test_networks_that_share_channels_otherwise_are_refused():
    with pytest.raises(BadModel, match="its channels are not shared one for one"):
        find_groups(dslib.load_model("densenet121", list("01")).model, 32)
