"""Where a network is fitted to another: which convolutions, in which order, and what is read and wanted there."""

from __future__ import annotations

import contextlib
import operator
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from ..algebra import (
    after,
    ancestors,
    bypass,
    free_layers,
    from_batchnorm,
    is_activation,
    is_conv,
    module_of,
    output_of,
    tail,
)
from ..errors import BadData, first_line
from .least_squares import pick

_ADDS = (operator.add, operator.iadd, torch.add, "add", "add_")


class Opened(nn.Module):
    """A block in two parts: what it computes before the activations at its end, and these.

    Args:
        traced: the block, from `tracing.trace`; its layers are shared.
    """

    def __init__(self, traced: fx.GraphModule) -> None:
        super().__init__()
        ends = tail(traced)
        self.act = after(traced, ends[0].all_input_nodes[0]) if ends else None
        self.body = traced
        for node in ends:
            bypass(traced, node)
        traced.recompile()

    def forward(self, x: Tensor) -> Tensor:
        """The block's output."""
        y = self.body(x)
        return y if self.act is None else self.act(y)


class Convolution(NamedTuple):
    """Names, in a block, of a convolution and of the BatchNorm after it, if any."""

    conv: str
    batchnorm: str | None


@dataclass(frozen=True)
class Station:
    """One convolution to be fitted.

    Args:
        name: the site.
        conv: the convolution, in the small network.
        output: the module, in the small network, whose output it changes one to one (but for its BatchNorm's scale).
        target: the module, in the original network, whose output is wanted there.
        removed: whether it stands for a removed site.
        batchnorm: the BatchNorm that scales what the convolution gives, in the small network.
        before: the block's convolutions before this one, whose channels get the original's mean and spread first.
    """

    name: str
    conv: str
    output: str
    target: str
    removed: bool
    batchnorm: str | None = None
    before: tuple[Station, ...] = ()

    def is_folded(self, network: nn.Module) -> bool:
        """Whether the convolution's own bias shifts the output, its BatchNorm (if any) being folded into it."""
        conv = network.get_submodule(self.conv)
        norm = None if self.batchnorm is None else network.get_submodule(self.batchnorm)
        return conv.bias is not None and not isinstance(norm, nn.BatchNorm2d)

    def change(self, fast: nn.Module, small: nn.Module, weight: Tensor, bias: Tensor) -> None:
        """Add to the convolution, in place, what changes its output by that of a convolution of `weight` and `bias`.

        Args:
            fast: the small network, BatchNorms folded.
            small: the same with its BatchNorms; one that switched a channel off (scale 0) leaves it as it is, in both.
            weight, bias: (C_out, C_in / groups, k_v, k_h) and (C_out,).
        """
        folded, conv = fast.get_submodule(self.conv), small.get_submodule(self.conv)
        assert isinstance(folded, nn.Conv2d)
        assert isinstance(conv, nn.Conv2d)
        factor, shift = torch.ones_like(bias), conv.bias
        if self.batchnorm is not None:
            bn = small.get_submodule(self.batchnorm)
            assert isinstance(bn, nn.BatchNorm2d)
            scale = from_batchnorm(bn).weight.flatten().to(bias)
            alive = scale.abs() > 1e-3 * scale.abs().max()
            factor, shift = torch.where(alive, 1 / scale, 0.0), bn.bias
            weight, bias = weight * alive[:, None, None, None], bias * alive
        assert folded.bias is not None
        assert shift is not None
        folded.weight += weight.to(folded.weight)
        folded.bias += bias.to(folded.bias)
        conv.weight += (weight * factor[:, None, None, None]).to(conv.weight)
        shift += bias.to(shift)


def within_reach(names: Sequence[str], removed: Sequence[str], reach: int | None) -> list[str]:
    """The kept ones of a network's blocks; with a reach, so many after each removed one, in the names' order."""
    prefixes = tuple(f"{name}." for name in removed)
    if reach is None:  # a block may be called after others whose names come later
        return [name for name in names if not f"{name}.".startswith(prefixes)]
    found, left = list[str](), 0
    for name in names:
        if f"{name}.".startswith(prefixes):
            left = reach
        elif left > 0:
            found.append(name)
            left -= 1
    return found


def normalised_before(body: fx.GraphModule, last: Convolution) -> list[Convolution]:
    """A block's convolutions before its last one that a BatchNorm follows, each called once, in their order."""
    found = []
    for node in body.graph.nodes:
        if isinstance(module_of(body, node), nn.BatchNorm2d):
            conv = node.all_input_nodes[0]
            if is_conv(body, conv) and len(conv.users) == 1 and _has_shift(body, str(node.target)):
                found.append(Convolution(str(conv.target), str(node.target)))
    names = Counter(conv.conv for conv in found)
    return [conv for conv in takewhile(lambda conv: conv != last, found) if names[conv.conv] == 1]


