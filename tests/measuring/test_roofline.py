"""Peaks of the device, and where a network stands below them."""

import numpy as np
import pytest
import torch
from torch import nn

from dslib.measuring.latency import Timing
from dslib.measuring.roofline import Peaks, find_peaks, least_traffic, utilisation

PEAKS = Peaks(100.0, 80.0, 10.0, "cpu", "float32", "eager")


def test_the_roof_is_bandwidth_then_the_convolution_peak():
    assert PEAKS.ceiling(2.0) == 20.0
    assert PEAKS.ceiling(50.0) == 100.0


def test_least_traffic_of_one_convolution():
    conv = nn.Conv2d(4, 8, 3, 2, 1)
    numbers = 3 * (4 * 9 * 9 + 8 * 5 * 5) + (8 * 4 * 9 + 8)
    assert least_traffic(conv, (4, 9, 9), batch_size=3) == 4 * numbers
    assert least_traffic(nn.Sequential(conv, nn.BatchNorm2d(8), nn.ReLU()), (4, 9, 9), 3, width=2) == 2 * numbers


def test_utilisation_is_a_share_of_what_was_measured():
    conv = nn.Conv2d(4, 8, 3, 2, 1, bias=False)
    timing = Timing({"conv": np.array([1.0, 2.0, 4.0])}, 3, "cpu", "eager")
    row = utilisation({"conv": conv}, (4, 9, 9), timing, PEAKS).loc["conv"]
    flops = 2 * 3 * 5 * 5 * 8 * 4 * 9
    assert row["gflops"] == pytest.approx(flops / 2e-3 / 1e9)
    assert row["share_of_peak"] == pytest.approx(row["gflops"] / 100)
    assert row["flops_per_byte"] == pytest.approx(flops / least_traffic(conv, (4, 9, 9), 3))
    assert row["share_of_roof"] == pytest.approx(row["gflops"] / min(100, 10 * row["flops_per_byte"]))


def test_peaks_are_measured(monkeypatch):
    from dslib.measuring import roofline

    monkeypatch.setattr(roofline, "CONVOLUTIONS", ((16, 16), (32, 8)))
    monkeypatch.setattr(roofline, "MATMUL", {"cpu": 128})
    monkeypatch.setattr(roofline, "COPIED", {"cpu": 2**20})
    for precision in ("float32", "bfloat16"):
        found = find_peaks("cpu", precision, 2, rounds=3)
        assert min(found.conv_gflops, found.matmul_gflops, found.bandwidth_gb_s) > 0
        assert (found.device, found.precision) == ("cpu", precision)
        assert found.runtime.endswith(precision)
    assert torch.get_float32_matmul_precision() == "highest"
