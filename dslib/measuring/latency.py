"""What a network costs: multiply-accumulates, parameters, memory, and latency measured in turns."""

from __future__ import annotations

import copy
import time
import warnings
import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..algebra import dtype_of, fold, ghost_of
from ..errors import BadConfig, DslibError, first_line
from .devices import Others, tune_allocator, wait_for
from .runtimes import Runner, describe, dtype_for, forget_compiled, is_out_of_memory, runner_for, use_precision

if TYPE_CHECKING:
    import pandas as pd

OUTLIER = 1.25  # times the median
T = TypeVar("T")


@dataclass(frozen=True)
class Timing:
    """Latency of several networks, measured in turns.

    Args:
        ms: name -> one latency (ms per batch) a round; round i of all names was measured together.
        batch_size: images a batch.
        device, runtime: what it ran on.
        others: how many of the machine's cores other programs kept busy meanwhile; None if unknown.
    """

    ms: dict[str, np.ndarray]
    batch_size: int
    device: str
    runtime: str
    others: float | None = None

    @property
    def frame(self) -> pd.DataFrame:
        """One row a network, with median latency and quartiles (ms), images per second, share of outlying rounds."""
        import pandas as pd

        rows = {}
        for name, ms in self.ms.items():
            low, mid, high = np.percentile(ms, [25, 50, 75])
            rows[name] = {
                "latency_ms": mid,
                "q25_ms": low,
                "q75_ms": high,
                "images_per_s": 1e3 * self.batch_size / mid,
                "outliers": float((ms > OUTLIER * mid).mean()),
            }
        return pd.DataFrame(rows).T

    @property
    def busy(self) -> bool:
        """Whether the machine had more to do: others used a tenth of the cores (or one whole), or rounds are outliers.

        More than a tenth of a network's rounds, and more than one: in few rounds a single one says nothing.
        """
        shared = self.others is not None and self.others > min(0.1 * torch.get_num_threads(), 0.8)
        outlying = ((ms > OUTLIER * np.median(ms)).sum() for ms in self.ms.values())
        rounds = len(next(iter(self.ms.values())))
        return shared or any(count > max(1, 0.1 * rounds) for count in outlying)

    def median(self, name: str) -> float:
        """Median latency in ms per batch."""
        return float(np.median(self.ms[name]))

    def speedup(self, name: str, over: str) -> tuple[float, float, float]:
        """How many times faster `name` is than `over`: ratio of medians, and quartiles of the rounds' ratios."""
        low, high = np.percentile(self.ms[over] / self.ms[name], [25, 75])
        return self.median(over) / self.median(name), float(low), float(high)


def measure(
    models: Mapping[str, nn.Module],
    images: Tensor | Mapping[str, Tensor],
    rounds: int = 30,
    warmup: int = 3,
    at_least_ms: float = 2.0,
    runtime: str = "eager",
    precision: str | None = None,
    folded: bool = True,
    tuned: bool = True,
) -> Timing:
    """Latency of several networks on one batch, in turns (A B A B ...), no gradients.

    In turns, so that a slow spell of the machine hits all alike and ratios stay honest. Where the memory does not
    suffice the batch is halved, with a warning: see `batch_size` of what is returned.

    Args:
        models: name -> network or layer; copies are measured, in eval.
        images: (N, C, H, W), one for all or name -> each one's; their device is where they run.
        rounds: measurements of each.
        warmup: unmeasured runs of each before.
        at_least_ms: a quick layer is run several times a measurement, until it takes this long.
        runtime: what runs them: one of `runtimes.RUNTIMES`. "eager" is PyTorch, channels last.
        precision: float32, tf32, bfloat16 or float16; None is the images' own.
        folded: whether branches and BatchNorms are folded into convolutions first, as every deployment does.
        tuned: whether memory is kept between calls, see `devices.tune_allocator`; once is for all of a process.
    Raises:
        BadConfig, DslibError: as `runtimes.runner_for`.
    """
    if not models or rounds < 1:
        raise BadConfig("expected at least one network and one round to measure")
    dtype = None if precision is None else dtype_for(precision)
    if tuned:
        tune_allocator()
    batches = {name: images if isinstance(images, Tensor) else images[name] for name in models}
    first = next(iter(batches.values()))
    device = first.device
    if precision == "tf32" and device.type != "cuda":
        raise BadConfig(f"precision tf32 is for GPUs, the images are on {device}")
    if folded:
        models = {name: folded_exactly(model, batches[name]) for name, model in models.items()}

    def timed(size: int) -> Timing:
        if runtime == "compile":
            forget_compiled()
        with use_precision(precision), _current(device):
            parts = {name: batch[:size].to(dtype=dtype) for name, batch in batches.items()}
            ready = {name: runner_for(model, parts[name], runtime) for name, model in models.items()}
            with torch.inference_mode():
                ms, others = interleaved(ready, device, rounds, warmup, at_least_ms)
        what = describe(runtime, precision or str(first.dtype).removeprefix("torch."))
        return Timing(ms, size, str(device), what, others)

    return halving(timed, len(first))


