"""The dense counterpart: the same multiply-accumulates, one convolution a block."""

import pytest
import torch
from conftest import Tiny, build, wide
from torch import nn

import dslib
from dslib.errors import BadModel
from dslib.measuring.counterpart import DenseBlock, dense


@pytest.mark.parametrize(
    "name", ["mobilenet_v2", "timm/efficientnet_lite0", "resnet18", "efficientnet_b0", "shufflenet_v2_x1_0"]
)
def test_macs_agree_and_every_site_is_one_convolution(name):
    model = build(name).float()
    sites = dslib.find_sites(model, 64)
    found = dense(model, sites)
    assert found.macs == dslib.count_macs(found.model, (3, 64, 64))
    assert found.original_macs == dslib.count_macs(model, (3, 64, 64))
    assert abs(found.macs / found.original_macs - 1) <= 0.01
    for site in sites:
        block = found.model.get_submodule(site.name)
        assert isinstance(block, DenseBlock)
        assert sum(isinstance(m, nn.Conv2d) for m in block.modules()) == 1
        if site.mergeable:
            assert block.conv.kernel_size == site.kernel
            assert block.conv.stride == site.stride
        assert block.conv.in_channels % found.multiple == block.conv.out_channels % found.multiple == 0
    with torch.no_grad():
        logits = found.model.eval()(torch.randn(2, 3, 64, 64))
    assert logits.shape == (2, 1000)
    assert 1e-6 < logits.std() < 1e3  # no overflow in float16


def test_residual_and_activation_are_the_blocks_own():
    model = wide().double()
    found = dense(model, dslib.find_sites(model, 32)).model
    _, first, second, *_ = found
    assert first.residual
    assert not second.residual  # stride 2
    x = torch.randn(1, first.conv.in_channels, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(first(x), torch.relu(first.conv(x) + x))
    assert next(found.parameters()).dtype == torch.float64


def test_a_convolution_of_one_channel_is_no_depthwise_one():
    whole = list(wide())
    model = nn.Sequential(*whole[:4], nn.Conv2d(32, 1, 1), nn.Conv2d(1, 32, 1), *whole[4:])
    found = dense(model, dslib.find_sites(model, 32)).model
    assert found[5].in_channels > 1
    assert found[5].groups == 1


def test_a_network_that_cannot_be_widened():
    class Odd(Tiny):
        def __init__(self):
            super().__init__()
            self.norm = nn.GroupNorm(2, 6)

        def forward(self, x):
            return self.head(self.norm(self.blocks(self.stem(x))).mean((2, 3)))

    class Fixed(Tiny):
        def forward(self, x):
            return self.head(self.blocks(self.stem(x)).mean((2, 3))[:, :6])

    for model, text in (
        (Odd(), r"norm \(GroupNorm\): its width cannot be scaled"),
        (Fixed(), "Fixed does not run with all widths times"),
    ):
        with pytest.raises(BadModel, match=text):
            dense(model, dslib.find_sites(model, 32))
    with pytest.raises(BadModel, match="no site"):
        dense(nn.Sequential(nn.Conv2d(3, 4, 3)), dslib.find_sites(nn.Sequential(nn.Conv2d(3, 4, 3)), 32))
