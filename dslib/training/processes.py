"""Several processes of one job, as `torchrun` or `accelerate launch` starts them; one alone needs none of this."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from ..errors import first_line

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
            pickle.dumps(told[0])  # what cannot travel is an error here, or the others would wait for it
        except Exception as error:
            told = [None, _portable(error)]
        finally:
            _ALONE.reset(token)
    dist.broadcast_object_list(told, device=torch.device("cpu"))
    if told[1] is not None:
        raise told[1]
    return told[0]


def _portable(error: Exception) -> Exception:
    """The error, if pickle can carry it; else one that tells as much."""
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:  # what pickle raises, and the error's own constructor
        told = RuntimeError(f"{type(error).__name__}: {first_line(error)}")
        told.__cause__ = error
        return told


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Give all processes the first one's tensors of numbers with a point, in place."""
    for tensor in tensors if count() > 1 else ():
        if tensor.is_floating_point():
            dist.broadcast(tensor, 0)


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
