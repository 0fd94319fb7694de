"""Shrink and merge: against each other, and against a linear system's impulse response."""

import copy
import itertools
import random

import pytest
import torch
from conftest import Block, network, randomise_batchnorm, relative, removing
from torch import nn

import dslib
from dslib.algebra.linear import linear_blocks
from dslib.algebra.padding import InteriorBatchNorm2d, PaddingBatchNorm2d
from dslib.errors import MaskMismatch, NotMergeable
from dslib.merging import merge_blocks, shrunk_blocks
from dslib.shrinking import set_fade, settle

MODELS = (
    "mobilenet_v2",
    "resnet18",
    "torchvision/mobilenet_v3_large",
    "torchvision/mnasnet0_5",
    "timm/mobilenetv2_140",
    "timm/efficientnet_lite0",
    "timm/tf_efficientnet_lite0",
    "resnet50",
)


def linear_block(block: nn.Module, input_shape: tuple[int, int, int] | None = None) -> nn.Module:
    return linear_blocks([block], ["block"], [input_shape])[0]


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_merged_equals_shrunk(name):
    """To 1e-10 of the largest output in float64, borders included, for random masks and an even and an odd size.

    Of the ResNets only the two cheaper stages and the first block of the third: the rest is the same, and takes long.
    """
    model, sites = network(name)
    pick = random.Random(name)
    some = [n for n in sites.mergeable if not n.startswith(("layer3.1", "layer3.2", "layer3.3", "layer3.4", "layer4"))]
    for _ in range(4):
        mask = removing(sites, *pick.sample(some, pick.randrange(1, min(len(some), 8))))
        for size in (64, 75):
            if size == 64 or "tf_" in name:  # whose padding depends on the size
                small = dslib.shrink(model, mask, nn.ReLU6, size)
                merged = dslib.merge(small)
            x = torch.randn(2, 3, size, size, dtype=torch.float64)
            assert relative(merged(x), small(x)) < 1e-10
        assert not dslib.unmerged(merged)
        assert set(small.state_dict()) == set(model.state_dict())


