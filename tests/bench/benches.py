"""A benchmark by its name, run; on a tiny network and few images."""

import importlib

from conftest import Tiny, randomise_batchnorm
from torch import nn

from dslib import finetuning
from dslib.bench import benchmark
from dslib.models.networks import Loaded


def benchmark_called(name):
    return importlib.import_module(f"dslib.bench.{name}").BENCHMARK


def run(name, out=None, hours=None, **settings):
    """The record of a benchmark, and what it told."""
    told, made = [], benchmark_called(name)
    return made.run(made.settings(**settings), out, hours, told.append), told


def shrink_all(monkeypatch, digits, model=None, trained=True):
    """Benchmarks have 192 digits of 16 px, and a network, tiny if none is given, that counts as trained."""
    model = randomise_batchnorm(Tiny()) if model is None else model
    monkeypatch.setattr(benchmark, "load_data", lambda *_: digits)
    monkeypatch.setattr(benchmark, "load_model", lambda *_: Loaded(model, trained))
    monkeypatch.setattr(finetuning, "check_teacher", lambda *_: None)
    return model


def plain():
    """A network without sites."""
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
