"""Costs: MACs against formulas and the paper; latency's order and units; folding BatchNorm; profiles."""

import subprocess
import sys
from collections import namedtuple
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import dslib
from dslib import profiling
from dslib.algebra.folding import fold
from dslib.errors import BadConfig, BadRecord, DslibError, MaskMismatch
from dslib.measuring import devices
from dslib.measuring.devices import Others
from dslib.measuring.latency import Timing, halving, working_memory_mib
from dslib.records import Record


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


def test_each_network_may_have_its_own_batch():
    models = {"three": nn.Conv2d(3, 4, 3), "five": nn.Conv2d(5, 4, 3)}
    images = {"three": torch.randn(2, 3, 8, 8), "five": torch.randn(2, 5, 8, 8)}
    timing = dslib.measure(models, images, rounds=2)
    assert set(timing.ms) == {"three", "five"}
    assert timing.batch_size == 2


def test_batchnorm_is_folded_unless_told_otherwise(tiny):
    seen = []

    class Noted(type(tiny)):
        def forward(self, x):
            seen.append(any(isinstance(m, nn.BatchNorm2d) for m in self.modules()))
            return super().forward(x)

    model = Noted().eval()
    for folded in (True, False):
        dslib.measure({"x": model}, torch.randn(2, 3, 32, 32), rounds=1, folded=folded)
        assert seen[-1] is not folded


def test_a_batch_that_does_not_fit_is_halved():
    class Large(nn.Module):
        def forward(self, x):
            if len(x) > 2:
                raise torch.OutOfMemoryError("32 GiB wanted")
            return x

    with pytest.warns(UserWarning, match="begun again with"):
        timing = dslib.measure({"x": Large()}, torch.randn(8, 3, 4, 4), rounds=1)
    assert timing.batch_size == 2
    with pytest.warns(UserWarning), pytest.raises(DslibError, match="too little memory, even with one image a batch"):
        halving(lambda size: Large()(torch.zeros(3)), 4)
    with pytest.raises(ValueError, match="mine"):
        halving(lambda size: (_ for _ in ()).throw(ValueError("mine")), 4)


def test_a_busy_machine_is_noticed():
    even = np.full(20, 2.0)
    assert not Timing({"a": even, "b": even}, 4, "cpu", "eager", 0.0).busy
    assert not Timing({"a": even}, 4, "cpu", "eager").busy
    assert Timing({"a": even}, 4, "cpu", "eager", 0.2 * torch.get_num_threads()).busy
    shaken = Timing({"a": even, "b": np.where(np.arange(20) < 3, 3.0, 2.0)}, 4, "cpu", "eager", 0.0)
    assert shaken.frame["outliers"].to_dict() == {"a": 0.0, "b": 0.15}
    assert shaken.busy
    for strays, busy in ((1, False), (2, True)):  # of nine rounds a single one says nothing
        assert Timing({"a": np.where(np.arange(9) < strays, 3.0, 2.0)}, 4, "cpu", "eager", 0.0).busy is busy


def test_other_programs_are_counted():
    clock = Others()
    busy = "import time\nend = time.time() + 1\nwhile time.time() < end: pass"
    subprocess.run([sys.executable, "-c", busy], check=True)
    assert clock.cores() > 0.3


def test_other_programs_are_what_is_neither_idle_nor_this_one(monkeypatch):
    whole = namedtuple("whole", "user system idle iowait guest guest_nice")
    own = namedtuple("own", "user system")
    read = [whole(10, 5, 100, 1, 2, 0), own(3, 1), whole(16, 6, 110, 2, 3, 0), own(5, 2)]
    monkeypatch.setattr("psutil.cpu_times", lambda: read.pop(0))
    monkeypatch.setattr("psutil.Process", lambda: SimpleNamespace(cpu_times=lambda: read.pop(0)))
    seconds = iter([100.0, 102.0])
    monkeypatch.setattr(devices, "time", SimpleNamespace(perf_counter=lambda: next(seconds)))
    assert devices.Others().cores() == 2  # 6 + 1 s more (the guest's are in user's), 2 + 1 our own: 4 in 2 s


def test_working_memory_is_what_is_held_at_once():
    images = torch.zeros(1, 1, 512, 512)  # 1 MiB
    model = nn.Sequential(*[nn.ReLU() for _ in range(4)])
    assert working_memory_mib(model, images) == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize("measured", [working_memory_mib, lambda m, x: dslib.measure({"m": m}, x, rounds=1)])
def test_a_deep_network_is_folded_at_full_precision(measured):
    torch.manual_seed(0)
    layers = [layer for _ in range(60) for layer in (nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))]
    model = nn.Sequential(nn.Conv2d(3, 8, 1), *layers).eval()
    with torch.no_grad():
        for layer in layers[1::2]:
            layer.running_var.fill_(0.3)
            layer.running_mean.normal_()
    images = torch.randn(1, 3, 16, 16).bfloat16()
    with pytest.raises(DslibError, match="folding changed"):  # noise of bfloat16 alone
        fold(model.bfloat16(), images)
    measured(model.float(), images)


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
    assert table.predict(some, merged=False) == pytest.approx(
        table.total - table.savings["blocks.1"] - table.savings["blocks.2"]
    )
    assert table.predict(sites.mask(sites.names)) == table.total
    assert dslib.CostTable.load(table.save(tmp_path / "cost.json")) == table
    with pytest.raises(MaskMismatch, match="no measured cost for \\['x'\\]"):
        table.predict(dslib.Mask({"x": False}))
    (tmp_path / "other.json").write_text('{"a": 1}')
    with pytest.raises(BadRecord, match="is not a result record"):
        dslib.CostTable.load(tmp_path / "other.json")
    other = Record("run", "dslib run", {}, {}, {})
    with pytest.raises(BadRecord, match="no cost table but a record of run"):
        dslib.CostTable.load(other.save(tmp_path / "run.json"))
    with pytest.raises(BadRecord, match="is not a cost table"):
        dslib.CostTable.load(replace(other, name="profile").save(tmp_path / "run.json"))


def test_a_profile_is_of_one_batch_size(tiny, monkeypatch):
    """Where a part does not fit, all is measured again at the size that fits."""
    plain, sizes = profiling.measure, []

    def tight(models, images, *rest, **more):
        sizes.append(len(images))
        return plain(models, images[:2], *rest, **more)

    monkeypatch.setattr(profiling, "measure", tight)
    table = dslib.profile(tiny, dslib.find_sites(tiny, 32), batch_size=8, rounds=1)
    assert table.batch_size == 2
    assert sizes == [8, 2, 2, 2, 2]


def test_sites_that_are_slower_merged_are_not_worth_merging():
    costs = {"a": 3.0, "b": 3.0}, {"a": 2.0, "b": 2.0}, {"a": 1.0, "b": 4.0}
    table = dslib.CostTable(*costs, 9.0, 1, 32, "cpu", "eager")
    mask = dslib.Mask({"a": False, "b": False})
    assert table.worth_merging(mask) == ("a",)
    assert table.savings == {"a": 2.0, "b": 1.0}
    assert (table.predict(mask), table.predict(mask, merged=False)) == (8.0, 6.0)


def test_a_profile_of_a_network_without_mergeable_sites():
    model = dslib.load_model("vgg11_bn").model
    with pytest.raises(MaskMismatch, match="no mergeable site"):
        dslib.profile(model, dslib.find_sites(model, 32))
