"""What a network costs: multiply-accumulates, parameters, and latency measured interleaved."""

from __future__ import annotations

import copy
import ctypes
import platform
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from .errors import require
from .records import machine
from .runtimes import Run, describe, prepare

if TYPE_CHECKING:
    import pandas as pd

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # glibc's mallopt parameters
_KEEP_BYTES = 1 << 30


@dataclass(frozen=True)
class Timing:
    """Latency of several networks, measured in turns.

    Args:
        ms: name -> one latency (ms per batch) a round; round i of all names was measured together.
        batch_size: images a batch.
        device, runtime: what it ran on.
    """

    ms: dict[str, np.ndarray]
    batch_size: int
    device: str
    runtime: str

    @property
    def frame(self) -> pd.DataFrame:
        """Per network: median latency and its quartiles in ms, images per second."""
        import pandas as pd

        rows = {}
        for name, ms in self.ms.items():
            low, mid, high = np.percentile(ms, [25, 50, 75])
            rows[name] = {
                "latency_ms": mid,
                "q25_ms": low,
                "q75_ms": high,
                "images_per_s": 1e3 * self.batch_size / mid,
            }
        return pd.DataFrame(rows).T

    def median(self, name: str) -> float:
        """Median latency in ms per batch."""
        return float(np.median(self.ms[name]))

    def speedup(self, name: str, over: str) -> tuple[float, float, float]:
        """How many times faster `name` is than `over`: ratio of medians, and quartiles of the rounds' ratios."""
        low, high = np.percentile(self.ms[over] / self.ms[name], [25, 75])
        return self.median(over) / self.median(name), float(low), float(high)


def measure(
    models: Mapping[str, nn.Module],
    images: Tensor,
    rounds: int = 30,
    warmup: int = 3,
    at_least_ms: float = 2.0,
    runtime: str = "eager",
) -> Timing:
    """Latency of several networks on one batch, in turns (A B A B ...), no gradients; eager is channels last.

    In turns, so that a slow spell of the machine hits all alike and ratios stay honest.

    Args:
        models: name -> network or layer; copies are measured, in eval.
        images: (N, C, H, W); its device is where they run.
        rounds: measurements of each.
        warmup: unmeasured runs of each before.
        at_least_ms: a quick layer is run several times a measurement, until it takes this long.
        runtime: what runs them: "eager" (PyTorch) or "openvino".
    """
    require(bool(models) and rounds > 0, "expected at least one network and one round to measure")
    tune_allocator()
    device = images.device
    ready = {name: prepare(model, images, runtime) for name, model in models.items()}
    ms: dict[str, list[float]] = {name: [] for name in ready}
    with torch.inference_mode():
        repeats = {name: _repeats(run, device, warmup, at_least_ms) for name, run in ready.items()}
        for _ in range(rounds):
            for name, run in ready.items():
                ms[name].append(_time_once(run, device, repeats[name]))
    arrays = {name: np.array(values) for name, values in ms.items()}
    return Timing(arrays, len(images), str(device), describe(runtime, images))


def count_macs(model: nn.Module, input_shape: tuple[int, int, int]) -> int:
    """Multiply-accumulates of one image, (C, H, W): convolutions and matrix products; half of torch's FLOPs.

    BatchNorm, activations and adds are not counted. Runs on the `meta` device.
    """
    from torch.utils.flop_counter import FlopCounterMode

    ghost = copy.deepcopy(model).to("meta").eval()
    dtype = next((p.dtype for p in ghost.parameters()), torch.float32)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        ghost(torch.empty(1, *input_shape, device="meta", dtype=dtype))
    return int(counter.get_total_flops()) // 2


def count_parameters(model: nn.Module) -> int:
    """Number of parameters; buffers (BatchNorm statistics) are not counted."""
    return sum(p.numel() for p in model.parameters())


def accelerator() -> torch.device:
    """The device to use unless told otherwise: CUDA, MPS, or the CPU."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return found if found is not None else torch.device("cpu")


def tune_allocator() -> str:
    """Keep glibc from giving large activations back to the system after every layer; returns the setting.

    Otherwise each call page-faults anew, which slows large activations most and flatters the smaller network.
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return "system default"
    libc = ctypes.CDLL(None)
    done = libc.mallopt(_MMAP_THRESHOLD, _KEEP_BYTES) and libc.mallopt(_TRIM_THRESHOLD, _KEEP_BYTES)
    return f"glibc, mmap and trim thresholds {_KEEP_BYTES}" if done else "glibc default"


def this_machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """This machine for a record, with device, threads and allocator setting."""
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    extra = {"cuda": torch.version.cuda, "gpu": name} if name else {}
    return machine(device=str(device), threads=torch.get_num_threads(), allocator=tune_allocator(), **extra)


def peak_memory_gib() -> float | None:
    """Largest resident memory of this process so far; None where the system does not say (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _repeats(run: Run, device: torch.device, warmup: int, at_least_ms: float) -> int:
    for _ in range(max(warmup, 1)):
        took = _time_once(run, device, 1)
    return max(1, round(at_least_ms / max(took, 1e-3)))


def _time_once(run: Run, device: torch.device, repeats: int) -> float:
    """Milliseconds of one run, the mean of `repeats` in a row."""
    if device.type == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / repeats
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    if device.type == "mps":
        torch.mps.synchronize()
    return 1e3 * (time.perf_counter() - start) / repeats
