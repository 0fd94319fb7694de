"""Is a network merged with exact borders its unmodified original, on every photo?"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from ..algebra import removable_activations, site_names, trace
from ..errors import BadConfig
from ..merging import merge
from ..records import Record
from ..shrinking import shrink
from ..training import predict
from .benchmark import Benchmark, Context, Values
from .settings import BenchSettings, setting


@dataclass(frozen=True)
class Exact(BenchSettings):
    """Merge with exact borders and compare with the unmodified original on every photo of a validation split.

    The original's activation modules are replaced by `nn.Identity` and nothing else is done to it; a graph only tells
    their names. Its logits are what both kinds of exact border are compared with.

    Args:
        model: name of a network with default weights whose activations are modules of their own.
        data: a dataset; its validation split is used.
        image_size: side in pixels.
        removed: a site to remove; without finetuning, more of them leave logits that say nothing.
    """

    model: str = "mobilenet_v2"
    data: str = "imagenette"
    image_size: int = 128
    removed: tuple[str, ...] = setting(("features.2", "features.7", "features.11"), option="remove")


def answer(config: Exact, context: Context[Exact]) -> Values:
    """How far the logits of each kind of exact border are from the original's."""
    original, sites = context.trained
    val = context.data.val
    mask = sites.mask([name for name in sites.names if name not in config.removed])
    expected = predict(without_activations(original, mask.removed), val)
    small = shrink(original, mask, None, config.image_size, hoist=False)
    networks = {}
    for name, way in {"bias": merge(small, image_size=config.image_size), "ones": merge(small)}.items():
        found = predict(way, val)
        networks[name] = {
            "largest_relative_difference": ((found - expected).abs().max() / expected.abs().max()).item(),
            "other_top1": int((found.argmax(1) != expected.argmax(1)).sum()),
        }
    return {
        "images": len(val),
        "classes_predicted": len(expected.argmax(1).unique()),  # of few classes, equal top-1 would mean little
        "logit_std": (expected.std(0).mean() / expected.abs().max()).item(),
        "networks": networks,
    }


def _told(record: Record) -> Iterator[str]:
    for name, value in record.values["networks"].items():
        yield (
            f"{name:5} differs by {value['largest_relative_difference']:.1e} of the largest logit, other top-1 "
            f"on {value['other_top1']} of {record.values['images']} images"
        )


def without_activations(model: nn.Module, names: tuple[str, ...]) -> nn.Module:
    """A copy whose named sites have `nn.Identity` in the place of each inner activation."""
    torn = copy.deepcopy(model)
    for name in names:
        if name not in site_names(model):
            raise BadConfig(f"{name} is not a site")
        block = torn.get_submodule(name)
        traced = trace(block)
        called = [node.target for node in traced.graph.nodes if node.op == "call_module"]
        for node in removable_activations(traced):
            if not called.count(node.target) <= 1:
                raise BadConfig(f"{name}: {node.target} is called more than once")
            if node.op != "call_module":
                raise BadConfig(f"{name}: its activations are not modules of their own")
            block.set_submodule(str(node.target), nn.Identity())
    return torn


BENCHMARK = Benchmark("Is merging exact?", Exact, answer, _told)
