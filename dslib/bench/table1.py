"""The paper's motivating table, on this machine: each network beside its dense counterpart; `dslib bench table1`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from ..dense import Dense, DenseBlock, dense
from ..devices import pick_device, this_machine
from ..errors import BadModel, DslibError, require
from ..measuring import measure
from ..models import load_model
from ..records import Record, as_words, commit
from ..sites import find_sites
from .rows import Rows
from .tables import Case, add_case, add_peaks, add_sizes, cases, say, settle_batchnorm

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "MobileNetV2": ("mobilenet_v2", {}),
    "MobileNetV2-1.4": ("mobilenet_v2", {"width_mult": 1.4}),
    "EfficientNet-Lite0": ("timm/efficientnet_lite0", {}),
    "ResNet-50": ("resnet50", {}),
    "ResNet-101": ("resnet101", {}),
    "ResNet-152": ("resnet152", {}),
}
COMPACT = ("MobileNetV2", "MobileNetV2-1.4", "EfficientNet-Lite0")  # on a CPU at batch 32 too


def record_table1(
    models: tuple[str, ...] = (), device: str = "auto", image_size: int = 224, batch_size: tuple[int, ...] = (),
    runtime: tuple[str, ...] = (), precision: tuple[str, ...] = (), rounds: int = 30, out: Path | None = None,
    echo: Callable[[str], object] = print,
) -> Record:  # fmt: skip
    """Original and dense counterpart, in turns, over runtimes, precisions and batch sizes; device peaks; block times.

    Args:
        models: the paper's names (see `MODELS`) or any that `load_model` knows; default the paper's six.
        device: to measure.
        image_size: side in pixels.
        batch_size, runtime, precision: all combinations; default what `tables.cases` says.
        rounds: measurements of each.
        out: the record's file; rows that stand there are not measured again.
        echo: is told each row.
    """
    where = pick_device(device)
    config = {"model": models or tuple(MODELS), "device": str(where), "image_size": image_size,
              "batch_size": batch_size, "runtime": runtime, "precision": precision, "rounds": rounds}  # fmt: skip
    command = f"dslib bench table1 {as_words(config)}"
    rows = Rows(Record("table1", command, config, {}, this_machine(where), commit()), out)
    wanted = cases(where, batch_size, runtime, precision)
    peaks = add_peaks(rows, where, (case.precision for case in wanted))
    for name in models or tuple(MODELS):
        try:
            original, counterpart = _pair(name, image_size)
        except DslibError as error:
            rows.add({"sizes": name}, partial(_fail, error), keep_errors=True)
            echo(f"{name}: {error}")
            continue
        networks = {"original": original, "dense": counterpart.model}
        add_sizes(rows, name, networks, image_size, width=counterpart.width, multiple=counterpart.multiple)
        compact = where.type == "cpu" and name in COMPACT and not batch_size
        larger = [case._replace(batch_size=32) for case in wanted if case.batch_size == 8 and case.runtime != "compile"]
        for case in [*wanted, *(larger if compact else [])]:
            echo(say(add_case(rows, name, networks, image_size, case, where, peaks, rounds)))
        first = next(case for case in wanted if case.batch_size == max(case.batch_size for case in wanted))
        rows.add(
            {"blocks": name, **first._asdict()}, partial(_blocks, networks, image_size, first, where), keep_errors=True
        )
    return rows.record


def _fail(error: DslibError) -> NoReturn:
    raise error


def _pair(name: str, image_size: int) -> tuple[nn.Module, Dense]:
    known, options = MODELS.get(name, (name, {}))
    original = load_model(known, options=options).model
    original.eval()
    settle_batchnorm(original, image_size)
    return original, dense(original, find_sites(original, image_size))


def _blocks(networks: Mapping[str, nn.Module], image_size: int, case: Case, device: torch.device) -> dict[str, Any]:
    """Milliseconds of each block of the original and of what stands for it in the dense network."""
    found: dict[str, dict[str, float]] = {}
    batch, busy = case.batch_size, False
    sites = find_sites(networks["original"], image_size)
    for site in sites:
        blocks = {name: network.get_submodule(site.name).to(device) for name, network in networks.items()}
        images = {}
        for name, block in blocks.items():
            require(site.input_shape is not None, f"{site.name}: its input is not one map", BadModel)
            assert site.input_shape is not None
            channels = block.conv.in_channels if isinstance(block, DenseBlock) else site.input_shape[0]
            images[name] = torch.randn(case.batch_size, channels, *site.input_shape[1:], device=device)
        timing = measure(blocks, images, 9, runtime=case.runtime, precision=case.precision)
        found[site.name] = {name: timing.median(name) for name in blocks}
        batch, busy = min(batch, timing.batch_size), busy or timing.busy
    return {"ms": found, "measured_batch_size": batch, "busy": busy}
