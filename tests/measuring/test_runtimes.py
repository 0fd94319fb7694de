"""Runtimes: each computes what PyTorch does; the chosen precision is used; those that cannot say so in one line."""

import subprocess
import sys
import warnings

import pytest
import torch
from conftest import Tiny
from torch import nn

import dslib
from dslib.errors import BadConfig, DslibError
from dslib.measuring import runtimes
from dslib.measuring.runtimes import runner_for, use_precision

IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()


STOPPED = """
import os, signal, torch, warnings
from dslib.measuring.runtimes import RUNTIMES
warnings.simplefilter("ignore")
signal.signal(signal.SIGINT, signal.default_int_handler)
ready = [RUNTIMES["openvino"].make(torch.nn.Conv2d(3, 4, 3), torch.randn(1, 3, 8, 8)) for _ in range(2)]
while ready:
    ready.pop(0)
try:
    os.kill(os.getpid(), signal.SIGINT)
    signal.pause()
except KeyboardInterrupt:
    print("stopped")
"""


def test_ctrl_c_after_openvino_is_no_crash():
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", STOPPED], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, "stopped\n"), done.stderr


@pytest.mark.parametrize("runtime", ["eager", "nchw", "compile", "onnxruntime", "openvino"])
def test_runtimes_run_the_network_that_they_were_given(runtime):
    model, deep = small(), nn.Sequential(*[nn.Conv2d(3, 3, 3, padding=1)] * 9)
    images = IMAGES.requires_grad_(False)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the converters
        found = runtimes.RUNTIMES[runtime].make(small(), images).output
    torch.testing.assert_close(found, model(images), rtol=1e-4, atol=1e-5)
    timing = dslib.measure({"one": model, "deep": deep}, images, 3, runtime=runtime)
    assert timing.runtime.startswith(runtime)
    assert timing.runtime.endswith("float32")
    assert timing.median("one") > 0
    assert all(p.requires_grad for p in model.parameters())


def test_pytorch_is_not_compared_with_itself():
    seen = []
    model = small()
    model.register_forward_hook(lambda *_: seen.append(1))
    runner_for(model, IMAGES, "eager")
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("runtime", "precision"), [("eager", "bfloat16"), ("eager", "float16"), ("openvino", "bfloat16")]
)
def test_precision(runtime, precision):
    seen = []

    class Noted(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x):
            seen.append((x.dtype, self.conv.weight.dtype))
            return self.conv(x)

    timing = dslib.measure({"x": Noted()}, IMAGES, 2, runtime=runtime, precision=precision)
    assert timing.runtime.endswith(precision)
    wanted = getattr(torch, precision)
    assert (wanted, wanted) in seen
    assert all(kinds == (wanted, wanted) for kinds in seen) or runtime == "openvino"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("runtime", ["eager", "nchw", "compile", "cudagraph"])
@pytest.mark.parametrize("precision", ["float32", "tf32", "float16", "bfloat16"])
def test_on_a_gpu(runtime, precision):
    models = {name: nn.Sequential(small(), nn.BatchNorm2d(4)).eval() for name in ("one", "two")}
    timing = dslib.measure(models, IMAGES.cuda(), 3, runtime=runtime, precision=precision)
    assert timing.median("one") > 0
    with use_precision(precision), torch.inference_mode():
        images = IMAGES.cuda().to(runtimes.dtype_for(precision))
        ready = [runtimes.RUNTIMES[runtime].make(net.cuda().to(images.dtype), images) for net in models.values()]
        ready[0].run()  # after the second was made
        assert ready[0].output.isfinite().all()


def test_tf32_is_off_unless_asked_for():
    with use_precision(None):
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.backends.cudnn.allow_tf32
    with use_precision("tf32"):
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.backends.cudnn.allow_tf32
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_runtime_that_cannot_is_refused():
    model = nn.Conv2d(3, 8, 3)
    for given, runtime, text in (
        (IMAGES, "tensorflow", "runtime: expected one of eager, nchw, compile, .*, found 'tensorflow'"),
        (IMAGES.double(), "openvino", r"openvino has no torch\.float64"),
        (IMAGES.bfloat16(), "onnxruntime", "onnxruntime has no bfloat16 convolutions"),
        (IMAGES, "cudagraph", "runtime cudagraph runs on cuda, the images are on cpu"),
        (IMAGES, "tensorrt", "runtime tensorrt runs on cuda"),
    ):
        with pytest.raises(BadConfig, match=text):
            runner_for(model, given, runtime)
    with pytest.raises(BadConfig, match="precision: expected one of float32, tf32, bfloat16, float16, found 'int8'"):
        dslib.measure({"x": model}, IMAGES, precision="int8")
    with pytest.raises(BadConfig, match="precision tf32 is for GPUs"):
        dslib.measure({"x": model}, IMAGES, precision="tf32")
    with pytest.raises(DslibError, match=r"eager cannot run Tiny on images of shape \(1, 5, 8, 8\)"):
        dslib.measure({"x": Tiny()}, torch.randn(1, 5, 8, 8), folded=False)
    with pytest.raises(DslibError, match=r"Tiny does not run on images of shape \(1, 5, 8, 8\)"):
        dslib.measure({"x": Tiny()}, torch.randn(1, 5, 8, 8))


@pytest.mark.parametrize(
    "text", ["CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "MPS backend out of memory"]
)
def test_every_library_says_in_its_own_words_that_memory_is_out(text):
    assert runtimes.is_out_of_memory(RuntimeError(text))
    assert runtimes.is_out_of_memory(MemoryError())
    assert not runtimes.is_out_of_memory(RuntimeError("shapes do not match"))


def test_a_missing_package_is_one_line(monkeypatch):
    import builtins

    plain = builtins.__import__

    def without(name, *rest, **more):
        if name.split(".")[0] == "openvino":
            raise ModuleNotFoundError("No module named 'openvino'", name="openvino")
        return plain(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(BadConfig, match="runtime openvino needs the package openvino: pip install openvino"):
        runner_for(small(), IMAGES, "openvino")


def test_a_runtime_that_computes_something_else_is_refused():
    class Odd(nn.Module):
        def forward(self, x):
            return x + (7 if torch.jit.is_tracing() else 5)

    with pytest.raises(DslibError, match="openvino computes something else for Odd: it differs by"):
        runner_for(Odd(), IMAGES, "openvino")
