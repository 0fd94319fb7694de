"""Folding: branches and BatchNorms into convolutions, against the network itself and against timm's own."""

import pytest
import timm
import torch
from conftest import build, randomise_batchnorm
from torch import nn

import dslib


def counts(model: nn.Module) -> tuple[int, int]:
    """Convolutions and BatchNorms."""
    return tuple(sum(isinstance(m, kind) for m in model.modules()) for kind in (nn.Conv2d, nn.BatchNorm2d))


@pytest.mark.parametrize("name", ["mobilenet_v2", "timm/efficientnet_lite0", "torchvision/densenet121"])
@torch.no_grad()
def test_folding_batchnorm_keeps_the_function(name):
    model = build(name)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    folded = dslib.fold(model, x)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-9, atol=1e-9)
    left = sum(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    assert left < sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert left == 0 or "densenet" in name  # pre-activation: some follow no convolution


@torch.no_grad()
def test_folding_leaves_hoisted_padding_in_place(tiny):
    small = dslib.shrink(tiny, dslib.find_sites(tiny, 32).mask([]))
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    folded = dslib.fold(small, x)
    torch.testing.assert_close(folded(x), small(x))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())


def test_folding_leaves_a_batchnorm_without_statistics():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False))
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(dslib.fold(model, x)(x), model(x))


@pytest.mark.parametrize("name", ["repvgg_a0", "repvgg_b1g4", "mobileone_s0", "mobileone_s1", "mobileone_s4"])
@torch.no_grad()
def test_branches_fold_as_in_timm(name):
    """As many convolutions as timm's own reparameterisation leaves, and the same function; s4 has attention too."""
    model = build(f"timm/{name}")
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    folded, theirs = dslib.fold(model, x), timm.utils.reparameterize_model(model)
    torch.testing.assert_close(folded(x), theirs(x), rtol=1e-9, atol=1e-9 * theirs(x).abs().max().item())
    assert counts(folded) == counts(theirs)
    assert counts(folded)[1] == 0


@torch.no_grad()
def test_an_activation_in_place_between_convolution_and_batchnorm_is_seen():
    """The ReLU writes into the convolution's output: the BatchNorm then reads the same tensor, not the same values."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True), nn.BatchNorm2d(4))
    model = randomise_batchnorm(model).double().eval()
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    folded = dslib.fold(model, x)
    torch.testing.assert_close(folded(x), model(x))
    assert counts(folded) == (1, 1)


@torch.no_grad()
def test_what_would_cost_more_is_not_folded():
    """A depthwise and a pointwise convolution are affine together, but dense they take more arithmetic."""

    class Separable(nn.Module):
        def __init__(self):
            super().__init__()
            self.depthwise, self.bn = nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.BatchNorm2d(8)
            self.pointwise = nn.Conv2d(8, 8, 1)

        def forward(self, x):
            return self.pointwise(self.bn(self.depthwise(x)))

    model = nn.Sequential(nn.Conv2d(3, 8, 1), randomise_batchnorm(Separable())).double().eval()
    x = torch.randn(1, 3, 9, 9, dtype=torch.float64)
    folded = dslib.fold(model, x)
    assert counts(folded) == (3, 0)
    torch.testing.assert_close(folded(x), model(x))
