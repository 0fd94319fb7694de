"""Where a speed-up comes from: the same two networks, one ingredient of a fair comparison after another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..algebra import in_channels
from ..errors import BadConfig, DslibError
from ..measuring import allocator_is_tuned, dense, measure, pick_device, this_machine
from ..models import load_model
from ..records import Record, as_words, commit
from ..sites import find_sites
from .table1 import MODELS
from .tables import settle_batchnorm


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


def record_waterfall(
    model: str = "MobileNetV2",
    device: str = "auto",
    image_size: int = 224,
    batch_size: int = 8,
    rounds: int = 30,
    echo: Callable[[str], object] = print,
) -> Record:
    """A network and its dense counterpart at each of `STEPS`, in turns within a step.

    Args:
        model: one of the paper's names, or any that `load_model` knows.
        device: to measure.
        image_size: side in pixels.
        batch_size: images a batch.
        rounds: measurements of each.
        echo: is told each row.
    Raises:
        BadConfig: if memory is already kept between calls in this process: the first step would be a lie.
    """
    where = pick_device(device)
    if allocator_is_tuned() and where.type == "cpu":
        raise BadConfig("the allocator of this process is tuned already: begin a new one, or use the command line")
    known, options = MODELS.get(model, (model, {}))
    original = load_model(known, options=options).model
    settle_batchnorm(original, image_size)
    original = original.to(where)
    networks = {"original": original, "dense": dense(original, find_sites(original, image_size)).model}
    images = torch.randn(batch_size, in_channels(original), image_size, image_size, device=where)

    def measured(step: Step) -> dict[str, Any]:
        timing = measure(
            networks,
            images,
            rounds,
            runtime=step.runtime,
            precision=step.precision,
            folded=step.folded,
            tuned=step.tuned,
        )
        ratio, low, high = timing.speedup("dense", over="original")
        return {
            "networks": timing.frame.T.to_dict(),
            "speedup": ratio,
            "speedup_q25": low,
            "speedup_q75": high,
            "as_run": timing.runtime,
            "measured_batch_size": timing.batch_size,
            "busy": timing.busy,
            "others": timing.others,
        }

    rows = []
    for step in STEPS:
        if step.device not in ("any", where.type):
            continue
        try:
            row = {**step._asdict(), **measured(step)}
            echo(f"{step.name}: {row['speedup']:.2f} x ({row['speedup_q25']:.2f} to {row['speedup_q75']:.2f})")
        except DslibError as error:
            row = {**step._asdict(), "error": str(error)}
            echo(f"{step.name}: {error}")
        rows.append(row)
    config = {
        "model": model,
        "device": str(where),
        "image_size": image_size,
        "batch_size": batch_size,
        "rounds": rounds,
    }
    command = f"dslib bench waterfall {as_words(config)}"
    return Record("waterfall", command, config, {"rows": rows}, this_machine(where), commit())
