"""Blocks with every kind of layer: what is affine merges, what is not is refused with its type and why."""

import copy
import math
import re

import conftest
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import Wrapped, build, network, randomise_batchnorm, relative, removing
from torch import nn

import dslib
from dslib.errors import BadConfig, BadModel, NotMergeable


def site(between) -> nn.Module:
    """A network of a stem and one block, random statistics, float64, eval."""
    torch.manual_seed(1)
    return randomise_batchnorm(nn.Sequential(nn.Conv2d(3, 4, 1), Wrapped(between))).double().eval()


def swapped(y):
    first, second = y.chunk(2, 1)
    return torch.cat([second, first], 1)


AFFINE = {
    "layer scale": timm.layers.LayerScale2d(8, 0.3),
    "learned affine": timm.models.hgnet.LearnableAffineBlock(0.7, 0.2),
    "drop path": timm.layers.DropPath(0.5),
    "dropout": nn.Dropout2d(0.5),
    "average": nn.AvgPool2d(3, 1, 1),
    "average, an uneven one": nn.AvgPool2d((1, 3), 1, (0, 1)),
    "ceil": nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False),
    "F.avg_pool2d": lambda self, y: F.avg_pool2d(y, 3, 1, 1),
    "F.dropout": lambda self, y: F.dropout(y, 0.5, self.training),
    "F.pad": lambda self, y: F.pad(y, (1, 0, 2, 1)),
    "zero pad": nn.ZeroPad2d((0, 2, 1, 0)),
    "numbers": lambda self, y: 2 * y / 4 - 0.5 + 1,
    "minus": lambda self, y: 1 - (-y),
    "gain": lambda self, y: y * self.gain + self.gain.abs().sqrt(),
    "twice": lambda self, y: y + y,
    "alpha": lambda self, y: torch.add(y, y, alpha=0.5).sub(y, alpha=-2),
    "slices": lambda self, y: torch.cat([y[:, 6:], y[:, :6] * 2], dim=1),
    "chunks": lambda self, y: swapped(y),
    "split": lambda self, y: torch.cat([torch.split(y, [2, 6], dim=1)[1], torch.split(y, [2, 6], dim=1)[0]], 1),
    "shuffle": lambda self, y: conftest.channel_shuffle(y, 4),
    "clone": lambda self, y: torch.clone(y.contiguous()),
}


@pytest.mark.parametrize("name", AFFINE)
@torch.no_grad()
def test_affine_layers_merge(name, monkeypatch):
    model = site(AFFINE[name])
    small = dslib.shrink(model, dslib.Mask({"1": False}), image_size=16)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    merged = dslib.merge(small)
    assert sum(isinstance(m, nn.Conv2d) for m in merged.modules()) == 2
    torch.testing.assert_close(merged(x), small(x), rtol=0, atol=1e-12)
    # inside it is the block itself, its ReLU taken for the identity
    torn = site(AFFINE[name])
    monkeypatch.setattr(torch, "relu", lambda y: y)
    expected = torn(x)
    inside = (..., slice(3, -3), slice(3, -3))
    torch.testing.assert_close(small(x)[inside], expected[inside], rtol=0, atol=1e-12)


