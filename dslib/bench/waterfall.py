"""What part of the dense network's speed-up is BatchNorm, memory allocation, or the compiler?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ..errors import BadConfig, DslibError
from ..measuring import Timing, allocator_is_tuned, dense, measure
from ..sites import find_sites
from .benchmark import Benchmark, Context, Values, noise, speedup_of
from .settings import OneTiming
from .tables import network_called


class Step(NamedTuple):
    """How both networks are run; each step keeps what the one before brought, but for the last ones' runtimes."""

    name: str
    runtime: str
    precision: str = "float32"
    folded: bool = True
    tuned: bool = True
    device: str = "any"


STEPS = (
    Step("PyTorch as it comes", "nchw", folded=False, tuned=False, device="cpu"),
    Step("memory kept between calls", "nchw", folded=False, device="cpu"),
    Step("PyTorch as it comes", "nchw", folded=False, device="cuda"),
    Step("channels last", "eager", folded=False),
    Step("BatchNorm folded", "eager"),
    Step("compiled (TorchInductor)", "compile"),
    Step("CUDA graph", "cudagraph", device="cuda"),
    Step("ONNX Runtime", "onnxruntime", device="cpu"),
    Step("OpenVINO", "openvino", device="cpu"),
    Step("bfloat16", "eager", "bfloat16"),
    Step("OpenVINO, bfloat16", "openvino", "bfloat16", device="cpu"),
    Step("CUDA graph, float16", "cudagraph", "float16", device="cuda"),
)


@dataclass(frozen=True)
class Waterfall(OneTiming):
    """A network and its dense counterpart, one ingredient of a fair comparison after another; in turns within a step.

    Args:
        model: one of the paper's names, or any that `load_model` knows; weights are random.
    """

    model: str = "MobileNetV2"
    device: str = "auto"


def answer(config: Waterfall, context: Context[Waterfall]) -> Values:
    """A row for each of `STEPS` that this device knows.

    Raises:
        BadConfig: if memory is already kept between calls in this process: the first step would be a lie.
    """
    if allocator_is_tuned() and context.device.type == "cpu":
        raise BadConfig("the allocator of this process is tuned already: begin a new one, or use the command line")
    size = config.image_size
    original = network_called(config.model, size).to(context.device)
    networks = {"original": original, "dense": dense(original, find_sites(original, size)).model}
    images = noise(original, config.batch_size, size, context.device)
    rows = []
    for step in STEPS:
        if step.device not in ("any", context.device.type):
            continue
        ways = {name: value for name, value in step._asdict().items() if name not in ("name", "device")}
        try:
            row = _row(measure(networks, images, config.rounds, **ways))
            context.echo(f"{step.name}: {row['speedup']:.2f} x ({row['speedup_q25']:.2f} to {row['speedup_q75']:.2f})")
        except DslibError as error:
            row = {"error": str(error)}
            context.echo(f"{step.name}: {error}")
        rows.append({**step._asdict(), **row})
    return {"rows": rows}


def _row(timing: Timing) -> Values:
    return {
        "networks": timing.frame.T.to_dict(),
        **speedup_of(timing, "dense", "original", prefix="speedup_"),
        "as_run": timing.runtime,
        "measured_batch_size": timing.batch_size,
        "busy": timing.busy,
        "others": timing.others,
    }


BENCHMARK = Benchmark("What does it cost and save here?", Waterfall, answer)
