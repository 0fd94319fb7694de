"""What cannot be shrunk or merged rightly is refused, with its reason."""

import re

import pytest
import torch
from conftest import Block, network
from torch import nn

import dslib
from dslib.errors import BadConfig, MaskMismatch, NotMergeable


def test_padding_by_input_size_needs_the_image_size():
    model, sites = network("timm/tf_efficientnet_lite0")
    mask = sites.mask([])
    with pytest.raises(BadConfig, match="pass image_size"):
        dslib.shrink(model, mask)


def test_masks_of_another_network_are_refused(tiny):
    mask = dslib.find_sites(tiny, 32).mask([])
    with pytest.raises(MaskMismatch, match="not sites here: blocks.0"):
        dslib.shrink(network()[0], mask)
    with pytest.raises(MaskMismatch, match="not in the mask: blocks.1"):
        dslib.shrink(tiny, dslib.Mask({"blocks.0": True}))
    with pytest.raises(MaskMismatch, match=r"expected a dslib\.Mask, found list"):
        dslib.shrink(tiny, [True, False])


def test_removing_a_site_that_is_not_affine_is_refused():
    model, sites = network("torchvision/mobilenet_v3_large")
    wrong = next(site.name for site in sites if not site.mergeable)
    mask = dslib.Mask({name: name != wrong for name in sites.names})
    for make in (dslib.shrink, dslib.fade):
        with pytest.raises(NotMergeable, match=rf"{wrong}: .*AdaptiveAvgPool2d\): is not affine.*keep it in the mask"):
            make(model, mask)


class Odd(Block):
    """A block with one oddity in its forward, for refusals."""

    def __init__(self, oddity):
        super().__init__()
        self.oddity, self.act = oddity, nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.bn1(self.expand(x))
        if self.oddity == "reads again":
            return self.bn3(self.project(self.bn2(self.depthwise(self.act(y))) + y))
        y = torch.relu(y)
        if self.oddity == "twice":
            y = self.depthwise(y)
        y = self.bn3(self.project(self.bn2(self.depthwise(y))))
        if self.oddity == "pair":
            return y, x
        return y + x


class BatchNormReLU(nn.BatchNorm2d):
    def forward(self, x):
        return torch.relu(super().forward(x))


@pytest.mark.parametrize(
    ("oddity", "reason"),
    [
        ("twice", r"depthwise \(Conv2d\) is called twice"),
        ("pair", "returns more than one feature map"),
        ("reads again", "writes into a map that is read again"),
        ("batchnorm", r"bn2 \(BatchNormReLU\) computes its own way"),
        ("shared", "is one module under 2 names"),
    ],
)
def test_what_would_merge_wrongly_is_refused_with_its_reason(oddity, reason):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), Odd(oddity))
    if oddity == "batchnorm":
        model[1].bn2 = BatchNormReLU(6)
    if oddity == "shared":
        model.append(model[1])
    if oddity == "pair":
        model.append(nn.Identity())
    sites = dslib.find_sites(model.eval(), 12)
    assert not sites[0].mergeable
    assert re.search(reason, sites[0].reason), sites[0].reason
    with pytest.raises(dslib.DslibError, match=reason):
        dslib.shrink(model, dslib.Mask({"1": False}))
