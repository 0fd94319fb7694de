"""A network of any width: one set of weights, and generators that change them for each choice of channels."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from ..algebra import dtype_of, in_channels
from ..errors import BadModel, first_line
from ..models import find_head

STEP = 8  # channels: widths are multiples of it
UNKNOWN = (RuntimeError, ValueError, AttributeError, KeyError, TypeError)  # what Torch-Pruning ends in


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


class Slim(nn.Module):
    """The network with as many channels of each group as are chosen: the first ones.

    The weight of each convolution is its own, plus what a generator (two linear layers) makes of the shares of its
    inputs and outputs that are chosen; at first that is nothing. BatchNorm normalises by the batch at hand, always.

    Args:
        model: the network; left as it is.
        image_size: side in pixels.
        hidden: units between the two linear layers.
        ordered: whether each group's channels are put in the order of their L1 norms, the largest first, for a network
            that is trained.
        seed: of the generators' weights.
    Raises:
        BadModel: if layers share channels in other ways than one for one (concatenation, grouped convolutions).
    Source: Liu et al., MetaPruning, ICCV 2019. Departs: a generator sees its own layer's widths, not its
        neighbours', and adds to weights that are there, so that a trained network can be the start.
    """

    def __init__(
        self, model: nn.Module, image_size: int, hidden: int = 8, ordered: bool = False, seed: int = 0
    ) -> None:
        super().__init__()
        self._plain, self.groups = copy.deepcopy(model).eval(), find_groups(model, image_size)
        if ordered:
            for group in self.groups:
                _put_in_order(self._plain, group)
        self._plain.requires_grad_(False)
        self.network = copy.deepcopy(self._plain).requires_grad_(True)
        self.widths = [group.width for group in self.groups]
        self._image = blank_image(model, image_size)
        outside = {name: i for i, group in enumerate(self.groups) for name in group.makers}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for name in dict.fromkeys(name for group in self.groups for name in (*group.makers, *group.takers)):
                layer = self.network.get_submodule(name)
                if isinstance(layer, nn.Conv2d):
                    self.network.set_submodule(name, _Conv(layer, self.widths, outside.get(name), hidden))
                elif isinstance(layer, nn.BatchNorm2d):
                    self.network.set_submodule(name, _Norm(layer))
                elif isinstance(layer, nn.Linear):
                    self.network.set_submodule(name, _Linear(layer))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, classes), with the channels that are chosen."""
        return self.network(x)

    def choose(self, widths: Sequence[int]) -> None:
        """Take so many channels of each group from now on."""
        self.widths[:] = widths

    def rounded(self, shares: Sequence[float]) -> list[int]:
        """Channels of each group, for a share of each: multiples of `STEP`, and one of them at least."""
        widths = [group.width for group in self.groups]
        return [min(w, max(STEP, STEP * round(share * w / STEP))) for share, w in zip(shares, widths, strict=True)]

    @torch.no_grad()
    def extract(self, widths: Sequence[int]) -> nn.Module:
        """The network of these widths by itself, in eval; its BatchNorms' statistics are to be gathered anew."""
        self.choose(widths)
        self(self._image)  # each layer sees how many channels it is given
        small = copy.deepcopy(self._plain).requires_grad_(True)
        for name, layer in self.network.named_modules():
            if isinstance(layer, _Conv | _Norm | _Linear):
                small.set_submodule(name, layer.alone())
        return small.eval()


class _Conv(nn.Module):
    """A convolution of as many channels as come in and are chosen."""

    def __init__(self, conv: nn.Conv2d, widths: list[int], group: int | None, hidden: int) -> None:
        super().__init__()
        self.conv, self._widths, self._group = conv, widths, group  # widths are all layers'
        self.depthwise = conv.groups > 1
        like: dict[str, Any] = {"device": conv.weight.device, "dtype": conv.weight.dtype}
        self.first = nn.Linear(2, hidden, **like)
        self.second = nn.Linear(hidden, conv.weight.numel(), bias=False, **like)  # the bias is the weight that is there
        nn.init.zeros_(self.second.weight)
        self.seen = conv.in_channels, conv.out_channels

    def forward(self, x: Tensor) -> Tensor:
        inside, conv = x.shape[1], self.conv
        outside = conv.out_channels if self._group is None else self._widths[self._group]
        self.seen = inside, inside if self.depthwise else outside
        bias = None if conv.bias is None else conv.bias[: self.seen[1]]
        groups = inside if self.depthwise else 1
        return F.conv2d(x, self.weight(), bias, conv.stride, conv.padding, conv.dilation, groups)

    def weight(self) -> Tensor:
        """Made for the channels that were seen."""
        inside, outside = self.seen
        whole = self.conv.weight
        shares = whole.new_tensor([inside / self.conv.in_channels, outside / self.conv.out_channels])
        made = self.second(F.relu(self.first(shares))).view_as(whole)
        return (whole + made)[:outside, : whole.shape[1] if self.depthwise else inside]

    def alone(self) -> nn.Conv2d:
        """A plain convolution with these weights."""
        conv, (inside, outside) = copy.deepcopy(self.conv), self.seen
        conv.in_channels, conv.out_channels, conv.groups = inside, outside, inside if self.depthwise else 1
        conv.weight = nn.Parameter(self.weight().clone())
        if conv.bias is not None:
            conv.bias = nn.Parameter(conv.bias[:outside].clone())
        return conv