@pytest.mark.parametrize(
    "block",
    [
        Block(),
        Block(stride=2),
        Block(k=5, bias=True),
        Block(c_out=6, k=3, padding=0),
        Block(k=7, stride=2, c_out=5, bias=True),
    ],
)
@torch.no_grad()
def test_the_merged_kernel_is_the_impulse_response(block):
    """An independent oracle: f(basis image) - f(0), read off pixel by pixel."""
    block = randomise_batchnorm(block).double().eval()
    linear = linear_block(block, (4, 16, 16))
    conv = merge_blocks([linear]).conv
    zero = linear(torch.zeros(1, 4, 17, 17, dtype=torch.float64))
    k, stride = conv.kernel_size[0], conv.stride[0]
    centre = (zero.shape[2] // 2) * stride  # the input pixel under the first tap of the middle output, padding aside
    for channel, v, h in itertools.product(range(4), range(k), range(k)):
        x = torch.zeros(1, 4, 17, 17, dtype=torch.float64)
        x[0, channel, centre + v - conv.padding[0], centre + h - conv.padding[1]] = 1
        response = (linear(x) - zero)[0, :, zero.shape[2] // 2, zero.shape[3] // 2]
        torch.testing.assert_close(conv.weight[:, channel, v, h], response, rtol=0, atol=1e-12)
    middle = zero[0, :, zero.shape[2] // 2, zero.shape[3] // 2]
    torch.testing.assert_close(conv.bias, middle, rtol=0, atol=1e-12)


@torch.no_grad()
def test_arguments_stay_as_they_were(tiny):
    before = copy.deepcopy(tiny.state_dict())
    text = repr(tiny)
    small = dslib.shrink(tiny, dslib.find_sites(tiny, 32).mask([]), nn.ReLU6)
    shrunk_text = repr(small)
    merged = dslib.merge(small)
    merged.blocks[0].conv.weight.zero_()
    assert repr(tiny) == text
    assert repr(small) == shrunk_text
    assert all(torch.equal(value, before[name]) for name, value in tiny.state_dict().items())
    assert all(torch.equal(value, before[name]) for name, value in small.state_dict().items())


@pytest.mark.parametrize(("name", "kind"), [("mobilenet_v2", PaddingBatchNorm2d), ("resnet18", InteriorBatchNorm2d)])
def test_batch_statistics_do_not_see_the_padding(name, kind):
    """In train, the first BatchNorm of a hoisted block tracks exactly what it tracks unhoisted."""
    model, sites = network(name)
    site = sites[3]
    block = copy.deepcopy(model.get_submodule(site.name)).train()
    linear = linear_block(copy.deepcopy(block), site.input_shape)
    hoisted = {n: m for n, m in linear.named_modules() if isinstance(m, InteriorBatchNorm2d)}
    assert [type(m) for m in hoisted.values()] == [kind]
    x = torch.randn(4, *site.input_shape, dtype=torch.float64)
    block(x), linear(x)
    for bn_name, bn in hoisted.items():
        plain = block.get_submodule(bn_name)
        torch.testing.assert_close(bn.running_mean, plain.running_mean)
        torch.testing.assert_close(bn.running_var, plain.running_var)
        assert bn.num_batches_tracked == plain.num_batches_tracked == 1


def test_statistics_of_a_bfloat16_map_are_taken_in_float32():
    """Channel mean 10 and deviation 1: bfloat16 cannot tell 10.005 from 10."""
    x = (10 + torch.randn(8, 4, 16, 16)).bfloat16()
    ours, theirs = InteriorBatchNorm2d(4), nn.BatchNorm2d(4)
    ours(x), theirs(x)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.running_var, theirs.running_var, rtol=1e-5, atol=0)


@pytest.mark.parametrize("bias", [False, True])
def test_padding_batchnorm_is_batchnorm_of_a_padded_input_in_train_too(bias):
    """Output and gradients equal those of padding first and normalising by the interior's statistics."""
    conv = nn.Conv2d(3, 5, 1, bias=bias).double()
    padding, interior = PaddingBatchNorm2d(5).double(), InteriorBatchNorm2d(5).double()
    padding.ring = interior.ring = (1, 2, 0, 1)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    seed = torch.randn(2, 5, 7, 9, dtype=torch.float64)
    results = []
    for run in (lambda: padding(conv(x), conv.bias), lambda: interior(conv(nn.functional.pad(x, padding.ring)))):
        conv.zero_grad()
        y = run()
        (y * seed).sum().backward()
        results.append((y.detach(), *[p.grad.clone() for p in conv.parameters()]))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@torch.no_grad()
def test_the_residual_is_an_identity_kernel():
    """Zero the block's weights: what is merged is the Dirac kernel."""
    block = Block().double().eval()
    for p in block.parameters():
        p.zero_()
    conv = merge_blocks([linear_block(block)]).conv
    dirac = torch.zeros(4, 4, 3, 3, dtype=torch.float64)
    dirac[range(4), range(4), 1, 1] = 1
    assert torch.equal(conv.weight, dirac)


def test_the_merged_convolution_inherits(tiny):
    mask = dslib.find_sites(tiny, 32).mask(["blocks.1"])
    small = dslib.shrink(tiny, mask).float().to(memory_format=torch.channels_last).train()
    small.requires_grad_(False)
    merged = dslib.merge(small)
    conv = merged.blocks[2].conv
    assert (conv.weight.dtype, merged.blocks[2].training, conv.weight.requires_grad) == (torch.float32, True, False)
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert {"blocks.2.conv.weight", "blocks.2.conv.bias"} <= set(merged.state_dict())


def test_merging_some(tiny):
    small = dslib.shrink(tiny, dslib.find_sites(tiny, 32).mask([]))
    assert set(dslib.unmerged(dslib.merge(small, only=["blocks.1"]))) == {"blocks.0", "blocks.2"}
    costs = dslib.unmerged(small)
    assert costs["blocks.0"].weights_linear == 4 * 6 + 6 * 9 + 6 * 4
    assert costs["blocks.0"].weights_merged == costs["blocks.0"].macs_merged == 4 * 4 * 9
    assert costs["blocks.1"].macs_linear == 4 * 6 * 4 + 6 * 25 + 6 * 6  # expand runs on four times the pixels
    cheap = dslib.merge(small, only=lambda cost: cost.weights_merged < 300)
    assert set(dslib.unmerged(cheap)) == {name for name, cost in costs.items() if cost.weights_merged >= 300}
    with pytest.raises(MaskMismatch, match="not removed sites of this network: \\['stem'\\]"):
        dslib.merge(small, only=["stem"])


def test_the_boundary_activation_goes_where_it_should():
    def bounded(name, boundary, *removed):
        model, sites = network(name)
        blocks = shrunk_blocks(dslib.shrink(model, removing(sites, *removed), boundary))
        assert set(blocks) == set(removed)
        return [name for name, block in blocks.items() if hasattr(block, "boundary")]

    first = ("features.1", "features.2", "features.3")
    assert bounded("mobilenet_v2", nn.ReLU6, *first) == ["features.2", "features.3"]  # not after the t=1 block
    assert bounded("resnet18", nn.ReLU6, "layer1.0", "layer2.0") == []  # a ReLU already ends each block
    assert bounded("mobilenet_v2", {"features.1": nn.GELU}, *first) == ["features.1"]


@torch.no_grad()
def test_any_module_may_be_the_boundary(tiny):
    class Swish(nn.Module):
        def forward(self, x):
            return x * torch.sigmoid(x)

    small = dslib.shrink(tiny, dslib.find_sites(tiny, 32).mask([]), Swish)
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    assert relative(dslib.merge(small)(x), small(x)) < 1e-12


@torch.no_grad()
def test_fading_goes_from_the_kept_to_the_shrunk_network(tiny):
    mask = dslib.find_sites(tiny, 32).mask(["blocks.1"])
    faded, small = dslib.fade(tiny, mask, nn.ReLU6), dslib.shrink(tiny, mask, nn.ReLU6)
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    with pytest.raises(NotMergeable, match="Fade"):
        dslib.merge(faded)
    set_fade(faded, 0.5)
    halfway = faded(x)
    set_fade(faded, 1.0)
    assert torch.equal(faded(x), small(x))
    assert not torch.equal(halfway, small(x))
    settled = settle(faded)
    assert torch.equal(settled(x), small(x))
    assert relative(dslib.merge(settled)(x), small(x)) < 1e-12
    assert set(settled.state_dict()) == set(tiny.state_dict())


@torch.no_grad()
def test_a_functional_dropout_stays_alive_and_merges():
    class Dropping(Block):
        def forward(self, x):
            return x + nn.functional.dropout(self.bn3(self.project(torch.relu(self.expand(x)))), 0.5, self.training)

    model = nn.Sequential(nn.Conv2d(3, 4, 1), Dropping()).double().train()
    small = dslib.shrink(model, dslib.Mask({"1": False}))
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert not torch.equal(small(x), small(x))
    small.eval()
    torch.testing.assert_close(dslib.merge(small)(x), small(x))


@pytest.mark.parametrize("act", [torch.relu_, nn.functional.relu_, lambda x: nn.functional.relu(x, True)])
@torch.no_grad()
def test_functional_activations_in_place_fade_too(act):
    class Functional(Block):
        def forward(self, x):
            return x + self.bn3(self.project(act(self.bn2(self.depthwise(self.expand(x))))))

    model = nn.Sequential(nn.Conv2d(3, 4, 1), Functional()).double().eval()
    faded = dslib.fade(model, dslib.Mask({"1": False}))
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    outputs = {}
    for t in (0, 0.5, 1):
        set_fade(faded, t)
        outputs[t] = faded(x)
    torch.testing.assert_close(outputs[0][..., 1:-1, 1:-1], model(x)[..., 1:-1, 1:-1])
    torch.testing.assert_close(outputs[0.5], (outputs[0] + outputs[1]) / 2)