NOT_AFFINE = {
    "squeeze-excitation": (
        timm.layers.SEModule(8),
        r"mean in between \(SEModule\): is not affine: it pools the whole map",
    ),
    "max pool": (nn.MaxPool2d(3, 1, 1), r"between \(MaxPool2d\): is not affine: it takes a maximum"),
    "layer norm": (timm.layers.LayerNorm2d(8), r"between \(LayerNorm2d\): is not affine: it normalises by statistics"),
    "group norm": (nn.GroupNorm(2, 8), r"between \(GroupNorm\): is not affine: it normalises by statistics"),
    "gate": (lambda self, y: y * torch.cos(y), "cos: is not affine in the feature map"),
    "two maps": (lambda self, y: y * y, "mul: is not affine: it weighs the map"),
    "divided": (lambda self, y: 1 / (2 + y), "divides by a feature map"),
    "softmax": (lambda self, y: y.softmax(1), "softmax: is not affine: it weighs the map"),
    "transposed": (nn.ConvTranspose2d(8, 8, 1), r"between \(ConvTranspose2d\): is not affine: it is a transposed"),
    "size": (lambda self, y: y.reshape(y.size(0), 8, 16, 16), "size: is not affine: it reads the map's size"),
    "rows": (lambda self, y: y[:, :, 1:], "getitem: is not affine in the feature map: only channels can be sliced"),
    "batch": (lambda self, y: torch.cat([y, y], 0), "cat: is affine over channels"),
    "a bias a pixel": (lambda self, y: y + torch.ones(16, 16), r"add: expected a number or one value a channel"),
    "reflection": (lambda self, y: F.pad(y, (1, 1, 1, 1), "reflect"), "pad: only zero padding"),
    "own average": (timm.layers.AvgPool2dSame(2, 2), "AvgPool2dSame computes its own way"),
    "own code": (nn.Sequential(timm.layers.BlurPool2d(8)), "BlurPool2d"),
}


@pytest.mark.parametrize("name", NOT_AFFINE)
def test_what_is_not_affine_is_refused_with_its_type_and_why(name):
    between, reason = NOT_AFFINE[name]
    model = site(between)
    found = dslib.find_sites(model, 16)[0]
    assert not found.mergeable
    assert re.search(reason, found.reason), found.reason
    with pytest.raises((NotMergeable, BadConfig), match=reason):
        dslib.shrink(model, dslib.Mask({"1": False}), image_size=16)


def test_a_last_window_that_hangs_over_is_refused():
    model = site(nn.AvgPool2d(2, 2, ceil_mode=True))
    with pytest.raises(NotMergeable, match="last window of a 15 x 15 map"):
        dslib.shrink(model, dslib.Mask({"1": False}), image_size=15)
    with pytest.raises(BadConfig, match="pass image_size"):
        dslib.shrink(model, dslib.Mask({"1": False}))


@torch.no_grad()
def test_an_average_without_its_padding_has_no_exact_border():
    model = site(nn.AvgPool2d(3, 1, 1, count_include_pad=False))
    small = dslib.shrink(model, dslib.Mask({"1": False}))
    x = torch.randn(1, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(dslib.merge(small)(x), small(x))
    with pytest.raises(NotMergeable, match=r"between \(AvgPool2d\): leaves the padding out of its averages"):
        dslib.shrink(model, dslib.Mask({"1": False}), hoist=False)


def test_a_block_that_splits_its_input_needs_its_shape():
    model, sites = network("shufflenet_v2_x1_0")
    mask = sites.mask([])
    with pytest.raises(BadConfig, match="splits the block's channels: pass image_size"):
        dslib.shrink(model, mask)


# families with something of their own: concatenations, chunks, splits, pooled shortcuts, optional arguments
@pytest.mark.parametrize(
    "name",
    [
        "torchvision/shufflenet_v2_x1_0",
        "torchvision/inception_v3",
        "timm/res2net50_26w_4s",
        "timm/resnet50d",
        "timm/dla34",
        "timm/hgnetv2_b0",
        "timm/repvit_m1",
        "timm/ghostnet_100",
    ],
)
@pytest.mark.filterwarnings("ignore:The default weight initialization:FutureWarning")
@torch.no_grad()
def test_families_merge(name):
    model = build(name)
    sites = dslib.find_sites(model, 96)
    found = [site for site in sites if site.mergeable]
    cheap = [site.name for site in found if math.prod((site.input_shape[0], site.c_out, *site.kernel)) < 4e6]
    assert cheap  # the others take half a minute
    small = dslib.shrink(model, removing(sites, *cheap), None, 96)
    x = torch.randn(1, 3, 96, 96, dtype=torch.float64)
    assert relative(dslib.merge(small)(x), small(x)) < 1e-10
    keeping = dslib.shrink(model, sites.mask(sites.names), None, 96)
    assert torch.equal(keeping(x), model(x))


@torch.no_grad()
def test_equally_grouped_convolutions_stay_grouped():
    class Grouped(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.bn_a = nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8)
            self.b, self.bn_b = nn.Conv2d(8, 8, 3, groups=4), nn.BatchNorm2d(8)

        def forward(self, x):
            return self.bn_b(self.b(torch.relu(self.bn_a(self.a(x)))))

    model = randomise_batchnorm(nn.Sequential(nn.Conv2d(3, 8, 1), Grouped())).double().eval()
    small = dslib.shrink(model, dslib.Mask({"1": False}))
    conv = dslib.merge(small)[1].conv
    assert (conv.groups, tuple(conv.weight.shape)) == (4, (8, 2, 5, 5))
    x = torch.randn(1, 3, 12, 12, dtype=torch.float64)
    torch.testing.assert_close(dslib.merge(small)(x), small(x))


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float16, 2e-3), (torch.bfloat16, 3e-2)])
@torch.no_grad()
def test_half_precision_is_merged_in_double_and_cast_once(dtype, limit):
    model, sites = copy.deepcopy(network()[0]), network()[1]
    mask = removing(sites, "features.3")
    exact = dslib.merge(dslib.shrink(model.to(dtype).double(), mask)).features[3].conv.weight
    half = dslib.merge(dslib.shrink(model.to(dtype), mask)).features[3].conv.weight
    assert half.dtype == dtype
    torch.testing.assert_close(half.double(), exact, rtol=limit, atol=1e-6)


