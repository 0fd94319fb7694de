"""How much faster is each of the paper's networks as its dense counterpart, here?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import NoReturn

import torch
from torch import nn

from ..errors import BadModel, DslibError
from ..measuring import DenseBlock, dense, measure
from ..sites import find_sites
from .benchmark import Benchmark, Context, Row, Steps, Values
from .tables import MODELS, Case, Measured, Table, network_called

COMPACT = ("MobileNetV2", "MobileNetV2-1.4", "EfficientNet-Lite0")  # on a CPU at batch 32 too


@dataclass(frozen=True)
class Table1(Measured):
    """The paper's motivating table: networks and their dense counterparts, in turns, over runtimes and batch sizes.

    Args:
        model: a network, by the paper's name or any that `load_model` knows.
    """

    model: tuple[str, ...] = tuple(MODELS)


def answer(config: Table1, context: Context[Table1]) -> Steps:
    """Device peaks; of each network sizes, cases, and the latency of each of its blocks."""
    table = Table(config, context.device)
    yield from table.peaks()
    compact = table.device.type == "cpu" and not config.batch_size
    larger = [c._replace(batch_size=32) for c in table.cases if c.batch_size == 8 and c.runtime != "compile"]
    first = max(table.cases, key=lambda case: case.batch_size)
    for name in config.model:
        try:
            original = network_called(name, config.image_size)
            counterpart = dense(original, find_sites(original, config.image_size))
        except DslibError as error:
            yield Row({"sizes": name}, partial(_fail, error), keep_errors=True)
            context.echo(f"{name}: {error}")
            continue
        networks = {"original": original, "dense": counterpart.model}
        cases = [*table.cases, *(larger if compact and name in COMPACT else [])]
        yield from table.rows(name, networks, cases, width=counterpart.width, multiple=counterpart.multiple)
        yield Row({"blocks": name, **first._asdict()}, partial(_blocks, networks, table, first), keep_errors=True)


def _fail(error: DslibError) -> NoReturn:
    raise error


def _blocks(networks: Mapping[str, nn.Module], table: Table, case: Case) -> Values:
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
            channels = block.conv.in_channels if isinstance(block, DenseBlock) else site.input_shape[0]
            images[name] = torch.randn(case.batch_size, channels, *site.input_shape[1:], device=table.device)
        timing = measure(blocks, images, 9, runtime=case.runtime, precision=case.precision)
        found[site.name] = {name: timing.median(name) for name in blocks}
        batch, busy = min(batch, timing.batch_size), busy or timing.busy
    return {"ms": found, "measured_batch_size": batch, "busy": busy}


BENCHMARK = Benchmark("What does it cost and save here?", Table1, answer, idle=True)
