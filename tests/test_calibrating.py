"""Calibration: least squares from images alone; and planning with it."""

import copy

import pytest
import torch
from conftest import Block, build, maps_after, photos, randomise_batchnorm, relative_norm
from torch import nn

import dslib
from dslib import calibrating as calibration
from dslib.algebra.tracing import trace
from dslib.calibrating import Calibrate, calibrate
from dslib.errors import BadConfig, BadData, DslibError, NotMergeable
from dslib.fitting.layers import Opened, last_convolution
from dslib.fitting.least_squares import Sums, pick
from dslib.fitting.replaying import Replay, Rest, Skip

SHAPES = {
    "plain": {},
    "stride": {"stride": 2},
    "dilation": {"dilation": 2},
    "groups": {"groups": 2},
    "uneven": {"kernel_size": (1, 5), "padding": (0, 2)},
    "none": {"padding": 0},
    "same": {"padding": "same"},
}


class Straight(nn.Module):
    """A block whose activation never bends these inputs, so that one convolution can be all of it."""

    def __init__(self, **options):
        super().__init__()
        groups = options.get("groups", 1)
        self.a = nn.Conv2d(4, 8, **({"kernel_size": 3, "padding": options.get("dilation", 1), "bias": False} | options))
        self.bn_a, self.b, self.bn_b = nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1, groups=groups), nn.BatchNorm2d(4)
        self.act = nn.Hardtanh(-1e6, 1e6)
        self.residual = self.a(torch.zeros(1, 4, 12, 12)).shape[2:] == (12, 12)

    def forward(self, x):
        y = self.bn_b(self.b(self.act(self.bn_a(self.a(x)))))
        return y + x if self.residual else y


@pytest.mark.parametrize("name", SHAPES)
def test_what_is_a_convolution_is_found_exactly(name):
    block = Straight(**SHAPES[name])
    model = randomise_batchnorm(nn.Sequential(nn.Conv2d(3, 4, 1), block, nn.Flatten(), nn.LazyLinear(5))).double()
    x = photos(48, 12)
    model(x)
    model.eval()
    done = calibrate(model, dslib.Mask({"1": False}), x, Calibrate(ridge=1e-12))
    torch.testing.assert_close(done.model(x), model(x), rtol=0, atol=1e-6)
    assert done.errors["1"] < 1e-4
    assert done.model[1].conv.groups == SHAPES[name].get("groups", 1)


