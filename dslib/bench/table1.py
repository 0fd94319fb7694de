"""The paper's motivating table, on this machine: each network beside its dense counterpart; `dslib bench table1`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from ..errors import BadModel, DslibError
from ..measuring import Dense, DenseBlock, dense, measure
from ..models import load_model
from ..records import Record
from ..sites import find_sites
from .tables import Case, Measured, Table, settle_batchnorm

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
    models: tuple[str, ...] = (),
    measured: Measured | None = None,
    out: Path | None = None,
    echo: Callable[[str], object] = print,
) -> Record:
    """Original and dense counterpart, in turns, over runtimes, precisions and batch sizes; device peaks; block times.

    Args:
        models: the paper's names (see `MODELS`) or any that `load_model` knows; default the paper's six.
        measured, out, echo: as for `Table`.
    """
    measured, models = measured or Measured(), models or tuple(MODELS)
    table = Table("table1", measured, out, echo, model=models)
    for name in models:
        try:
            original, counterpart = _pair(name, table.image_size)
        except DslibError as error:
            table.rows.add({"sizes": name}, partial(_fail, error), keep_errors=True)
            echo(f"{name}: {error}")
            continue
        networks = {"original": original, "dense": counterpart.model}
        table.add_sizes(name, networks, width=counterpart.width, multiple=counterpart.multiple)
        compact = table.device.type == "cpu" and name in COMPACT and not measured.batch_size
        larger = [c._replace(batch_size=32) for c in table.cases if c.batch_size == 8 and c.runtime != "compile"]
        table.add_cases(name, networks, [*table.cases, *(larger if compact else [])])
        first = max(table.cases, key=lambda case: case.batch_size)
        table.rows.add({"blocks": name, **first._asdict()}, partial(_blocks, networks, table, first), keep_errors=True)
    return table.rows.record


def _fail(error: DslibError) -> NoReturn:
    raise error


def _pair(name: str, image_size: int) -> tuple[nn.Module, Dense]:
    known, options = MODELS.get(name, (name, {}))
    original = load_model(known, options=options).model
    original.eval()
    settle_batchnorm(original, image_size)
    return original, dense(original, find_sites(original, image_size))


def _blocks(networks: Mapping[str, nn.Module], table: Table, case: Case) -> dict[str, Any]:
    """Milliseconds of each block of the original and of what stands for it in the dense network."""
    found: dict[str, dict[str, float]] = {}
    batch, busy = case.batch_size, False
    sites = find_sites(networks["original"], table.image_size)
    for site in sites:
        blocks = {name: network.get_submodule(site.name).to(table.device) for name, network in networks.items()}
        images = {}
        for name, block in blocks.items():
            if site.input_shape is None:
                raise BadModel(f"{site.name}: its input is not one map")
            assert site.input_shape is not None
            channels = block.conv.in_channels if isinstance(block, DenseBlock) else site.input_shape[0]
            images[name] = torch.randn(case.batch_size, channels, *site.input_shape[1:], device=table.device)
        timing = measure(blocks, images, 9, runtime=case.runtime, precision=case.precision)
        found[site.name] = {name: timing.median(name) for name in blocks}
        batch, busy = min(batch, timing.batch_size), busy or timing.busy
    return {"ms": found, "measured_batch_size": batch, "busy": busy}
