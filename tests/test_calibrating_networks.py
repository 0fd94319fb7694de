"""Calibration of networks that are put together in other ways."""

import copy

import pytest
import torch
from conftest import Block, build, maps_after, photos, randomise_batchnorm, relative_norm
from torch import nn

import dslib
from dslib.calibrating import Calibrate, calibrate
from dslib.errors import BadConfig, DslibError
from dslib.fitting.least_squares import Sums


class Row(nn.Module):
    """Blocks in a row, and a BatchNorm or not after each."""

    def __init__(self, *blocks, norm=False):
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, 4, 1), nn.ModuleList(blocks)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) if norm else nn.Identity() for _ in blocks)

    def forward(self, x):
        x = self.stem(x)
        for block, norm in zip(self.blocks, self.norms, strict=True):
            x = norm(block(x))
        return x


class InPlace(nn.Module):
    """Adds, in place or not, to what its last convolution reads."""

    def __init__(self, in_place=True):
        super().__init__()
        self.in_place = in_place
        self.a, self.bn_a = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.b, self.bn_b = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x):
        y = torch.relu(self.bn_a(self.a(x)))
        z = self.bn_b(self.b(y))
        if self.in_place:
            y += z
            return y
        return y + z


class TwoMaps(Row):
    """Its second block is called with two maps."""

    def forward(self, x):
        y = self.blocks[0](self.stem(x))
        return self.blocks[1](y, y)


@pytest.mark.filterwarnings("ignore:.* fewer positions than .* weights to fit")
@torch.no_grad()
def test_only_kept_blocks_within_reach_are_adjusted():
    model, x = build("mobilenet_v2", width_mult=0.25), photos(24, 32)
    names = dslib.find_sites(model, 32).names
    mask = dslib.Mask({name: name not in (names[3], names[7]) for name in names})
    done = calibrate(model, mask, x, Calibrate(reach=2)).model
    before = model.state_dict()
    changed = {
        name
        for name in names
        if mask[name]
        for key, value in done.state_dict().items()
        if key.startswith(f"{name}.") and not torch.equal(value, before[key])
    }
    assert changed == {names[4], names[5], names[8], names[9]}
    with pytest.raises(BadConfig, match="reach: expected 1 or more, found 0"):
        Calibrate(reach=0)


class Turned(nn.Module):
    """The block whose name comes first is called last."""

    def __init__(self):
        super().__init__()
        self.stem, self.last, self.first = nn.Conv2d(3, 4, 1), Block(), Block()

    def forward(self, x):
        return self.last(self.first(self.stem(x)))


@torch.no_grad()
def test_without_a_reach_the_order_of_names_does_not_matter():
    model = randomise_batchnorm(Turned()).double().eval()
    done = calibrate(model, dslib.Mask({"last": True, "first": False}), photos(64, 12)).model
    before = model.last.state_dict()
    assert any(not torch.equal(value, before[name]) for name, value in done.last.state_dict().items())


class Two(Block):
    """Takes one map or two."""

    def forward(self, x, shortcut=None):
        return super().forward(x) + (0 if shortcut is None else shortcut)


@torch.no_grad()
@pytest.mark.parametrize("case", ["norm after", "shared", "in place", "two maps"])
def test_networks_that_are_put_together_in_other_ways(case):
    x = photos(64, 12)
    second = {"in place": InPlace, "two maps": Two}.get(case, Block)()
    kind = TwoMaps if case == "two maps" else Row
    model = kind(Block(), second, norm=case == "norm after")
    if case == "shared":
        second.depthwise = model.blocks[0].depthwise
    model = randomise_batchnorm(model).double().eval()
    mask = dslib.Mask({"blocks.0": False, "blocks.1": True})
    torn = relative_norm(dslib.merge(dslib.shrink(model, mask))(x), model(x))
    expected = maps_after(model, "blocks.0", x)
    for refit in (False, True):
        done = calibrate(model, mask, x, Calibrate(refit=refit))
        assert relative_norm(done.model(x), model(x)) < torn
        found = maps_after(done.model, "blocks.0", x)
        assert relative_norm(found, expected) < 1
        if not refit:
            kept = model.blocks[1].state_dict()
            assert all(torch.equal(value, kept[key]) for key, value in done.model.blocks[1].state_dict().items())