def interleaved(
    runs: Mapping[str, Runner], device: torch.device, rounds: int = 30, warmup: int = 3, at_least_ms: float = 2.0
) -> tuple[dict[str, np.ndarray], float | None]:
    """How long each of several functions takes, in turns: name -> ms a round; and the cores that others kept busy."""
    ms: dict[str, list[float]] = {name: [] for name in runs}
    repeats = {name: _repeats(run, device, warmup, at_least_ms) for name, run in runs.items()}
    others = Others()
    for _ in range(rounds):
        for name, run in runs.items():
            ms[name].append(_time_once(run, device, repeats[name]))
    return {name: np.array(values) for name, values in ms.items()}, others.cores()


def halving(run: Callable[[int], T], batch_size: int) -> T:
    """What `run` returns for a batch size, the first that memory suffices for: this one, or half of it, and so on.

    Raises:
        DslibError: if one image is too much.
    """
    while True:
        try:
            return run(batch_size)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            reason = f"too little memory, even with one image a batch ({first_line(error)})"
            if batch_size <= 1:
                raise DslibError(reason) from error
        batch_size //= 2
        warnings.warn(f"out of memory: begun again with {batch_size} images a batch", stacklevel=3)


def count_macs(model: nn.Module, input_shape: tuple[int, int, int]) -> int:
    """Multiply-accumulates of one image, (C, H, W): convolutions and matrix products; half of torch's FLOPs.

    BatchNorm, activations and adds are not counted. Runs on the `meta` device.
    """
    from torch.utils.flop_counter import FlopCounterMode

    ghost = ghost_of(model)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        ghost(torch.empty(1, *input_shape, device="meta", dtype=dtype_of(ghost)))
    return int(counter.get_total_flops()) // 2


def count_parameters(model: nn.Module) -> int:
    """Number of parameters; buffers (BatchNorm statistics) are not counted."""
    return sum(p.numel() for p in model.parameters())


def working_memory_mib(model: nn.Module, images: Tensor) -> float:
    """The most memory that one forward pass in PyTorch holds beyond weights and images: activations, in MiB.

    BatchNorm folded. On a CPU what PyTorch's allocator gives out; what a library keeps for itself is not seen.
    """
    ready = runner_for(folded_exactly(model, images), images)
    with torch.no_grad():
        if images.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(images.device)
            before = torch.cuda.memory_allocated(images.device)
            ready()
            return (torch.cuda.max_memory_allocated(images.device) - before) / 2**20
        with _Held() as held:
            ready()
    return held.most / 2**20


class _Held(TorchDispatchMode):
    """Counts the bytes of the tensors that operations made and that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.most = 0, 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                self._known.add(leaf.untyped_storage())  # weights, images, and what was counted already
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor) and leaf.untyped_storage() not in self._known:
                storage = leaf.untyped_storage()
                self._known.add(storage)
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        return found

    def _add(self, size: int) -> None:
        self.now += size
        self.most = max(self.most, self.now)


def folded_exactly(model: nn.Module, images: Tensor) -> nn.Module:
    """`fold`, branches too, for a network that has BatchNorms; others as they are. In float32, not in less.

    Raises:
        DslibError: if the network does not run on the images.
    """
    if not any(isinstance(m, _BatchNorm) for m in model.modules()):
        return model
    try:
        with use_precision(None):
            exact = torch.promote_types(images.dtype, torch.float32)  # a deep network in half is noisy
            return fold(copy.deepcopy(model).to(images.device, exact), images[:1].to(exact))
    except DslibError:
        raise
    except Exception as error:  # the user's code runs: anything can be raised
        if is_out_of_memory(error):
            raise torch.OutOfMemoryError(first_line(error)) from error
        reason = f"{type(model).__name__} does not run on images of shape {tuple(images.shape)}: {first_line(error)}"
        raise DslibError(reason) from error


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Streams and events belong to the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _repeats(run: Runner, device: torch.device, warmup: int, at_least_ms: float) -> int:
    for _ in range(max(warmup, 1)):
        took = _time_once(run, device, 1)
    return max(1, round(at_least_ms / max(took, 1e-3)))


def _time_once(run: Runner, device: torch.device, repeats: int) -> float:
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
    wait_for(device)
    return 1e3 * (time.perf_counter() - start) / repeats
