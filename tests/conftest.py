"""What tests share: tiny random networks (BatchNorm randomised, or fold errors would hide), data, the command line."""

import functools
import importlib.util
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.shufflenetv2 import channel_shuffle  # noqa: F401  (seen by a trace of `Wrapped`)

import dslib
from dslib.cli.verbs import main

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = Path(sys.executable).with_name("dslib")
MODEL = ("--model", "conftest:Tiny", "--weights", "none")
SHORTLY = ("--pretrain-epochs", "12", "--pretrain-batch-size", "16", "--search-epochs", "1", "--finetune-epochs", "2")
SHORT = (*SHORTLY, "--rounds", "3", "--batch-size", "4", "--device", "cpu")


def randomise_batchnorm(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random statistics and affine parameters in every BatchNorm, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for bn in model.modules():
            if isinstance(bn, nn.modules.batchnorm._BatchNorm):
                bn.running_mean.normal_(0, 0.5, generator=generator)
                bn.running_var.uniform_(0.5, 2, generator=generator)
                if bn.affine:
                    bn.weight.uniform_(0.5, 1.5, generator=generator)
                    bn.bias.normal_(0, 0.5, generator=generator)
    return model


def build(name: str, **options) -> nn.Module:
    """A random float64 network in eval, by its torchvision or timm name."""
    model = dslib.load_model(name, options=options).model
    return randomise_batchnorm(model).double().eval()


@functools.cache
def network(name: str = "mobilenet_v2", size: int = 64, single: bool = False) -> tuple[nn.Module, dslib.sites.Sites]:
    """A network of `build` and its sites, made once: to be read, not to be changed."""
    model = build(name)
    return model, dslib.find_sites(model, size, single)


def removing(sites: dslib.sites.Sites, *names: str) -> dslib.Mask:
    """The mask that removes just these."""
    return sites.mask([name for name in sites.names if name not in names])


def photos(n=96, size=32):
    """Seeded noise in float64, (n, 3, size, size)."""
    return torch.randn(n, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def cross_entropy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The plainest loss, without smoothing."""
    return F.cross_entropy(model(images), labels)


def same(one: nn.Module, other: nn.Module) -> bool:
    """Whether two networks' weights and buffers are equal, bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, relative to the largest value of b."""
    return ((a - b).abs().max() / b.abs().max()).item()


def relative_norm(a: torch.Tensor, b: torch.Tensor) -> float:
    """The norm of the difference, relative to b's."""
    return ((a - b).norm() / b.norm()).item()


def maps_after(model: nn.Module, name: str, x: torch.Tensor) -> torch.Tensor:
    """What a module gives in a forward pass."""
    found = []
    hook = model.get_submodule(name).register_forward_hook(lambda _, inputs, output: found.append(output.clone()))
    model(x)
    hook.remove()
    return found[0]


class Block(nn.Module):
    """An inverted residual with what a block can have: bias, stride, kernel size, functional activations."""

    def __init__(self, c_in=4, wide=6, c_out=4, k=3, stride=1, bias=False, padding=None):
        super().__init__()
        padding = k // 2 if padding is None else padding
        self.expand, self.bn1 = nn.Conv2d(c_in, wide, 1, bias=bias), nn.BatchNorm2d(wide)
        self.depthwise = nn.Conv2d(wide, wide, k, stride, padding, groups=wide, bias=bias)
        self.bn2, self.project = nn.BatchNorm2d(wide), nn.Conv2d(wide, c_out, 1, bias=bias)
        self.bn3, self.residual = nn.BatchNorm2d(c_out), stride == 1 and c_in == c_out

    def forward(self, x):
        y = torch.relu(self.bn1(self.expand(x)))
        y = nn.functional.relu6(self.bn2(self.depthwise(y)), inplace=True)
        y = self.bn3(self.project(y))
        if self.residual:
            y += x
        return y


class Wrapped(nn.Module):
    """Two convolutions with BatchNorms, and between them whatever `between` does."""

    def __init__(self, between):
        super().__init__()
        self.a, self.bn_a = nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8)
        self.b, self.bn_b = nn.Conv2d(8, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.between = between
        self.gain = nn.Parameter(torch.rand(8, 1, 1))

    def forward(self, x):
        y = torch.relu(self.bn_a(self.a(x)))
        y = self.between(y) if isinstance(self.between, nn.Module) else self.between(self, y)
        return self.bn_b(self.b(y))


class Tiny(nn.Module):
    """A stem, three blocks, a head: 3 x S x S -> 10 classes."""

    def __init__(self, num_classes=10):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.blocks = nn.Sequential(Block(), Block(c_out=6, k=5, stride=2, bias=True), Block(6, 8, 6))
        self.head = nn.Linear(6, num_classes)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def wide() -> nn.Sequential:
    """A network whose widths can be scaled finely; its blocks are 1 to 3."""
    stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
    blocks = Block(16, 64, 16), Block(16, 64, 32, 5, 2), Block(32, 96, 32)
    return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)).eval()


def widened(num_classes: int = 10, width_mult: float = 1.0) -> nn.Module:
    """Tiny, whose blocks' inner widths follow a multiplier."""
    model = Tiny(num_classes)
    model.blocks = nn.Sequential(
        Block(4, round(8 * width_mult), 4), Block(4, round(16 * width_mult), 6, 5, 2), Block(6, 8, 6)
    )
    return model


def seven() -> nn.Module:
    """A network whose function does not take num_classes."""
    return Tiny(7)


def broken() -> nn.Module:
    """A function with a fault of its own."""
    return Tiny(1 // 0)


@pytest.fixture
def tiny() -> nn.Module:
    torch.manual_seed(0)
    return randomise_batchnorm(Tiny()).double().eval()


@pytest.fixture(scope="session")
def digits() -> dslib.data.datasets.Data:
    """192 + 96 of the embedded digits at 16 px."""
    data = dslib.load_data("digits", 16)
    return replace(data, train=data.train.first(192), val=data.val.first(96))


def start(*words, cwd, **popen) -> subprocess.Popen:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT)]),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"),
    }
    return subprocess.Popen(
        [SCRIPT, *map(str, words)],
        cwd=cwd,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **popen,
    )


def call(*words, cwd) -> tuple[int, str, str]:
    process = start(*words, cwd=cwd)
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


def one_line(err: str) -> str:
    lines = [line for line in err.splitlines() if line.startswith("dslib: ")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0]


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    """Runs a command in this process, in tmp_path; gives its output."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)

    def run(*words) -> str:
        monkeypatch.setattr(sys, "argv", ["dslib", *map(str, words)])
        capsys.readouterr()
        main()
        return capsys.readouterr().out

    return run


@pytest.fixture
def refused(cli, capsys):
    """The same for a command that is refused; gives the one line that says why."""

    def run(*words) -> str:
        with pytest.raises(SystemExit) as stop:
            cli(*words)
        assert stop.value.code == 2
        return one_line(capsys.readouterr().err)

    return run


def write_npz(folder: Path) -> Path:
    """Sixteen-pixel images of two classes that are easy to tell apart."""
    generator = np.random.default_rng(0)
    y = np.arange(160) % 2
    x = (generator.integers(0, 120, (160, 16, 16, 3)) + 120 * y[:, None, None, None]).astype(np.uint8)
    np.savez(folder / "easy.npz", x_train=x[:128], y_train=y[:128], x_test=x[128:], y_test=y[128:])
    return folder / "easy.npz"


@pytest.fixture
def npz(tmp_path):
    return write_npz(tmp_path)


def module(path: str):
    """A fresh copy of a module that no package holds; the path is the project's."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")
