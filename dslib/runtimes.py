"""What runs a network: PyTorch itself, or another runtime that it is compiled for."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from importlib import metadata

import torch
from torch import Tensor, nn

from .errors import BadConfig, DslibError, first_line, require

Run = Callable[[], object]
LIMIT = 1e-3  # a runtime's outputs may differ from PyTorch's by this much of the largest


def prepare(model: nn.Module, images: Tensor, runtime: str = "eager") -> Run:
    """A function that runs a copy of a network, in eval, on a batch.

    Args:
        model: a network or layer; left as it is.
        images: (N, C, H, W), on the device to run on; other runtimes are compiled for its shape.
        runtime: one of `RUNTIMES`.
    Raises:
        BadConfig: if the runtime is unknown, not installed, or not for this device.
        DslibError: if it cannot run the network, or computes something else than PyTorch does.
    """
    known = runtime in RUNTIMES
    require(known, f"runtime: expected one of {', '.join(RUNTIMES)}, found {runtime!r}", BadConfig)
    ready = copy.deepcopy(model).eval().to(images.device)
    return RUNTIMES[runtime](ready, images)


def describe(runtime: str, images: Tensor) -> str:
    """A runtime for a record: its version, memory format and precision."""
    kind = str(images.dtype).removeprefix("torch.")
    return f"eager, channels_last, {kind}" if runtime == "eager" else f"{runtime} {metadata.version(runtime)}, {kind}"


def _eager(model: nn.Module, images: Tensor) -> Run:
    model = model.to(memory_format=torch.channels_last)
    images = images.contiguous(memory_format=torch.channels_last)

    def run() -> Tensor:
        found: Tensor = model(images)
        return found

    return run


def _openvino(model: nn.Module, images: Tensor) -> Run:
    """Compiled with float32 kept as float32, for the shortest time per batch, with PyTorch's number of threads."""
    try:
        import openvino
    except ImportError as error:
        raise BadConfig("runtime openvino needs the package openvino: pip install openvino") from error
    good = images.device.type == "cpu" and images.dtype == torch.float32
    require(good, f"runtime openvino: expected float32 images on the CPU, found {images.dtype} on {images.device}")
    images = images.contiguous()
    hints = {
        "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": str(torch.get_num_threads()),
    }  # fmt: skip
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of the tracer, about branches on shapes
            expected = model(images)
            converted = openvino.convert_model(model, example_input=images, input=[tuple(images.shape)])
        request = openvino.compile_model(converted, "CPU", hints).create_infer_request()
        array = images.numpy()
        found = torch.from_numpy(request.infer([array])[0])
    except Exception as error:  # the converter raises errors of many kinds
        raise DslibError(f"openvino cannot run {type(model).__name__}: {first_line(error)}") from error
    difference = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
    require(difference <= LIMIT, f"openvino computes something else for {type(model).__name__}: it differs by "
            f"{difference:.1e} of the largest output", DslibError)  # fmt: skip
    return lambda: request.infer([array], share_inputs=True, share_outputs=True)


RUNTIMES: dict[str, Callable[[nn.Module, Tensor], Run]] = {"eager": _eager, "openvino": _openvino}
