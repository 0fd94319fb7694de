"""A dry run: what a run would take, from a few real steps of each of its trainings; nothing is written."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from . import processes
from .calibration import calibrate
from .datasets import Data, load_data
from .devices import peak_memory_gib, pick_device, tune_allocator
from .finetuning import finetune
from .found import Found
from .masks import Mask
from .models import load_model
from .recipes import activation
from .running import CALIBRATION_IMAGES, RANKED_IMAGES, Run, pretrain
from .schedules import Train
from .searching import search
from .shrinking import fade, shrink
from .sites import find_sites
from .splits import Split, check_batch_size
from .watching import Enough, Log

if TYPE_CHECKING:
    import pandas as pd

STEPS, IMAGES = 6, 512  # real steps of each training; images of the evaluation that is timed


def trial(config: Run) -> pd.DataFrame:
    """One row a training of the run: its steps, and how long it and its evaluations will take on this machine.

    Columns: images (of a step, as shape), steps, s/step (of the later two thirds, the loader's time included),
    images/s, s/evaluation, hours, GPU-hours (on a GPU, of all processes), GiB (the largest memory so far: of the GPU,
    or of this process). With `calibrate`, the ranking and the calibration of the plan have a row each too, a step of
    which is one calibration: the middle site's is timed for the ranking, the plan's on some of its images.

    Raises:
        DslibError: what the run would raise before it trains.
    """
    device = processes.start(pick_device(config.device))
    tune_allocator()
    data = processes.in_turns(lambda: load_data(config.data, config.image_size, config.skip_corrupt))
    loaded = load_model(config.model, data.classes, config.weights, config.options, config.seed)
    model = loaded.model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    sites = find_sites(model, data.image_size, config.single)
    sites.check_k(config.k)
    mask = Found(dict.fromkeys(sites.mergeable, 1.0), sites.always_kept, sites.names).mask(config.k)
    took = _evaluation(model, data)
    rows: dict[str, Any] = {}

    def tried(name: str, stage: Train, evaluations: int, work: Callable[[Log], object]) -> None:
        check_batch_size(stage.batch_size, data.train)
        steps = min(_enough(stage, data), stage.epochs * (len(data.train) // stage.batch_size))
        try:
            if steps:
                work(Log(steps=steps))
        except Enough as trial:
            first = (len(trial.ended) - 1) // 3  # steps in which caches and workers warm up
            step = (trial.ended[-1] - trial.ended[first]) / (len(trial.ended) - 1 - first)
            rows[name] = _row(stage.batch_size, data, trial.steps, step, device, evaluations, took)

    if not loaded.trained:
        head_only = config.weights != "none"
        tried("original", config.pretrain, config.pretrain.epochs,
              lambda log: pretrain(model, data, config, head_only, log=log))  # fmt: skip
        model.requires_grad_(True)
    if config.calibrate:
        middle = sites.mergeable[len(sites.mergeable) // 2 :][:1]
        alone = sites.mask([name for name in sites.names if name not in middle])
        for name, plan, count, steps in (("ranking", alone, RANKED_IMAGES, len(sites.mergeable) + 1),
                                         ("calibration", mask, CALIBRATION_IMAGES, 1)):  # fmt: skip
            count = min(count, len(data.train))
            rows[name] = _row(count, data, steps, _calibration(model, plan, data, count), device)
    else:
        costs = dict.fromkeys(sites.mergeable, 1.0)
        tried("search", config.search, 0, lambda log: search(model, data, sites, costs, config.search, log=log))
    make = shrink if config.calibrate else fade
    small = make(model, mask, activation(config.boundary), data.image_size)
    assert config.finetune is not None
    stage = config.finetune
    tried("finetune", stage, stage.epochs, lambda log: finetune(small, data, model, stage, log=log))
    import pandas as pd

    return pd.DataFrame(rows).T


def _row(
    images: int, data: Data, steps: int, step: float, device: torch.device, evaluations: int = 0, took: float = 0.0
) -> dict[str, Any]:
    """A row: steps of so many images and seconds each, and evaluations that take `took` seconds."""
    hours = (steps * step + evaluations * took) / 3600
    gpu = device.type == "cuda"
    memory = torch.cuda.max_memory_allocated(device) / 2**30 if gpu else peak_memory_gib()
    return {
        "images": f"{images} x 3 x {data.image_size} x {data.image_size}", "steps": steps,
        "s/step": step, "images/s": images / step, "s/evaluation": took, "hours": hours,
        "GPU-hours": hours * processes.started() if gpu else "", "GiB": memory,
    }  # fmt: skip


def _enough(config: Train, data: Data) -> int:
    """Steps that show how quick a training is: with workers that decode ahead, several rounds of all of them."""
    if isinstance(data.train, Split):
        return STEPS
    workers = data.train.workers if config.workers is None else config.workers
    return STEPS * max(1, workers)


def _calibration(model: torch.nn.Module, mask: Mask, data: Data, count: int) -> float:
    """Seconds that a calibration on so many images takes, from one on some of them."""
    some = data.train.first(min(count, IMAGES))
    began = time.perf_counter()
    calibrate(model, mask, some, progress=False)
    return (time.perf_counter() - began) * count / len(some)


@torch.inference_mode()
def _evaluation(model: torch.nn.Module, data: Data) -> float:
    """Seconds that an evaluation takes, from some images."""
    size, device = min(len(data.val), IMAGES), next(model.parameters()).device
    model.eval()
    for _ in range(2):
        began = time.perf_counter()
        for images, _labels in data.val.batches(IMAGES // 8, torch.arange(size)):
            model(images.to(device)).cpu()
    return (time.perf_counter() - began) * len(data.val) / size / processes.started()
