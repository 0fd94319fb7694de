"""Costs: MACs against formulas and the paper; latency's order and units; folding BatchNorm; profiles."""

import numpy as np
import pytest
import torch
from torch import nn

import dslib
from dslib.errors import BadConfig, BadRecord, DslibError, MaskMismatch
from dslib.measuring import Timing
from dslib.runtimes import prepare

# Fu et al. 2022, the masks of MobileNetV2-1.4: kept sites, whether the stem's activation is kept, MFLOPs published
PAPER = {
    "A": ((0, 3, 4, 6, 8, 10, 11, 13, 14, 15, 16), 519), "B": ((3, 4, 10, 11, 13, 14, 15, 16), 502),
    "C": ((0, 3, 10, 11, 13, 14, 15, 16), 492), "D": ((3, 4, 13, 14, 15, 16), 484),
    "E": ((0, 3, 13, 14, 15, 16), 474), "F": ((), 415),
}  # fmt: skip


@pytest.fixture(scope="module")
def mobilenet_140():
    return dslib.load_model("timm/mobilenetv2_140").model.eval()


@pytest.mark.parametrize("runtime", ["eager", "openvino"])
def test_runtimes_run_the_network_that_they_were_given(runtime):
    model, images = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval(), torch.randn(4, 3, 16, 16)
    run = prepare(model, images, runtime)
    found = run()
    first = found if isinstance(found, torch.Tensor) else torch.from_numpy(found[0].copy())
    torch.testing.assert_close(first, model(images), rtol=1e-4, atol=1e-5)
    timing = dslib.measure(
        {"one": model, "deep": nn.Sequential(*[nn.Conv2d(3, 3, 3, padding=1)] * 9)}, images, 3, runtime=runtime
    )
    assert timing.runtime.startswith(runtime)
    assert timing.runtime.endswith("float32")
    assert timing.median("one") > 0


def test_a_runtime_that_cannot_is_refused():
    model, images = nn.Conv2d(3, 8, 3), torch.randn(1, 3, 8, 8)
    for given, runtime, text in (
        (images, "tensorflow", "runtime: expected one of eager, openvino, found 'tensorflow'"),
        (images.double(), "openvino", r"expected float32 images on the CPU, found torch\.float64"),
    ):
        with pytest.raises(BadConfig, match=text):
            prepare(model.to(given.dtype), given, runtime)

    class Odd(nn.Module):
        def forward(self, x):
            return x + (7 if torch.jit.is_tracing() else 5)

    with pytest.raises(DslibError, match="openvino computes something else for Odd: it differs by"):
        prepare(Odd(), images, "openvino")


def published_flops(model: nn.Module) -> float:
    """The paper's convention: MACs plus five operations per BatchNorm output element, in millions."""
    elements = 0

    def count(_, __, output):
        nonlocal elements
        elements += output.numel()

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        model(torch.zeros(1, 3, 224, 224))
    for hook in hooks:
        hook.remove()
    return (dslib.count_macs(model, (3, 224, 224)) + 5 * elements) / 1e6


@pytest.mark.parametrize("letter", PAPER)
def test_the_papers_masks_have_the_published_mflops(mobilenet_140, letter):
    """Within 1 M. The t=1 block (site 0) is never merged in the paper, also where its activation is removed."""
    kept, published = PAPER[letter]
    sites = dslib.find_sites(mobilenet_140, 224)
    mask = sites.mask([site for i, site in enumerate(sites.names) if i in kept or i == 0])
    merged = dslib.merge(dslib.shrink(mobilenet_140, mask, nn.ReLU6))
    assert abs(published_flops(merged) - published) <= 1


def test_the_original_has_the_published_mflops(mobilenet_140):
    assert abs(published_flops(mobilenet_140) - 630) <= 1


def test_macs_and_parameters_of_one_convolution():
    conv = nn.Conv2d(4, 8, 3, 2, 1, groups=2)
    assert dslib.count_macs(conv, (4, 9, 9)) == 5 * 5 * 8 * 2 * 9
    assert dslib.count_parameters(conv) == 8 * 2 * 9 + 8


def test_latency_is_measured_in_turns_and_orders_networks():
    order = []

    class Noted(nn.Module):
        def __init__(self, name, work):
            super().__init__()
            self.name, self.work = name, work

        def forward(self, x):
            order.append(self.name)
            for _ in range(self.work):
                x = x @ x
            return x

    images = torch.randn(1, 1, 64, 64)
    timing = dslib.measure({"a": Noted("a", 2), "b": Noted("b", 200)}, images, rounds=5, warmup=1, at_least_ms=0)
    assert "".join(order[-10:]) == "ab" * 5
    assert timing.median("b") > timing.median("a") > 0
    assert timing.frame.loc["a", "images_per_s"] == pytest.approx(1e3 / timing.median("a"))
    ratio, low, high = timing.speedup("a", over="b")
    assert ratio > 1
    assert low <= high


def test_a_speedup_is_the_ratio_of_medians():
    timing = Timing({"a": np.array([1.0, 2, 3]), "b": np.array([2.0, 8, 6])}, 4, "cpu", "eager")
    assert timing.speedup("a", over="b") == (3.0, 2.0, 3.0)
    with pytest.raises(BadConfig, match="at least one network"):
        dslib.measure({}, torch.zeros(1, 3, 8, 8))


def test_a_profile_predicts_and_round_trips(tiny, tmp_path):
    model = tiny.float()
    sites = dslib.find_sites(model, 32)
    table = dslib.profile(model, sites, batch_size=2, boundary=nn.ReLU6, rounds=3)
    assert list(table.frame.columns) == ["kept_ms", "linear_ms", "merged_ms", "saving_ms"]
    assert (table.frame[["kept_ms", "linear_ms", "merged_ms"]] > 0).all(axis=None)
    assert list(table.frame.index) == list(sites.names)
    some = sites.mask(["blocks.0"])
    assert table.predict(some) == pytest.approx(table.total - table.savings["blocks.1"] - table.savings["blocks.2"])
    assert table.predict(sites.mask(sites.names)) == table.total
    assert dslib.CostTable.load(table.save(tmp_path / "cost.json")) == table
    with pytest.raises(MaskMismatch, match="no measured cost for \\['x'\\]"):
        table.predict(dslib.Mask({"x": False}))
    (tmp_path / "other.json").write_text('{"a": 1}')
    with pytest.raises(BadRecord, match="is not a cost table"):
        dslib.CostTable.load(tmp_path / "other.json")


def test_sites_that_are_slower_merged_are_not_worth_merging():
    table = dslib.CostTable(
        {"a": 3.0, "b": 3.0}, {"a": 2.0, "b": 2.0}, {"a": 1.0, "b": 4.0}, 9.0, 1, 32, "cpu", "eager"
    )
    mask = dslib.Mask({"a": False, "b": False})
    assert table.worth_merging(mask) == ("a",)
    assert table.savings == {"a": 2.0, "b": 1.0}
    assert table.predict(mask) == 6.0


def test_a_profile_of_a_network_without_mergeable_sites():
    model = dslib.load_model("vgg11_bn").model
    with pytest.raises(MaskMismatch, match="no mergeable site"):
        dslib.profile(model, dslib.find_sites(model, 32))
