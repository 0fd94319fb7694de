"""How much of a device a network uses: the device's measured peaks, and where a network stands below them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..algebra import Call, dtype_of, ghost_of, hooked
from .latency import Timing, count_macs, measure
from .runtimes import dtype_for

if TYPE_CHECKING:
    import pandas as pd

# channels and side of maps whose 3 x 3 convolutions are tried for the peak
CONVOLUTIONS = ((64, 56), (128, 28), (256, 28), (256, 14), (512, 14))
MATMUL = {"cpu": 2048, "cuda": 8192}
COPIED = {"cpu": 2**28, "cuda": 2**29}  # bytes; far more than a cache holds


@dataclass(frozen=True)
class Peaks:
    """The most that was seen of a device: each the median of its best case.

    Args:
        conv_gflops: of 3 x 3 convolutions, 10^9 floating-point operations (2 x MACs) per second.
        matmul_gflops: of a product of two large square matrices.
        bandwidth_gb_s: of copying, bytes read and bytes written both counted.
        device, precision, runtime: where; the runtime is PyTorch.
        busy: whether the machine had more to do meanwhile.
    """

    conv_gflops: float
    matmul_gflops: float
    bandwidth_gb_s: float
    device: str
    precision: str
    runtime: str
    busy: bool = False

    def ceiling(self, intensity: float) -> float:
        """GFLOP/s that a network of so many operations per byte can reach: the roof."""
        return min(self.conv_gflops, intensity * self.bandwidth_gb_s)


class _Copy(nn.Module):
    target: Tensor

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.register_buffer("target", torch.empty_like(like))

    def forward(self, x: Tensor) -> Any:
        return self.target.copy_(x)


def find_peaks(
    device: torch.device | str = "cpu", precision: str = "float32", batch_size: int | None = None, rounds: int = 15
) -> Peaks:
    """Measure what this device can do at most.

    The ceiling of a network is the convolution peak: on some processors products of large matrices are slower.

    Args:
        device: to measure.
        precision: one of `runtimes.PRECISIONS`.
        batch_size: of the convolutions; default 8 on a CPU, 128 elsewhere.
        rounds: measurements of each.
    """
    device = torch.device(device)
    kind = "cpu" if device.type == "cpu" else "cuda"
    batch = batch_size or (8 if kind == "cpu" else 128)
    dtype, side = dtype_for(precision), MATMUL[kind]

    def timed(layers: Mapping[str, nn.Module], images: Mapping[str, Tensor]) -> Timing:
        placed = {name: layer.to(device, dtype) for name, layer in layers.items()}
        return measure(placed, images, rounds, precision=precision)

    shapes = {f"{c} x {side}": (c, side, side) for c, side in CONVOLUTIONS}
    convolutions = {name: nn.Conv2d(c, c, 3, padding=1, bias=False) for name, (c, *_) in shapes.items()}
    maps = {name: torch.randn(batch, *shape, device=device) for name, shape in shapes.items()}
    convolved = timed(convolutions, maps)
    gflops = [
        2e-6 * convolved.batch_size * count_macs(conv, shapes[name]) / convolved.median(name)
        for name, conv in convolutions.items()
    ]
    matrix = torch.randn(1, 1, side, side, device=device)
    product = timed({"matmul": nn.Linear(side, side, bias=False)}, {"matmul": matrix})
    many = torch.zeros(1, 1, 1, COPIED[kind] // dtype.itemsize, device=device, dtype=dtype)
    copied = timed({"copy": _Copy(many)}, {"copy": many})
    return Peaks(
        max(gflops),
        2e-6 * side**3 / product.median("matmul"),
        2e-6 * COPIED[kind] / copied.median("copy"),
        str(device),
        precision,
        convolved.runtime,
        convolved.busy or product.busy or copied.busy,
    )


def least_traffic(model: nn.Module, input_shape: tuple[int, int, int], batch_size: int = 1, width: int = 4) -> int:
    """Bytes that a network moves at least: inputs, outputs and weights of its convolutions and linear layers, once.

    Activations, adds and BatchNorms count nothing, as if they were all fused.

    Args:
        model: the network.
        input_shape: (C, H, W).
        batch_size: images.
        width: bytes of a number.
    """
    numbers: list[int] = []

    def count(call: Call) -> None:
        maps = call.args[0].numel() + call.output.numel()
        numbers.append(batch_size * maps + sum(p.numel() for p in call.module.parameters()))

    ghost = ghost_of(model)
    layers = [name for name, module in ghost.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    with torch.no_grad(), hooked(ghost, layers, after=count):
        ghost(torch.empty(1, *input_shape, device="meta", dtype=dtype_of(ghost)))
    return width * sum(numbers)


def utilisation(
    models: Mapping[str, nn.Module], input_shape: tuple[int, int, int], timing: Timing, peaks: Peaks
) -> pd.DataFrame:
    """One row a network: GFLOP/s reached, as a share of the convolution peak and of its own roof, FLOPs per byte."""
    import pandas as pd

    rows = {}
    for name, model in models.items():
        flops = 2 * count_macs(model, input_shape) * timing.batch_size
        moved = least_traffic(model, input_shape, timing.batch_size, dtype_for(peaks.precision).itemsize)
        reached, intensity = 1e-6 * flops / timing.median(name), flops / moved
        rows[name] = {
            "gflops": reached,
            "share_of_peak": reached / peaks.conv_gflops,
            "share_of_roof": reached / peaks.ceiling(intensity),
            "flops_per_byte": intensity,
        }
    return pd.DataFrame(rows).T