def test_sums_are_least_squares():
    """Against torch's own, over all positions and a few."""
    conv = nn.Conv2d(2, 3, 3, 2, 1).double()
    x, wanted = torch.randn(6, 2, 9, 9, dtype=torch.float64), torch.randn(6, 3, 5, 5, dtype=torch.float64)
    for positions in (100, 4):
        sums = Sums(conv, positions, seed=1)
        for i in range(2):
            part = slice(3 * i, 3 * i + 3)
            sums.add(x[part], torch.zeros_like(wanted[part]), pick(wanted[part], positions, 1, i), i)
        weight, bias, error = sums.solve(1e-13)
        a = torch.cat([nn.functional.unfold(p, 3, padding=1, stride=2) for p in x.split(3)])
        rows = torch.cat([pick(p.unflatten(2, (5, 5)), positions, 1, i) for i, p in enumerate(a.split(3))])
        y = torch.cat([pick(p, positions, 1, i) for i, p in enumerate(wanted.split(3))])
        expected = torch.linalg.lstsq(torch.cat([rows, torch.ones(len(rows), 1)], 1), y).solution
        torch.testing.assert_close(weight.reshape(3, -1).T, expected[:-1], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(bias, expected[-1], rtol=1e-5, atol=1e-6)
        left = y - torch.cat([rows, torch.ones(len(rows), 1)], 1) @ expected
        assert error == pytest.approx((left.norm() / (y - y.mean(0)).norm()).item(), rel=1e-4)


def test_the_error_left_over_counts_the_ridge():
    conv = nn.Conv2d(4, 6, 3, padding=1, groups=2).double()
    x, wanted = torch.randn(20, 4, 6, 6, dtype=torch.float64), torch.randn(20, 6, 6, 6, dtype=torch.float64) + 2
    sums = Sums(conv, 100, seed=0)
    sums.add(x, torch.zeros_like(wanted), pick(wanted, 100, 0, 0), 0)
    weight, bias, error = sums.solve(0.5)
    left = wanted - nn.functional.conv2d(x, weight, bias, padding=1, groups=2)
    assert error == pytest.approx((left.norm() / (wanted - wanted.mean((0, 2, 3), keepdim=True)).norm()).item())


@pytest.mark.filterwarnings("ignore:.* fewer positions than .* weights to fit")
@torch.no_grad()
@pytest.mark.parametrize("name", ["tiny", "timm/resnet18", "timm/tf_mobilenetv3_small_minimal_100"])
def test_calibrated_is_nearer_than_torn_out(name, tiny):
    size = 32 if name == "tiny" else 64
    narrow = {"channels": (8, 12, 16, 24)} if "resnet" in name else {}
    model, x = tiny if name == "tiny" else build(name, **narrow), photos(48, size)
    sites = dslib.find_sites(model, size)
    mask = sites.mask(sites.names[2:])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    last = sites.names[-1]
    expected = maps_after(model, last, x)
    torn = relative_norm(maps_after(dslib.merge(dslib.shrink(model, mask, None, size)), last, x), expected)
    alone, adjusted = (calibrate(model, mask, x, Calibrate(refit=refit)) for refit in (False, True))
    assert set(alone.errors) == set(mask.removed)
    assert all(0 < error < 1 for error in alone.errors.values())
    found = relative_norm(maps_after(alone.model, last, x), expected)
    assert found < torn
    refitted = relative_norm(maps_after(adjusted.model, last, x), expected)
    assert refitted < (1.001 * found if name == "tiny" else 0.999 * found)  # tiny's is as good without
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert set(adjusted.model.state_dict()) == set(dslib.merge(dslib.shrink(model, mask, None, size)).state_dict())


class Skipping(nn.Module):
    """`late` reads what `early` gave, by a weight that is zero; `block` comes between."""

    def __init__(self, skips):
        super().__init__()
        self.early, self.block, self.late, self.skips = nn.Conv2d(3, 3, 1), Block(3, c_out=3), nn.Conv2d(3, 3, 1), skips
        nn.init.zeros_(self.late.weight)

    def forward(self, x):
        early = self.early(x)
        y = self.block(early)
        return y + self.late(early if self.skips else y)


@torch.no_grad()
@pytest.mark.parametrize("skips", [False, True])
def test_what_comes_before_is_replayed_unless_something_else_reads_it(skips):
    model = randomise_batchnorm(Skipping(skips)).eval()
    parts = photos(12, 8).float().split(5)
    expected = [model(part) for part in parts]
    rest = Rest(model)
    assert not rest.begin_after("block", iter(parts), 12, most=12 * 3 * 8 * 8 * 4 - 1)
    assert rest.begin_after("block", iter(parts), 12) is not skips
    assert isinstance(model.block, Replay) is not skips
    assert isinstance(model.early, Skip) is not skips
    for i, part in enumerate(parts):
        assert torch.equal(rest.at(i)(part), expected[i])
        if not skips:
            assert torch.equal(rest.at(i)(torch.zeros_like(part)), expected[i])


@torch.no_grad()
def test_replaying_changes_nothing(tiny, monkeypatch):
    x = photos()
    mask = dslib.find_sites(tiny, 32).mask(["blocks.1"])
    replayed, begin_after = [], Rest.begin_after
    monkeypatch.setattr(Rest, "begin_after", lambda *given: replayed.append(begin_after(*given)))
    first = calibrate(tiny, mask, x)
    assert replayed == [True, True]
    monkeypatch.setattr(Rest, "begin_after", lambda *_: False)
    again = calibrate(tiny, mask, x)
    for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_the_same_twice_and_without_holding_all_targets(tiny, monkeypatch):
    x = photos()
    mask = dslib.find_sites(tiny, 32).mask(["blocks.2"])
    first = calibrate(tiny, mask, x, Calibrate(positions=5000, batch_size=32))
    share = calibration.in_shares
    monkeypatch.setattr(calibration, "in_shares", lambda *a: share(*a, most=1))  # one layer at a time
    again = calibrate(tiny, mask, x, Calibrate(positions=5000, batch_size=32))
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True))
    other = calibrate(tiny, mask, x, Calibrate(positions=5000, batch_size=32, seed=1))
    assert not torch.equal(first.model.blocks[0].conv.weight, other.model.blocks[0].conv.weight)