def last_convolution(body: fx.GraphModule) -> Convolution | None:
    """The convolution that reaches a block's output through BatchNorm and adds alone, and reads an activation.

    None if there is none, or if it has nowhere to put a bias.
    """
    found: dict[fx.Node, Convolution] = {}
    queue: list[tuple[fx.Node, str | None]] = [(output_of(body), None)]
    while queue:
        node, batchnorm = queue.pop()
        module = module_of(body, node)
        if len(node.users) > 1:
            continue
        if is_conv(body, node):
            bent = any(is_activation(body, before) for before in ancestors(node))
            if bent and _fits(body, module, batchnorm):
                found[node] = Convolution(str(node.target), batchnorm)
        elif isinstance(module, nn.BatchNorm2d) and batchnorm is None:
            queue.append((node.all_input_nodes[0], str(node.target)))
        elif isinstance(module, free_layers()) or (_is_sum(node) and batchnorm is None):
            queue += [(source, batchnorm) for source in node.all_input_nodes]
    order = list(body.graph.nodes)
    return found[max(found, key=order.index)] if found else None


def _is_sum(node: fx.Node) -> bool:
    return node.op in ("call_function", "call_method") and node.target in _ADDS and "alpha" not in node.kwargs


def _fits(body: fx.GraphModule, conv: nn.Module | None, batchnorm: str | None) -> bool:
    """Whether the convolution is plain, and there is a bias to change."""
    if not isinstance(conv, nn.Conv2d) or conv.groups != 1 or conv.padding_mode != "zeros":
        return False
    if batchnorm is None:
        return conv.bias is not None
    return _has_shift(body, batchnorm)


def _has_shift(body: fx.GraphModule, batchnorm: str) -> bool:
    """Whether a BatchNorm shifts its channels, by statistics that it keeps."""
    bn = body.get_submodule(batchnorm)
    return bn.bias is not None and bn.running_var is not None


def calls(model: nn.Module, targets: dict[str, str], images: Tensor) -> Counter[str]:
    """How often each name's target is called in a forward pass, in the order in which they first end."""
    found = Counter[str]()
    hooks = [
        model.get_submodule(target).register_forward_hook(lambda *_, name=name: found.update([name]))
        for name, target in targets.items()
    ]
    try:
        model(images)
    except Exception as error:  # the user's code runs: anything can be raised
        shape = tuple(images.shape[1:])
        reason = f"{type(model).__name__} does not run on images of shape {shape}: {first_line(error)}"
        raise BadData(reason) from error
    finally:
        for hook in hooks:
            hook.remove()
    return found


def shares(
    stations: list[Station], original: nn.Module, first: Tensor, positions: int, count: int, most: float = 2.0**30
) -> Iterator[list[Station]]:
    """The stations, in shares whose targets fit into `most` bytes (or single)."""
    whole = targets_at(original, stations, [first], 1 << 30, 0)  # every position of one image
    share: list[Station] = []
    held = 0.0
    for station in stations:
        places, channels = whole[station.name][0].shape
        need = 4.0 * channels * count * min(positions, places)
        if share and held + need > most:
            yield share
            share, held = [], 0.0
        share.append(station)
        held += need
    if share:
        yield share


def targets_at(
    original: nn.Module, stations: list[Station], batches: Iterable[Tensor], positions: int, seed: int
) -> dict[str, list[Tensor]]:
    """What is wanted at the stations' positions: name -> (N * positions, C) of each batch."""
    targets: dict[str, list[Tensor]] = {s.name: [] for s in stations}

    def hook(_: nn.Module, inputs: Any, output: Tensor, name: str) -> None:
        targets[name].append(pick(output, positions, seed, len(targets[name])))

    hooks = [original.get_submodule(s.target).register_forward_hook(partial(hook, name=s.name)) for s in stations]
    for images in batches:
        original(images)
    for handle in hooks:
        handle.remove()
    return targets


class _Stop(Exception):
    """Ends a forward pass where its rest is not needed."""


def output_at(model: nn.Module, images: Tensor, name: str) -> Tensor:
    """What a module gives, in a forward pass that ends there."""
    found: list[Tensor] = []

    def stop(_: nn.Module, inputs: Any, output: Tensor) -> None:
        found.append(output)
        raise _Stop

    hook = model.get_submodule(name).register_forward_hook(stop)
    with contextlib.suppress(_Stop):
        try:
            model(images)
        finally:
            hook.remove()
    return found[0]


def values_at(model: nn.Module, images: Tensor, station: Station) -> tuple[Tensor, Tensor]:
    """A station's output, and the input of its convolution, in one forward pass of the small network."""
    found: list[Tensor] = []

    def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found.append(inputs[0].clone())  # what follows may write into it

    hook = model.get_submodule(station.conv).register_forward_pre_hook(note)
    try:
        return output_at(model, images, station.output), found[0]
    finally:
        hook.remove()
