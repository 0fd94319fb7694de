"""Exact borders on real photos: a merged network against its unmodified original, `dslib bench exact`."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import nn

from ..algebra import removable_activations, site_names, trace
from ..data import load_data
from ..errors import BadConfig
from ..measuring import this_machine
from ..merging import merge
from ..models import load_model
from ..records import Record, commit
from ..shrinking import shrink
from ..sites import find_sites
from ..training import predict

REMOVED = ("features.2", "features.7", "features.11")  # without finetuning, more leave logits that say nothing


def record_exact(
    model: str = "mobilenet_v2", data: str = "imagenette", image_size: int = 128, removed: Sequence[str] = REMOVED
) -> Record:
    """Some sites' activations out and merged with exact borders, against the original, over all photos.

    The original's activation modules are replaced by `nn.Identity` and nothing else is done to it; a graph
    only tells their names. Its logits are what both kinds of exact border are compared with.

    Args:
        model: name of a network with default weights whose activations are modules of their own.
        data: a dataset; its validation split is used.
        image_size: side in pixels.
        removed: the sites.
    """
    loaded = load_data(data, image_size)
    original = load_model(model, loaded.classes, "default").model
    original.eval()
    sites = find_sites(original, image_size)
    mask = sites.mask([name for name in sites.names if name not in removed])
    torn = without_activations(original, mask.removed)
    small = shrink(original, mask, None, image_size, hoist=False)
    ways = {"bias": merge(small, image_size=image_size), "ones": merge(small)}
    expected = predict(torn, loaded.val)
    networks = {}
    for name, way in ways.items():
        found = predict(way, loaded.val)
        networks[name] = {
            "largest_relative_difference": ((found - expected).abs().max() / expected.abs().max()).item(),
            "other_top1": int((found.argmax(1) != expected.argmax(1)).sum()),
        }
    config = {"model": model, "data": data, "image_size": image_size, "removed": mask.removed}
    predicted = len(expected.argmax(1).unique())  # of few classes, equal top-1 would mean little
    spread = (expected.std(0).mean() / expected.abs().max()).item()
    values = {"images": len(loaded.val), "classes_predicted": predicted, "logit_std": spread, "networks": networks}
    command = f"dslib bench exact --model {model} --data {data} --image-size {image_size}"
    command += "".join(f" --remove {name}" for name in mask.removed)
    return Record("exact", command, config, values, this_machine(), commit())


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