def test_weights_without_values_or_with_wrong_ones_are_refused_by_name(tiny):
    mask = dslib.find_sites(tiny, 32).mask([])
    for value in (float("nan"), float("inf")):
        damaged = dslib.shrink(tiny, mask)
        with torch.no_grad():
            damaged.blocks[1].project.weight[0, 0] = value
        with pytest.raises(NotMergeable, match=r"blocks\.1: project\.weight holds NaN or infinity"):
            dslib.merge(damaged)
    damaged = dslib.shrink(tiny, mask)
    damaged.blocks[1].bn2.running_var[0] = -1
    with pytest.raises(NotMergeable, match=r"blocks\.1: bn2 .*running variance that is not positive"):
        dslib.merge(damaged)
    large = dslib.shrink(tiny, mask).half()
    with torch.no_grad():
        large.blocks[0].project.weight.fill_(6e4)
        large.blocks[0].depthwise.weight.fill_(6e4)
    with pytest.raises(NotMergeable, match="do not fit torch.float16"):
        dslib.merge(large)
    with pytest.raises(NotMergeable, match="on the meta device and has no values"):
        dslib.merge(dslib.shrink(tiny.to("meta"), mask))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_quantised_networks_are_refused(tiny):
    tiny.blocks[0] = torch.ao.nn.quantized.Conv2d(4, 4, 1)
    with pytest.raises(BadModel, match=r"quantised \(blocks\.0\): merge the float network"):
        dslib.find_sites(tiny, 32)


@torch.no_grad()
def test_weights_shared_or_not_contiguous_or_in_train_mode(tiny):
    a, b = tiny.blocks[0], tiny.blocks[2]
    b.expand = nn.Conv2d(6, 8, 1).double()
    a.project.weight = nn.Parameter(torch.randn(6, 4, 1, 1).double().transpose(0, 1))
    tiny.blocks[1].expand.weight = a.expand.weight  # one parameter in two blocks
    mask = dslib.find_sites(tiny, 32).mask([])
    small = dslib.shrink(tiny.train(), mask)
    merged = dslib.merge(small)
    assert merged.training
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(merged.eval()(x), small.eval()(x))
