"""Channels that go together: groups of layers, narrower copies, and their multiply-accumulates."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..algebra import Call, dtype_of, hooked, in_channels
from ..errors import BadModel, first_line
from ..models import find_head

STEP = 8  # channels: widths are multiples of it
UNKNOWN = (RuntimeError, ValueError, AttributeError, KeyError, TypeError)  # what Torch-Pruning ends in
Score = Callable[[Any], Tensor]
Scorer = Callable[[nn.Module], Score]


@dataclass
class Group:
    """Layers that have their channels in common, as those along a residual path do.

    Args:
        width: channels that there are.
        makers: names of the layers that make or keep them: convolutions, depthwise ones among them, and BatchNorms.
        takers: names of dense convolutions and linear layers that take them.
    """

    width: int
    makers: list[str] = field(default_factory=list)
    takers: list[str] = field(default_factory=list)


def coupled(model: nn.Module, image_size: int) -> tuple[Any, list[Any]]:
    """Torch-Pruning's graph of a network, and its groups of channels that go together; not the classes.

    Raises:
        one of `UNKNOWN`: where the library cannot follow the network.
    Source: Fang et al., DepGraph, CVPR 2023.
    """
    import torch_pruning

    graph = torch_pruning.DependencyGraph().build_dependency(model, blank_image(model, image_size))
    return graph, list(graph.get_all_groups(ignored_layers=[find_head(model)[1]], root_module_types=[nn.Conv2d]))


def find_groups(model: nn.Module, image_size: int) -> list[Group]:
    """The groups of a network whose channels can be fewer; not the classes, nor the image's.

    Raises:
        BadModel: if layers share channels in other ways than one for one.
    """
    copied = copy.deepcopy(model).eval()
    names = {module: name for name, module in copied.named_modules()}
    try:
        _, found = coupled(copied, image_size)
    except UNKNOWN as error:
        raise BadModel(f"Torch-Pruning cannot look through this network: {first_line(error)}") from error
    groups = []
    for members in found:
        width = members[0].dep.target.module.out_channels
        group = Group(width)
        for dep, indices in members:
            name, layer = names.get(dep.target.module), dep.target.module
            if name is None:  # an operation
                continue
            plain = type(layer) is nn.Conv2d and layer.groups in (1, layer.in_channels) and layer.padding != "same"
            known = plain or isinstance(layer, nn.BatchNorm2d | nn.Linear)
            if not (known and list(indices) == list(range(width))):
                raise BadModel(f"{name}: its channels are not shared one for one with other layers'")
            (group.takers if dep.handler.__name__ == "prune_in_channels" else group.makers).append(name)
        groups.append(group)
    return groups


def cut(model: nn.Module, strength: float, image_size: int, scorer: Scorer, compete: bool) -> nn.Module:
    """A copy without a share of its channels; of each group of coupled ones a multiple of `STEP` stays.

    Args:
        strength: share of the channels that go, 0 to 1.
        scorer: a copy of the network -> scores of the channels of a group of Torch-Pruning.
        compete: whether groups' channels compete with each other; else the same share of each goes.
    Raises:
        BadModel: if Torch-Pruning cannot prune the network.
    """
    small = copy.deepcopy(model).eval()
    try:
        graph, groups = coupled(small, image_size)
        scores = list(map(scorer(small), groups))
        for group, score, going in zip(groups, scores, _how_many(scores, strength, compete), strict=True):
            if going:
                first, lowest = group[0].dep, score.argsort()[:going].tolist()
                graph.get_pruning_group(first.target.module, first.handler, lowest).prune()
        with torch.no_grad():
            classes = small(blank_image(model, image_size)).shape[1]
    except UNKNOWN as error:
        raise BadModel(f"Torch-Pruning cannot prune this network: {first_line(error)}") from error
    if classes != find_head(model)[1].out_features:
        raise BadModel("Torch-Pruning took classes away")
    small.zero_grad()
    return small


def _how_many(scores: Sequence[Tensor], strength: float, compete: bool) -> list[int]:
    """Channels of each group that go, so that multiples of `STEP` stay."""
    shares = [strength] * len(scores)
    if compete and strength < 1:
        order = torch.cat(list(scores)).sort()[0]
        bound = order[min(int(strength * len(order)), len(order) - 1)]
        shares = [(score < bound).double().mean().item() for score in scores]
    going = []
    for share, score in zip(shares, scores, strict=True):
        staying = max(STEP, STEP * math.ceil((1 - share) * len(score) / STEP))
        going.append(max(0, len(score) - staying))
    return going


class Macs:
    """Multiply-accumulates of an image for any widths, from those of the whole network."""

    def __init__(self, model: nn.Module, groups: Sequence[Group], image_size: int) -> None:
        outside = {name: i for i, group in enumerate(groups) for name in group.makers}
        inside = {name: i for i, group in enumerate(groups) for name in group.takers}
        self._whole = [group.width for group in groups]
        layers = _macs_of_layers(model, image_size)
        self._parts = [(macs, [of[name] for of in (outside, inside) if name in of]) for name, macs in layers.items()]

    def __call__(self, widths: Sequence[int]) -> float:
        """For so many channels of each group."""
        shares = [width / whole for width, whole in zip(widths, self._whole, strict=True)]
        total = 0.0
        for macs, groups in self._parts:
            for group in groups:
                macs *= shares[group]
            total += macs
        return total


def _macs_of_layers(model: nn.Module, image_size: int) -> dict[str, float]:
    """Name of each convolution and linear layer -> its multiply-accumulates of an image."""
    found: dict[str, float] = {}

    def note(call: Call) -> None:
        positions = call.output[0, 0].numel() if call.output.ndim == 4 else 1
        found[call.name] = positions * call.module.get_parameter("weight").numel()

    copied = copy.deepcopy(model).eval()
    names = [name for name, layer in copied.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    with torch.no_grad(), hooked(copied, names, after=note):
        copied(blank_image(model, image_size))
    return found


def blank_image(model: nn.Module, image_size: int) -> Tensor:
    """Two black images for a network, (2, C, image_size, image_size)."""
    device = next(model.parameters()).device
    return torch.zeros(2, in_channels(model), image_size, image_size, device=device, dtype=dtype_of(model))
