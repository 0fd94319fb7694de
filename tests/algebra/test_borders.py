"""Exact borders: a network whose padding stays where it is, against itself with its activations off."""

import math

import pytest
import torch
from conftest import network, relative, removing
from torch import nn

import dslib
from dslib.algebra.merged_block import BorderBias, OnesChannel
from dslib.bench.exact import without_activations
from dslib.errors import BadConfig, NotMergeable


@torch.no_grad()
def test_the_unmodified_network_is_matched_at_its_borders():
    model, sites = network()
    mask = sites.mask(["features.3", "features.9"])
    x = torch.randn(2, 3, 75, 75, dtype=torch.float64)
    expected = without_activations(model, mask.removed)(x)
    small = dslib.shrink(model, mask, image_size=75, hoist=False)
    assert torch.equal(small(x), expected)
    for merged, kind in ((dslib.merge(small, image_size=75), BorderBias), (dslib.merge(small), OnesChannel)):
        assert relative(merged(x), expected) < 1e-12
        assert sum(isinstance(m, kind) for m in merged.modules()) == 14  # the t=1 block pads first and needs none
        assert not dslib.unmerged(merged)
    assert relative(dslib.shrink(model, mask)(x), expected) > 1e-3  # hoisting does change the border


@pytest.mark.parametrize("name", ["resnet50", "timm/tf_efficientnet_lite0"])
@torch.no_grad()
def test_bottlenecks_and_dynamic_padding(name):
    model, sites = network(name)
    cheap = [site for site in sites if math.prod((site.input_shape[0], site.c_out, *site.kernel)) < 1e6]
    small = dslib.shrink(model, removing(sites, *(site.name for site in cheap)), nn.ReLU6, 75, hoist=False)
    x = torch.randn(1, 3, 75, 75, dtype=torch.float64)
    assert relative(dslib.merge(small, image_size=75)(x), small(x)) < 1e-11
    assert relative(dslib.merge(small)(x), small(x)) < 1e-11


@torch.no_grad()
def test_a_channel_of_ones_is_right_at_every_size_and_a_bias_says_when_it_is_not():
    model, sites = network()
    small = dslib.shrink(model, removing(sites, "features.2", "features.3", "features.8"), hoist=False)
    ones, bias = dslib.merge(small), dslib.merge(small, image_size=64)
    for size in (33, 64, 101):
        x = torch.randn(1, 3, size, size, dtype=torch.float64)
        assert relative(ones(x), small(x)) < 1e-12
    with pytest.raises(BadConfig, match=r"merged for maps of \(16, 16\), found \(26, 26\)"):
        bias(x)


def test_a_padded_convolution_after_a_spatial_one_is_refused_by_name():
    model, sites = network("resnet18")
    mask = sites.mask([])
    with pytest.raises(NotMergeable, match=r"layer1\.0: conv2 \(Conv2d\): padding .* hoist the padding"):
        dslib.shrink(model, mask, hoist=False)


@torch.no_grad()
def test_a_map_larger_than_its_input_has_no_channel_of_ones():
    class Growing(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.bn_a, self.b = nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3, padding=2)
            self.bn_b = nn.BatchNorm2d(4)

        def forward(self, x):
            return self.bn_b(self.b(torch.relu(self.bn_a(self.a(x)))))

    model = nn.Sequential(nn.Conv2d(3, 4, 1), Growing()).double().eval()
    small = dslib.shrink(model, dslib.Mask({"1": False}), hoist=False)
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    assert relative(dslib.merge(small, image_size=8)(x), small(x)) < 1e-12
    with pytest.raises(NotMergeable, match="larger than its input"):
        dslib.merge(small)
