"""What an adversarial reading found: each of these was once merged wrongly, or crashed. Refused, or right."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from conftest import Wrapped, build, randomise_batchnorm
from torch import nn
from torch.nn.utils import parametrizations

import dslib
from dslib.algebra.merged_block import MergedBlock
from dslib.errors import BadConfig, BadModel, NotMergeable, NotTraceable


class Body(Wrapped):
    """A block whose forward is a function of it and its input."""

    def __init__(self, forward):
        super().__init__(nn.Identity())
        self.code, self.pool = forward, nn.AvgPool2d(3, 1, 1)
        self.alpha = nn.Parameter(torch.tensor(0.3))

    def forward(self, x):
        return self.code(self, x)

    def f(self, x):
        return super().forward(x)

    def inner(self, x):
        return torch.relu(self.bn_a(self.a(x)))

    def outer(self, y):
        return self.bn_b(self.b(y))


def network(forward) -> nn.Module:
    torch.manual_seed(1)
    return randomise_batchnorm(nn.Sequential(nn.Conv2d(3, 4, 1), Body(forward))).double().eval()


def dropped_result(self, x):
    y = self.f(x)
    y.add_(x)
    return y


def alias(self, x):
    y = self.f(x)
    z = y
    y += 1
    return z + y


def writes_input(self, x):
    x += 1
    return self.f(x)


def through_identity(self, x):
    y = self.outer(self.inner(x))
    return F.relu_(self.between(y)) + y


@pytest.mark.parametrize("forward", [dropped_result, through_identity])
def test_writing_into_a_map_that_is_read_again_is_refused(forward):
    with pytest.raises(NotTraceable, match="writes into a map that is read again: set inplace=False"):
        dslib.shrink(network(forward), dslib.Mask({"1": False}))


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (alias, "computes something else than its code"),
        (writes_input, "writes into"),
        (dropped_result, "writes into a map"),
    ],
)
def test_what_a_graph_does_not_show_is_found_by_running_it(forward, reason):
    site = dslib.find_sites(network(forward), 12)[0]
    assert not site.mergeable
    assert reason in site.reason


class OwnActivation(nn.Module):
    def forward(self, x):
        return F.relu(x)


class Strided(nn.Module):
    def forward(self, x):
        return F.avg_pool2d(x, 2)


REFUSED = {
    "own activation": (
        lambda s, x: s.outer(s.between(s.inner(x))),
        OwnActivation(),
        "OwnActivation.*relu: is not affine",
    ),
    "own stride": (lambda s, x: s.outer(s.between(s.a(x))), Strided(), "computes over several pixels in its own code"),
    "pool twice": (lambda s, x: s.outer(s.pool(s.pool(s.inner(x)))), nn.Identity(), "pool .*is called twice"),
    "sizes": (lambda s, x: s.outer(F.avg_pool2d(s.inner(x), x.size(2))), nn.Identity(), "reads the map's size"),
    "last axis": (lambda s, x: s.outer(s.inner(x)[..., :8]), nn.Identity(), "only channels can be sliced"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name):
    forward, between, text = REFUSED[name]
    model = network(forward)
    model[1].between = between
    with pytest.raises(NotMergeable, match=text):
        dslib.shrink(model, dslib.Mask({"1": False}))


RIGHT = {
    "gate of a parameter": lambda s, x: s.outer(s.inner(x) * torch.tanh(s.gain)) + torch.sigmoid(s.alpha) * x,
    "computed gain": lambda s, x: s.outer(s.inner(x) * s.gain.abs()) + x,
    "train flag": lambda s, x: s.outer(s.inner(x)) * (5 if s.training else 1),
    "padded tail": lambda s, x: s.pool(torch.relu(s.outer(s.inner(x)))),
}


@pytest.mark.parametrize("name", RIGHT)
@torch.no_grad()
def test_merged_rightly(name, monkeypatch):
    """Against the layers everywhere, and against the block's own code inside, its inner ReLU the identity."""
    model = network(RIGHT[name])
    small = dslib.shrink(model.train() if name == "train flag" else model, dslib.Mask({"1": False})).eval()
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    torch.testing.assert_close(dslib.merge(small)(x), small(x), rtol=0, atol=1e-12)
    monkeypatch.setattr(Body, "inner", lambda s, x: s.bn_a(s.a(x)))
    expected = model.eval()(x)
    assert expected.shape == small(x).shape
    torch.testing.assert_close(small(x)[..., 3:-3, 3:-3], expected[..., 3:-3, 3:-3], rtol=0, atol=1e-12)


