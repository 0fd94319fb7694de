"""Which blocks of which networks are sites; masks."""

import copy

import pytest
import torch
from conftest import network
from torch import nn

import dslib
from dslib.algebra.blocks import site_names
from dslib.algebra.forward import in_channels
from dslib.algebra.tracing import trace
from dslib.errors import BadConfig, BadRecord, MaskMismatch

# model name -> sites, mergeable, foldable, part of the reason of those that are not mergeable
TABLE = {
    "torchvision/mobilenet_v2": (17, 17, 0, ""),
    "torchvision/resnet18": (8, 8, 0, ""),
    "torchvision/resnet50": (16, 16, 0, ""),
    "torchvision/efficientnet_b0": (16, 0, 0, "avgpool (AdaptiveAvgPool2d)"),
    "torchvision/mobilenet_v3_large": (15, 7, 0, "avgpool (AdaptiveAvgPool2d)"),
    "torchvision/mnasnet1_0": (16, 16, 0, ""),
    "timm/mobilenetv2_140": (17, 17, 0, ""),
    "timm/efficientnet_lite0": (16, 16, 0, ""),
    "timm/tf_efficientnet_lite0": (16, 16, 0, ""),
    "timm/repvgg_a0": (0, 0, 22, ""),
    "torchvision/vgg16_bn": (0, 0, 0, ""),
    "torchvision/densenet121": (58, 0, 0, "not one feature map"),
}


@pytest.mark.parametrize("name", TABLE)
def test_site_counts(name):
    """Of those with many weights on the `meta` device: there is then no check that a block's graph is its code."""
    total, mergeable, foldable, reason = TABLE[name]
    with torch.device("meta" if name.endswith(("vgg16_bn", "densenet121", "resnet50")) else "cpu"):
        model = dslib.load_model(name).model
    sites = dslib.find_sites(model, 64)
    assert (len(sites), len(sites.mergeable), len(sites.foldable)) == (total, mergeable, foldable)
    assert all(reason in site.reason for site in sites if not site.mergeable)
    assert all(site.reason == "" for site in sites if site.mergeable)


def test_a_site_knows_its_merged_shape_without_weights():
    site = dslib.find_sites(copy.deepcopy(network("resnet18")[0]).to("meta"), 224)[2]
    assert (site.name, site.input_shape, site.c_out) == ("layer2.0", (64, 56, 56), 128)
    assert (site.kernel, site.stride, site.activation_at_end) == ((7, 7), (2, 2), True)


def test_finding_sites_changes_nothing(tiny):
    before = {name: value.clone() for name, value in tiny.state_dict().items()}
    sites = dslib.find_sites(tiny.train(), 32)
    assert sites.names == ("blocks.0", "blocks.1", "blocks.2")
    assert tiny.training
    assert all(torch.equal(value, before[name]) for name, value in tiny.state_dict().items())


def test_the_table_prints_names_and_reasons(tiny):
    text = repr(dslib.find_sites(tiny, 32))
    assert "blocks.1" in text
    assert "5x5" in text
    assert "foldable" in repr(dslib.find_sites(dslib.load_model("repvgg_a0").model, 64))


@pytest.mark.parametrize("name", ["mobilenet_v2", "timm/efficientnet_lite0", "resnet18"])
def test_a_traced_block_is_the_block(name):
    """In eval the same outputs; in train BatchNorm statistics move; state keys equal."""
    model, sites = network(name)
    shapes = {site.name: site.input_shape for site in sites}
    for site in site_names(model)[:3]:
        block = copy.deepcopy(model.get_submodule(site))
        traced = trace(block, site)
        assert set(traced.state_dict()) == set(block.state_dict())
        x = torch.randn(2, *shapes[site], dtype=torch.float64)
        block.eval(), traced.eval()
        assert torch.equal(traced(x), block(x))
        before = [b.clone() for b in traced.buffers()]
        traced.train()(x)
        assert any(not torch.equal(a, b) for a, b in zip(before, traced.buffers(), strict=True))


class Dynamic(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))

    def forward(self, x):
        return self.body(x) if x.sum() > 0 else x


class Constant(Dynamic):
    def forward(self):
        return self.body(torch.ones(1, 3, 4, 4))


class Holding(nn.Module):
    def __init__(self):
        super().__init__()
        self.constant = Constant()

    def forward(self, x):
        return self.constant() + x.mean()


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (nn.Sequential(Dynamic(), nn.ReLU()), "Dynamic.forward cannot be traced"),
        (Holding(), "constant: Constant.forward takes no feature map"),
    ],
)
def test_a_block_that_cannot_be_traced_is_listed_with_its_reason(model, reason):
    sites = dslib.find_sites(model, 8)
    assert len(sites) == 1
    assert reason in sites[0].reason
    with pytest.raises(MaskMismatch, match="no mergeable site"):
        sites.check_k(1)


@pytest.mark.parametrize("k", [-1, 18, 2.0])
def test_k_out_of_range(k):
    with pytest.raises(MaskMismatch, match=f"expected 0 to 17 for this network, found {k}"):
        network()[1].check_k(k)


def test_images_too_small():
    with pytest.raises(BadConfig, match="does not run on 1 x 1 images"):
        dslib.find_sites(nn.Sequential(nn.Conv2d(3, 4, 3)), 1)
    with pytest.raises(BadConfig, match="image_size is in pixels"):
        dslib.find_sites(network()[0], -3)


def test_a_network_without_convolution():
    with pytest.raises(BadConfig, match="expected a CNN"):
        in_channels(nn.Linear(2, 2))


def test_masks_count_list_and_round_trip(tmp_path):
    mask = dslib.Mask({"a": True, "b": False, "c": True})
    assert (mask.k, mask.kept, mask.removed, len(mask)) == (2, ("a", "c"), ("b",), 3)
    assert dslib.Mask.load(mask.save(tmp_path / "mask.json")) == mask
    assert hash(dslib.Mask(dict(mask))) == hash(mask)
    assert "k=2 of 3" in repr(mask)


def test_masks_refuse_what_is_none(tmp_path, tiny):
    with pytest.raises(MaskMismatch, match="True \\(kept\\) or False"):
        dslib.Mask({"a": 1})
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(BadRecord, match="holds no mask"):
        dslib.Mask.load(tmp_path / "x.json")
    with pytest.raises(MaskMismatch, match="not sites of this network: \\['nowhere'\\]"):
        dslib.find_sites(tiny, 32).mask(["nowhere"])
