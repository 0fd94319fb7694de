"""What runs a network: PyTorch itself, or another runtime that it is compiled for; and in which precision."""

from __future__ import annotations

import copy
import functools
import importlib
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import BadConfig, DslibError, first_line

PRECISIONS = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LIMITS = {torch.float16: 2e-2, torch.bfloat16: 0.3}  # of the largest output, for a hundred layers; others: 1e-3
_PLAIN = ("eager", "nchw")  # PyTorch itself: nothing to compare with
_COMPILED = 256  # versions of one class that are kept compiled at a time
_NO_MEMORY = ("out of memory", "can't allocate memory", "failed to allocate memory", "alloc_failed", "bad allocation")


Runner = Callable[[], object]


class Ready(NamedTuple):
    """A network that is ready to run on one batch, and what it gave for it."""

    run: Runner
    output: Tensor


def runner_for(model: nn.Module, images: Tensor, runtime: str = "eager") -> Runner:
    """A function that runs a copy of a network, in eval, on a batch.

    Args:
        model: a network or layer; left as it is.
        images: (N, C, H, W), on the device to run on and in the precision to run in; other runtimes than PyTorch's
            are compiled for its shape.
        runtime: one of `RUNTIMES`.
    Raises:
        BadConfig: if the runtime is unknown, not installed, or not for this device.
        DslibError: if it cannot run the network, or computes something else than PyTorch does.
    """
    if runtime not in RUNTIMES:
        raise BadConfig(f"runtime: expected one of {', '.join(RUNTIMES)}, found {runtime!r}")
    device = RUNTIMES[runtime].device
    if device not in ("any", images.device.type):
        raise BadConfig(f"runtime {runtime} runs on {device}, the images are on {images.device}")
    try:
        with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the converters, about themselves
            model = copy.deepcopy(model).to(images.device, images.dtype).requires_grad_(False)
            model.eval()
            expected = None if runtime in _PLAIN else model(images)
            ready = RUNTIMES[runtime].make(model, images)
    except DslibError:
        raise
    except ImportError as error:
        package = RUNTIMES[runtime].package
        raise BadConfig(f"runtime {runtime} needs the package {package}: pip install {package}") from error
    except Exception as error:  # the user's code runs, and converters raise errors of many kinds
        if is_out_of_memory(error):
            raise torch.OutOfMemoryError(first_line(error)) from error
        shape = tuple(images.shape)
        reason = f"{runtime} cannot run {type(model).__name__} on images of shape {shape}: {first_line(error)}"
        raise DslibError(reason) from error
    if expected is None:
        return ready.run
    expected = expected.float().cpu()
    difference = float((ready.output.float().cpu() - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
    limit = LIMITS.get(images.dtype, 1e-2 if _is_tf32() else 1e-3)
    if not difference <= limit:
        raise DslibError(
            f"{runtime} computes something else for "
            f"{type(model).__name__}: it differs by {difference:.1e} of the largest output"
        )
    return ready.run


def describe(runtime: str, precision: str) -> str:
    """A runtime for a record: its version, memory format and precision."""
    package = RUNTIMES[runtime].package
    version = "" if package == "torch" else f" {_version(package)}"
    return f"{runtime}{version}{RUNTIMES[runtime].layout}, {precision}"


def dtype_for(precision: str) -> torch.dtype:
    """The dtype that a precision computes in.

    Raises:
        BadConfig: if there is no such precision.
    """
    if precision not in PRECISIONS:
        raise BadConfig(f"precision: expected one of {', '.join(PRECISIONS)}, found {precision!r}")
    return PRECISIONS[precision]


@contextmanager
def use_precision(precision: str | None) -> Iterator[None]:
    """Float32 on a GPU is float32, or for "tf32" rounds the inputs of convolutions and products to TF32.

    CuDNN chooses its algorithms by trying them.
    """
    rough, before = precision == "tf32", torch.get_float32_matmul_precision()
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=rough):
        torch.set_float32_matmul_precision("high" if rough else "highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device's memory does not suffice; every library has its own words for it."""
    text = str(error).lower()
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(words in text for words in _NO_MEMORY)


def forget_compiled() -> None:
    """Let go of what `torch.compile` made so far: it keeps a number of versions of one class, then runs without."""
    import torch._dynamo

    torch._dynamo.reset()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # onnxruntime-gpu is imported as onnxruntime
        return str(importlib.import_module(package).__version__)


def _is_tf32() -> bool:
    return torch.get_float32_matmul_precision() == "high"


def _eager(model: nn.Module, images: Tensor) -> Ready:
    model = model.to(memory_format=torch.channels_last)
    images = images.contiguous(memory_format=torch.channels_last)
    return Ready(lambda: model(images), model(images))


def _nchw(model: nn.Module, images: Tensor) -> Ready:
    images = images.contiguous()
    return Ready(lambda: model(images), model(images))


def _compile(model: nn.Module, images: Tensor) -> Ready:
    """TorchInductor; on a CPU with the weights as constants, which lets it choose their layout."""
    import torch._dynamo
    import torch._inductor.config

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _COMPILED)
    model = model.to(memory_format=torch.channels_last)
    images = images.contiguous(memory_format=torch.channels_last)
    compiled = torch.compile(model, dynamic=False)

    def run() -> Tensor:
        with torch.inference_mode(False), torch.no_grad():  # as it was compiled
            found: Tensor = compiled(images)
        return found

    with torch._inductor.config.patch(freezing=images.device.type == "cpu"):
        return Ready(run, run())


def _cudagraph(model: nn.Module, images: Tensor) -> Ready:
    """One forward pass captured as a CUDA graph: no launches from Python."""
    model = model.to(memory_format=torch.channels_last)
    images = images.contiguous(memory_format=torch.channels_last)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries choose their algorithms before the capture
        for _ in range(3):
            model(images)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = model(images)
    graph.replay()
    kept = (model, images)  # the graph reads their memory, without owning it

    def run(_: object = kept) -> None:
        graph.replay()

    return Ready(run, output)


def _onnxruntime(model: nn.Module, images: Tensor) -> Ready:
    """Its threads sleep between runs: spinning ones would slow the network that is measured in turn."""
    import onnxruntime

    device, number = images.device.type, images.device.index or 0
    provider = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}.get(device, device)
    reason = f"this onnxruntime does not run on {device}" + (": install onnxruntime-gpu" if device == "cuda" else "")
    if provider not in onnxruntime.get_available_providers():
        raise BadConfig(reason)
    settings = {"device_id": str(number), "use_tf32": str(int(_is_tf32()))} if device == "cuda" else {}
    if images.dtype == torch.bfloat16:
        raise BadConfig("onnxruntime has no bfloat16 convolutions")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    images = images.contiguous()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        torch.onnx.export(model, (images,), path, dynamo=True, external_data=False, verbose=False)
        session = onnxruntime.InferenceSession(path, options, [(provider, settings)])
    if provider not in session.get_providers():  # it may fall back to the CPU
        raise BadConfig(reason)
    binding, array = session.io_binding(), images.cpu().numpy()
    place = onnxruntime.OrtValue.ortvalue_from_numpy(array, device, number)
    binding.bind_ortvalue_input(session.get_inputs()[0].name, place)
    binding.bind_output(session.get_outputs()[0].name, device, number)
    session.run_with_iobinding(binding)
    output = torch.from_numpy(binding.copy_outputs_to_cpu()[0])
    return Ready(lambda: session.run_with_iobinding(binding), output)