class Loop(nn.Module):
    """Calls the blocks of a Sequential itself, and keeps what is between them."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.blocks = nn.Sequential(Body(Body.f), Body(Body.f))

    def forward(self, x):
        x, between = self.stem(x), []
        for block in self.blocks:
            x = block(x)
            between.append(x)
        return sum(between)


def test_a_run_whose_inside_is_read_is_refused():
    model = Loop().double().eval()
    plan = dslib.Plan(dslib.find_sites(model, 16).mask([]), [["blocks.0", "blocks.1"]])
    with pytest.raises(BadConfig, match=r"cannot be merged together: \['blocks'\] is called 0 times"):
        dslib.shrink(model, plan, image_size=16)
    assert hash(plan) == hash(dslib.Plan(plan.mask, (("blocks.0", "blocks.1"),)))


def test_computed_weights_are_refused_by_name(tiny):
    parametrizations.weight_norm(tiny.blocks[1].project)
    for look in (lambda: dslib.find_sites(tiny, 32), lambda: dslib.fold(tiny, torch.zeros(1, 3, 32, 32).double())):
        with pytest.raises(BadModel, match=r"computed from others \(blocks\.1\.project\).*remove_parametrizations"):
            look()


class TwoReaders(nn.Module):
    """A convolution that a BatchNorm reads, and an add behind a tiny scale: a fold would hide in the tolerance."""

    def __init__(self, returned=False):
        super().__init__()
        self.conv, self.bn, self.returned = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), returned

    def forward(self, x):
        y = self.conv(x)
        return {"y": y, "z": self.bn(y)} if self.returned else self.bn(y) + 1e-5 * y


@pytest.mark.parametrize("returned", [False, True])
@torch.no_grad()
def test_a_batchnorm_is_folded_only_if_nothing_else_reads_the_convolution(returned):
    model = randomise_batchnorm(TwoReaders(returned)).double().eval()
    x = torch.randn(1, 3, 4, 4, dtype=torch.float64)
    folded = dslib.fold(model, x)
    assert isinstance(folded.bn, nn.BatchNorm2d)
    torch.testing.assert_close(folded(x), model(x), rtol=0, atol=0)


def test_folding_works_in_inference_mode_and_names_damaged_weights(tiny):
    with torch.inference_mode():
        x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
        folded = dslib.fold(tiny, x)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    with torch.no_grad():
        tiny.stem[0].weight[0] = float("nan")
    with pytest.raises(dslib.DslibError, match="output is not finite"):
        dslib.fold(tiny, torch.zeros(1, 3, 32, 32, dtype=torch.float64))


def test_a_train_method_that_returns_nothing():
    """Some of timm's networks have one."""
    assert dslib.find_sites(dslib.load_model("timm/levit_conv_128s").model, 224) is not None


@torch.no_grad()
def test_names_with_dots_do_not_overwrite_each_other(tmp_path):
    model = build("resnet18").float()
    mask = dslib.find_sites(model, 32).mask([])
    plan = dslib.Plan(mask, [("layer1.0", "layer1.1")])
    recipe = dslib.Recipe("resnet18", tuple(map(str, range(1000))), 32, {}, dict(mask), runs=plan.runs)
    dslib.save(tmp_path / "net-0.5", dslib.shrink(model, plan), recipe)
    dslib.save(tmp_path / "net-0.25", model, dslib.Recipe("resnet18", tuple(map(str, range(1000))), 32))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "net-0.25.json",
        "net-0.25.safetensors",
        "net-0.5.json",
        "net-0.5.safetensors",
    ]
    assert dslib.load(tmp_path / "net-0.5")[1] == recipe


@torch.no_grad()
def test_a_pickled_shrunk_network_still_merges(tiny):
    """Pickled, copied, and pickled again."""
    small = dslib.shrink(tiny, dslib.find_sites(tiny, 32).mask([]))
    again = copy.deepcopy(pickle.loads(pickle.dumps(small)))
    merged = dslib.merge(pickle.loads(pickle.dumps(again)))
    assert not dslib.unmerged(merged)
    assert isinstance(merged.blocks[0], MergedBlock)
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(merged(x), small(x))