@torch.no_grad()
def test_a_run_becomes_one_fitted_convolution(tiny):
    x = photos()
    plan = dslib.Plan(dslib.find_sites(tiny, 32).mask(["blocks.2"]), (("blocks.0", "blocks.1"),))
    done = calibrate(tiny, plan, x)
    assert isinstance(done.model.blocks[1], nn.Identity)
    assert done.model.blocks[0].conv.kernel_size == (7, 7)
    torn = dslib.merge(dslib.shrink(tiny, plan))
    assert relative_norm(done.model(x), tiny(x)) < relative_norm(torn(x), tiny(x))


@torch.no_grad()
def test_what_follows_a_dropped_block_is_adjusted(tiny):
    """Nothing is to be fitted of the block itself; blocks before it stay as they are."""
    x = photos(48)
    sites = dslib.find_sites(tiny, 32)
    for dropped, changed in (("blocks.0", True), ("blocks.2", False)):
        plan = dslib.Plan(sites.mask([name for name in sites.names if name != dropped]), dropped=[dropped])
        small, errors = calibrate(tiny, plan, x, progress=False)
        assert errors == {}
        assert isinstance(small.get_submodule(dropped), nn.Identity)
        plain = dslib.shrink(tiny, plan)
        state = plain.state_dict()
        assert changed == any(not torch.equal(value, state[name]) for name, value in small.state_dict().items())
        if changed:
            far, near = (relative_norm(net.blocks(net.stem(x)), tiny.blocks(tiny.stem(x))) for net in (plain, small))
            assert near < 0.7 * far


@torch.no_grad()
def test_kept_blocks_get_the_originals_mean_and_spread(tiny):
    x = photos()
    mask = dslib.find_sites(tiny, 32).mask(["blocks.1", "blocks.2"])
    configs = (Calibrate(match=match, positions=10**7, batch_size=len(x)) for match in (True, False))
    matched, alone = (calibrate(tiny, mask, x, config).model for config in configs)
    wanted, found, unmatched = (
        maps_after(net, "blocks.1.bn2", x).transpose(0, 1).flatten(1) for net in (tiny, matched, alone)
    )
    for moment in (torch.mean, torch.std):
        torch.testing.assert_close(moment(found, 1), moment(wanted, 1), rtol=1e-9, atol=1e-9)
        assert relative_norm(moment(unmatched, 1), moment(wanted, 1)) > 1e-4


@torch.no_grad()
def test_the_ridge_is_chosen_on_images_held_back():
    """Noise to be fitted to: what helps on the images seen does not on others, so the change is kept small."""
    conv = nn.Conv2d(20, 3, 3, padding=1).double()
    x, noise = torch.randn(40, 20, 4, 4, dtype=torch.float64), torch.randn(40, 3, 4, 4, dtype=torch.float64)
    for wanted, least, most in ((noise, 0, 0.1), (conv(x) - conv.bias[:, None, None], 0.99, 1.001)):
        held, given = Sums(conv, 100, 0, tries=6), Sums(conv, 100, 0)
        for sums in (held, given):
            sums.add(x, torch.zeros_like(wanted), pick(wanted, 100, 0, 0), 0)
            assert sums.is_finite()
        (chosen, _, _), (smallest, _, _) = held.solve(1e-3), given.solve(1e-3)
        assert least <= chosen.norm() / smallest.norm() <= most
    x[-1, 0, 0, 0] = torch.nan
    spoilt = Sums(conv, 100, 0, tries=6)
    spoilt.add(x, torch.zeros_like(noise), pick(noise, 100, 0, 0), 0)
    assert not spoilt.is_finite()


