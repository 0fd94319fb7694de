"""Several processes of one job, as `torchrun` or `accelerate launch` starts them; one alone needs none of this."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

T = TypeVar("T")
_ALONE: ContextVar[bool] = ContextVar("alone", default=False)  # the first process works, the others wait
PATIENCE = timedelta(minutes=30)  # longer than the first process measures alone; then a lost node is an error


def start(device: torch.device) -> torch.device:
    """Join the other processes of this job, if there are any; returns this process's own device."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    return device


def count() -> int:
    """How many processes work together."""
    return dist.get_world_size() if dist.is_initialized() and not _ALONE.get() else 1


def started() -> int:
    """How many processes the job has, whether or not they work together just now."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's place among them, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def on_rank_zero(make: Callable[[], T]) -> T:
    """What the first process makes, on its own, for all; its error becomes everybody's.

    The others wait meanwhile. What is made travels by pickle, among processes that run the same code.
    """
    if count() == 1:
        return make()
    told: list[Any] = [None, None]
    if rank() == 0:
        token = _ALONE.set(True)
        try:
            told[0] = make()
        except Exception as error:
            told[1] = error
        finally:
            _ALONE.reset(token)
    dist.broadcast_object_list(told, device=torch.device("cpu"))
    if told[1] is not None:
        raise told[1]
    return told[0]


def all_gather(part: Tensor) -> list[Tensor]:
    """The tensors of all processes, (N_i, ...) each on the CPU, in order of rank; all but the first size alike."""
    if count() == 1:
        return [part]
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(count())]
    dist.all_gather(sizes, torch.tensor([len(part)]))
    longest = max(int(size) for size in sizes)
    padded = torch.cat([part, part.new_zeros(longest - len(part), *part.shape[1:])])
    found = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(found, padded)
    return [one[: int(size)] for one, size in zip(found, sizes, strict=True)]


def all_reduce_sum(values: Tensor) -> Tensor:
    """The sum of a tensor over all processes, in place."""
    if count() > 1:
        dist.all_reduce(values)
    return values


def wait() -> None:
    """Until all processes are here."""
    all_reduce_sum(torch.zeros(1))


def any_rank(wish: bool) -> bool:
    """Whether any process wishes it; all learn the same."""
    return bool(all_reduce_sum(torch.tensor([float(wish)])) > 0)


def first_per_machine(make: Callable[[], T]) -> T:
    """What each process makes, the first of each machine before its others: what one downloads, they find."""
    if count() == 1:
        return make()
    early = os.environ.get("LOCAL_RANK", str(rank())) == "0"
    made = make() if early else None
    wait()
    return made if made is not None else make()


def finish() -> None:
    """Leave the group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def lost_another(error: BaseException) -> bool:
    """Whether an error says that another process of the job went away."""
    text = str(error)
    signs = ("onnection closed by peer", "onnection reset", "gloo", "NCCL", "Timed out waiting", "Broken pipe")
    return count() > 1 and isinstance(error, RuntimeError) and any(sign in text for sign in signs)