@torch.no_grad()
def test_adding_in_place_changes_nothing():
    x, outputs = photos(64, 12), []
    model = randomise_batchnorm(Row(Block(), InPlace())).double().eval()
    for in_place in (True, False):
        model.blocks[1].in_place = in_place
        outputs.append(calibrate(model, dslib.Mask({"blocks.0": False, "blocks.1": True}), x).model(x))
    assert torch.equal(*outputs)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(tiny, dtype):
    mask, x = dslib.find_sites(tiny, 32).mask(["blocks.1", "blocks.2"]), photos().to(dtype)
    done = calibrate(copy.deepcopy(tiny).to(dtype), mask, x)
    exact = calibrate(tiny, mask, photos())
    assert done.errors["blocks.0"] == pytest.approx(exact.errors["blocks.0"], abs=0.05)
    assert all(p.dtype == dtype for p in done.model.parameters())


@torch.no_grad()
def test_a_removed_block_is_called_once():
    class Often(nn.Module):
        def __init__(self, times):
            super().__init__()
            self.stem, self.block, self.kept, self.times = nn.Conv2d(3, 4, 1), Block(), Block(), times

        def forward(self, x):
            x = self.stem(x)
            for _ in range(self.times):
                x = self.block(x)
            return self.kept(self.kept(x))

    mask, x = dslib.Mask({"block": False, "kept": True}), photos(16, 8)
    for times in (0, 2):
        with pytest.raises(BadConfig, match=f"block is called {times} times in a forward pass, expected once"):
            calibrate(Often(times).double().eval(), mask, x)
    model = randomise_batchnorm(Often(1)).double().eval()
    done = calibrate(model, mask, x)
    assert done.errors["block"] < 1
    assert torch.equal(done.model.kept.project.weight, model.kept.project.weight)  # called twice: left alone


@torch.no_grad()
def test_blocks_that_cannot_be_traced_or_adjusted_stay_as_they_are():
    class Odd(Block):
        def forward(self, x):
            y = super().forward(x)
            return y if x.sum() > 0 else -y

    model = randomise_batchnorm(nn.Sequential(nn.Conv2d(3, 4, 1), Block(), Odd())).double().eval()
    before = copy.deepcopy(model[2].state_dict())
    done = calibrate(model, dslib.Mask({"1": False, "2": True}), photos(16, 8))
    assert all(torch.equal(value, before[key]) for key, value in done.model[2].state_dict().items())


@torch.no_grad()
def test_too_little_memory_halves_the_batch(tiny, monkeypatch):
    mask, x = dslib.find_sites(tiny, 32).mask(["blocks.2"]), photos(32)
    expected = calibrate(tiny, mask, x, Calibrate(batch_size=8, positions=10**6))
    add = Sums.add

    def tight(self, read, *rest):
        if len(read) > 8:
            raise torch.OutOfMemoryError("32 GiB wanted")
        add(self, read, *rest)

    monkeypatch.setattr(Sums, "add", tight)
    with pytest.warns(UserWarning, match="begun again with 8 images a batch"):
        found = calibrate(tiny, mask, x, Calibrate(batch_size=16, positions=10**6))
    torch.testing.assert_close(found.model(x), expected.model(x))
    monkeypatch.setattr(Sums, "add", lambda *a: (_ for _ in ()).throw(torch.OutOfMemoryError("1 GiB wanted")))
    with pytest.warns(UserWarning), pytest.raises(DslibError, match="too little memory, even with one image"):
        calibrate(tiny, mask, x, Calibrate(batch_size=2))
