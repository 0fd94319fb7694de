"""This machine: its devices, its allocator, its memory, and what else it is busy with."""

from __future__ import annotations

import ctypes
import functools
import platform
import sys
import time
from typing import Any

import torch

from ..errors import BadConfig, first_line
from ..records import machine

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # glibc's mallopt parameters
_KEEP_BYTES = 1 << 30
SHORT = 0.5  # seconds; the system counts in hundredths


def accelerator() -> torch.device:
    """The device to use unless told otherwise: CUDA, MPS, or the CPU."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return found if found is not None else torch.device("cpu")


def pick_device(name: str) -> torch.device:
    """The torch device called `name`; 'auto' is the accelerator, if there is one.

    Raises:
        BadConfig: if there is no such device here.
    """
    if name == "auto":
        return accelerator()
    try:
        torch.zeros(1, device=name).item()
    except Exception as error:  # every backend raises its own kind
        raise BadConfig(f"no device {name!r} here ({first_line(error)}): give cpu, cuda or auto") from error
    return torch.device(name)


@functools.cache
def tune_allocator() -> str:
    """Keep glibc from giving large activations back to the system after every layer; returns the setting.

    Otherwise each call page-faults anew, which slows large activations most and flatters the smaller network.
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return "system default"
    libc = ctypes.CDLL(None)
    done = libc.mallopt(_MMAP_THRESHOLD, _KEEP_BYTES) and libc.mallopt(_TRIM_THRESHOLD, _KEEP_BYTES)
    return f"glibc, mmap and trim thresholds {_KEEP_BYTES}" if done else "glibc default"


def allocator_is_tuned() -> bool:
    """Whether `tune_allocator` was called in this process: it cannot be taken back."""
    return tune_allocator.cache_info().currsize > 0


def this_machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """This machine for a record, with device, threads and allocator setting."""
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    extra = {"cuda": torch.version.cuda, "gpu": name} if name else {}
    return machine(device=str(device), threads=torch.get_num_threads(), allocator=tune_allocator(), **extra)


def wait_for(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


def peak_memory_gib() -> float | None:
    """Largest resident memory of this process so far; None where the system does not say (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class Others:
    """A clock of what other programs do on this machine's processor."""

    def __init__(self) -> None:
        self._began, self._busy = time.perf_counter(), _busy_seconds()

    def cores(self) -> float | None:
        """How many cores other programs kept busy since; None if it is too short to say, or without psutil."""
        before, now, seconds = self._busy, _busy_seconds(), time.perf_counter() - self._began
        if before is None or now is None or seconds < SHORT:
            return None
        return max(0.0, (now - before) / seconds)


def _busy_seconds() -> float | None:
    """Processor seconds that this process did not have, on all cores; time that another machine took counts."""
    try:
        import psutil
    except ImportError:
        return None
    whole, own = psutil.cpu_times(), psutil.Process().cpu_times()
    idle = whole.idle + getattr(whole, "iowait", 0.0)
    guest = getattr(whole, "guest", 0.0) + getattr(whole, "guest_nice", 0.0)  # counted in user and nice as well
    return float(sum(whole) - guest - idle - own.user - own.system)