def test_last_convolutions():
    expected = {
        "mobilenet_v2": ("features.2", ("conv.2", "conv.3")),
        "resnet18": ("layer2.0", ("conv2", "bn2")),
        "timm/resnet50d": ("layer2.0", ("conv3", "bn3")),
        "mobilenet_v3_large": ("features.4", ("block.3.0", "block.3.1")),
    }
    for name, (block, found) in expected.items():
        body = Opened(trace(build(name).get_submodule(block))).body
        assert last_convolution(body) == found


@torch.no_grad()
def test_a_channel_that_batchnorm_switched_off_stays_off(tiny):
    x = photos()
    tiny.blocks[1].bn3.weight[2] = 0
    done = calibrate(tiny, dslib.find_sites(tiny, 32).mask(["blocks.1", "blocks.2"]), x)
    assert all(p.isfinite().all() for p in done.model.parameters())
    kept = done.model.blocks[1]
    assert torch.equal(kept.project.weight[2], tiny.blocks[1].project.weight[2])
    assert not torch.equal(kept.project.weight[1], tiny.blocks[1].project.weight[1])


def test_bad_images_are_refused(tiny):
    mask, x = dslib.find_sites(tiny, 32).mask([]), photos(8)
    spoilt = x.clone()
    spoilt[3, 0, 0, 0] = torch.nan
    for images, text in (
        (spoilt, "NaN or infinite"),
        (x[:, :1], r"shape \(N, 3, S, S\)"),
        (x[..., :8], r"shape \(N, 3, S, S\)"),
        (x.byte(), "normalised floats"),
        (x[:0], "found none"),
    ):
        with pytest.raises(BadData, match=text):
            calibrate(tiny, mask, images)
    with pytest.raises(BadConfig, match="found list"):
        calibrate(tiny, mask, [x])
    for field in ("ridge", "ridges", "positions", "batch_size"):
        with pytest.raises(BadConfig, match=f"{field}: expected"):
            Calibrate(**{field: 0})


@torch.no_grad()
def test_few_and_constant_images_give_finite_weights_and_a_warning(tiny):
    mask = dslib.find_sites(tiny, 32).mask(["blocks.2"])
    with pytest.warns(
        UserWarning, match="^1 images have fewer positions than some .* to fit: give more images"
    ) as told:
        done = calibrate(tiny, mask, photos(1, 16))
    assert len(told) == 1
    assert all(p.isfinite().all() for p in done.model.parameters())
    done = calibrate(tiny, mask, torch.ones(64, 3, 32, 32, dtype=torch.float64))
    assert all(p.isfinite().all() for p in done.model.parameters())


def test_weights_that_are_not_finite_and_maps_that_are_too_large_are_named(tiny):
    mask = dslib.find_sites(tiny, 32).mask(["blocks.1", "blocks.2"])
    spoilt = copy.deepcopy(tiny)
    spoilt.blocks[1].bn2.running_var[0] = torch.nan
    with pytest.raises(NotMergeable, match=r"blocks\.1\.bn2\.running_var holds NaN or infinity"):
        calibrate(spoilt, mask, photos())
    with torch.no_grad():
        tiny.stem[1].weight.mul_(1e25)  # finite, but its square is not in float32
    with pytest.raises(DslibError, match=r"blocks\.0: what it reads or gives is too large"):
        calibrate(tiny.float(), mask, photos())