def _openvino(model: nn.Module, images: Tensor) -> Ready:
    """Compiled for the shortest time per batch, with PyTorch's number of threads; float32 stays float32."""
    import openvino

    kinds = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
    if images.dtype not in kinds:
        raise BadConfig(f"openvino has no {images.dtype}")
    hints = {
        "INFERENCE_PRECISION_HINT": kinds[images.dtype],
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": str(torch.get_num_threads()),
    }
    model, images = model.float(), images.float().contiguous()
    traced = torch.jit.trace(model, images, strict=False, check_trace=False)  # outputs are compared later
    converted = openvino.convert_model(traced, example_input=images, input=[tuple(images.shape)])
    request = _openvino_core().compile_model(converted, "CPU", hints).create_infer_request()
    array = images.numpy()
    output = torch.from_numpy(request.infer([array])[0].copy())
    return Ready(lambda: request.infer([array], share_inputs=True, share_outputs=True), output)


@functools.cache
def _openvino_core() -> Any:
    """One for all: each sets a stack for signals, and after a second one was freed, Ctrl-C crashes the process."""
    import openvino

    return openvino.Core()


def _tensorrt(model: nn.Module, images: Tensor) -> Ready:
    import torch_tensorrt

    images = images.contiguous()
    compiled = torch_tensorrt.compile(
        model, ir="dynamo", inputs=[images], use_explicit_typing=True, disable_tf32=not _is_tf32()
    )
    return Ready(lambda: compiled(images), compiled(images))


class _Runtime(NamedTuple):
    make: Callable[[nn.Module, Tensor], Ready]
    package: str = "torch"
    device: str = "any"
    layout: str = ""


RUNTIMES: dict[str, _Runtime] = {
    "eager": _Runtime(_eager, layout=", channels_last"),
    "nchw": _Runtime(_nchw, layout=" (eager, contiguous)"),
    "compile": _Runtime(_compile, layout=", channels_last"),
    "cudagraph": _Runtime(_cudagraph, device="cuda", layout=", channels_last"),
    "onnxruntime": _Runtime(_onnxruntime, "onnxruntime"),
    "openvino": _Runtime(_openvino, "openvino", device="cpu"),
    "tensorrt": _Runtime(_tensorrt, "torch_tensorrt", device="cuda"),
}