class _Norm(nn.Module):
    """A BatchNorm of as many channels as come in, by the statistics of the batch; timm's applies its activation."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.norm, self.seen = norm, norm.num_features

    def forward(self, x: Tensor) -> Tensor:
        norm, self.seen = self.norm, x.shape[1]
        y = F.batch_norm(x, None, None, norm.weight[: self.seen], norm.bias[: self.seen], True, 0.0, norm.eps)
        return norm.act(norm.drop(y)) if isinstance(norm, BatchNormAct2d) else y

    def alone(self) -> nn.Module:
        """A plain BatchNorm of these channels."""
        norm = copy.deepcopy(self.norm)
        norm.num_features = self.seen
        for name in ("weight", "bias"):
            norm.register_parameter(name, nn.Parameter(norm.get_parameter(name)[: self.seen].clone()))
        for name in ("running_mean", "running_var"):
            norm.register_buffer(name, norm.get_buffer(name)[: self.seen].clone())
        return norm


class _Linear(nn.Module):
    """A linear layer of as many inputs as come in."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear, self.seen = linear, linear.in_features

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x.shape[-1]
        return F.linear(x, self.linear.weight[:, : self.seen], self.linear.bias)

    def alone(self) -> nn.Linear:
        """A plain linear layer of these inputs."""
        linear = copy.deepcopy(self.linear)
        linear.in_features = self.seen
        linear.weight = nn.Parameter(linear.weight[:, : self.seen].clone())
        return linear


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


def coupled(model: nn.Module, image_size: int) -> tuple[Any, list[Any]]:
    """Torch-Pruning's graph of a network, and its groups of channels that go together; not the classes.

    Raises:
        one of `UNKNOWN`: where the library cannot follow the network.
    Source: Fang et al., DepGraph, CVPR 2023.
    """
    import torch_pruning

    graph = torch_pruning.DependencyGraph().build_dependency(model, blank_image(model, image_size))
    return graph, list(graph.get_all_groups(ignored_layers=[find_head(model)[1]], root_module_types=[nn.Conv2d]))


class Macs:
    """Multiply-accumulates of an image for any widths, from those of the whole network.

    Args:
        model: the network.
        groups: of it.
        image_size: side in pixels.
    """

    def __init__(self, model: nn.Module, groups: Sequence[Group], image_size: int) -> None:
        outside = {name: i for i, group in enumerate(groups) for name in group.makers}
        inside = {name: i for i, group in enumerate(groups) for name in group.takers}
        self._whole = [group.width for group in groups]
        self._parts: list[tuple[float, list[int]]] = []
        for name, macs in _macs_of_layers(model, image_size).items():
            self._parts.append((macs, [of[name] for of in (outside, inside) if name in of]))

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

    def note(name: str, layer: nn.Conv2d | nn.Linear, _: tuple[Tensor, ...], output: Tensor) -> None:
        found[name] = layer.weight.numel() * (output[0, 0].numel() if output.ndim == 4 else 1)

    copied = copy.deepcopy(model).eval()
    for name, layer in copied.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(partial(note, name))
    with torch.no_grad():
        copied(blank_image(model, image_size))
    return found


def _put_in_order(model: nn.Module, group: Group) -> None:
    """Sort the channels of a group by the L1 norms of the convolutions that make them, in place."""
    convs = [layer for name in group.makers if isinstance(layer := model.get_submodule(name), nn.Conv2d)]
    with torch.no_grad():
        norms = torch.stack([conv.weight.abs().flatten(1).sum(1) for conv in convs]).sum(0)
        order = norms.argsort(descending=True)
        for name in group.makers:
            layer = model.get_submodule(name)
            for tensor in (*layer.parameters(recurse=False), *layer.buffers(recurse=False)):
                if tensor.ndim and len(tensor) == group.width:
                    tensor.copy_(tensor[order])
        for name in group.takers:
            weight = model.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            weight.copy_(weight[:, order])


def blank_image(model: nn.Module, image_size: int) -> Tensor:
    """Two black images for a network, (2, C, image_size, image_size)."""
    device = next(model.parameters()).device
    return torch.zeros(2, in_channels(model), image_size, image_size, device=device, dtype=dtype_of(model))
