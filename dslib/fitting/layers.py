"""Where a network is fitted to another: which convolutions, in which order, and what is read and wanted there."""

from __future__ import annotations

import contextlib
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import dropwhile, takewhile
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn

from ..algebra import (
    Call,
    after,
    ancestors,
    bypass,
    free_layers,
    from_batchnorm,
    hooked,
    input_shapes,
    is_activation,
    is_activation_module,
    is_conv,
    module_of,
    output_of,
    site_names,
    tail,
    trace,
)
from ..errors import BadConfig, BadData, NotTraceable, first_line
from ..sites import Plan
from .least_squares import pick

_ADDS = (operator.add, operator.iadd, torch.add, "add", "add_")


class Opened(nn.Module):
    """A block in two parts: what it computes before the activations at its end, and these.

    Args:
        traced: the block, from `trace`; its layers are shared.
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
class FittedLayer:
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
    before: tuple[FittedLayer, ...] = ()

    def is_folded(self, network: nn.Module) -> bool:
        """Whether the convolution's own bias shifts the output, its BatchNorm (if any) being folded into it."""
        norm = None if self.batchnorm is None else network.get_submodule(self.batchnorm)
        return conv_at(network, self.conv).bias is not None and not isinstance(norm, nn.BatchNorm2d)

    def change(self, fast: nn.Module, small: nn.Module, weight: Tensor, bias: Tensor) -> None:
        """Add to the convolution, in place, what changes its output by that of a convolution of `weight` and `bias`.

        Args:
            fast: the small network, BatchNorms folded.
            small: the same with its BatchNorms; one that switched a channel off (scale 0) leaves it as it is, in both.
            weight, bias: (C_out, C_in / groups, k_v, k_h) and (C_out,).
        """
        folded, conv = conv_at(fast, self.conv), conv_at(small, self.conv)
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


def conv_at(network: nn.Module, name: str) -> nn.Conv2d:
    """A network's convolution by its name."""
    found = network.get_submodule(name)
    assert isinstance(found, nn.Conv2d)
    return found


def open_blocks(
    original: nn.Module, small: nn.Module, plan: Plan, first: Tensor, refit: bool, match: bool, reach: int | None
) -> tuple[list[FittedLayer], dict[str, nn.Module]]:
    """What is to be fitted, in the order of the forward pass. Blocks are replaced by `Opened` ones, in both networks.

    Returns:
        The layers; and the small network's kept blocks, to be put back in the end.
    Raises:
        BadConfig: if a removed block is not called exactly once.
    """
    layers = _open_removed(original, plan)
    near = within_reach(site_names(model=original), plan.mask.removed, reach) if refit else []
    opened, kept = _open_kept(original, small, input_shapes(small, near, first.shape[-1]), match)
    return _in_order(original, layers | opened, plan.dropped, first), kept


def _open_removed(original: nn.Module, plan: Plan) -> dict[str, FittedLayer]:
    """For each removed site or run, by its last block: the convolution that stands for it."""
    layers = {}
    for names in plan.groups:
        if is_activation_module(original.get_submodule(names[0])):
            continue  # a single one, outside blocks: there is nothing to fit
        first, last = names[0], names[-1]
        original.set_submodule(last, Opened(trace(original.get_submodule(last), last)))
        layers[last] = FittedLayer(last, f"{first}.conv", f"{first}.conv", f"{last}.body", removed=True)
    return layers


def _open_kept(
    original: nn.Module, small: nn.Module, names: Iterable[str], match: bool
) -> tuple[dict[str, FittedLayer], dict[str, nn.Module]]:
    """For each of these kept blocks that can be adjusted: its last convolution; and the blocks that were replaced."""
    layers, kept = {}, {}
    for name in names:
        try:
            ours, theirs = (Opened(trace(net.get_submodule(name), name)) for net in (small, original))
        except NotTraceable:
            continue  # it stays as it is
        last = last_convolution(ours.body)
        if last is None:
            continue
        kept[name] = small.get_submodule(name)
        small.set_submodule(name, ours)
        original.set_submodule(name, theirs)
        body = f"{name}.body"
        others = normalised_before(ours.body, last) if match else []
        before = tuple(_adjusted(body, other, f"{body}.{other.conv}") for other in others)
        layers[name] = replace(_adjusted(body, last, body), name=name, before=before)
    return layers, kept


def _adjusted(body: str, found: Convolution, output: str) -> FittedLayer:
    batchnorm = f"{body}.{found.batchnorm}" if found.batchnorm else None
    return FittedLayer(output, f"{body}.{found.conv}", output, output, removed=False, batchnorm=batchnorm)


def _in_order(
    original: nn.Module, layers: Mapping[str, FittedLayer], dropped: Iterable[str], first: Tensor
) -> list[FittedLayer]:
    """The layers as a forward pass comes to them, from the first change of the network on."""
    gone = dict.fromkeys(dropped)
    called = calls(original, {name: s.target for name, s in layers.items()} | {name: name for name in gone}, first)
    for name in (layer.name for layer in layers.values() if layer.removed):
        if called[name] != 1:
            raise BadConfig(f"{name} is called {called[name]} times in a forward pass, expected once: keep it")
    changed = dropwhile(lambda name: name not in gone and not layers[name].removed, called)
    return [layers[name] for name in changed if name not in gone and called[name] == 1]


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
    return conv.bias is not None if batchnorm is None else _has_shift(body, batchnorm)


def _has_shift(body: fx.GraphModule, batchnorm: str) -> bool:
    """Whether a BatchNorm shifts its channels, by statistics that it keeps."""
    bn = body.get_submodule(batchnorm)
    return bn.bias is not None and bn.running_var is not None


def calls(model: nn.Module, targets: Mapping[str, str], images: Tensor) -> Counter[str]:
    """How often each name's target is called in a forward pass, in the order in which they first end."""
    found, names = Counter[str](), {target: name for name, target in targets.items()}
    try:
        with hooked(model, names, after=lambda call: found.update([names[call.name]])):
            model(images)
    except Exception as error:  # the user's code runs: anything can be raised
        shape = tuple(images.shape[1:])
        reason = f"{type(model).__name__} does not run on images of shape {shape}: {first_line(error)}"
        raise BadData(reason) from error
    return found


def in_shares(
    layers: list[FittedLayer], original: nn.Module, first: Tensor, positions: int, count: int, most: float = 2.0**30
) -> Iterator[list[FittedLayer]]:
    """The layers, in shares whose targets fit into `most` bytes (or single)."""
    whole = targets_at(original, layers, [first], 1 << 30, 0)  # every position of one image
    share: list[FittedLayer] = []
    held = 0.0
    for layer in layers:
        places, channels = whole[layer.name][0].shape
        need = 4.0 * channels * count * min(positions, places)
        if share and held + need > most:
            yield share
            share, held = [], 0.0
        share.append(layer)
        held += need
    if share:
        yield share


def outputs_at(
    original: nn.Module, layers: Iterable[FittedLayer], batches: Iterable[Tensor], take: Callable[[str, Tensor], None]
) -> None:
    """Run the original on batches; `take` gets each layer's name and what its target gives, one batch after another."""
    names = {layer.target: layer.name for layer in layers}
    with hooked(original, names, after=lambda call: take(names[call.name], call.output)):
        for images in batches:
            original(images)


def targets_at(
    original: nn.Module, layers: list[FittedLayer], batches: Iterable[Tensor], positions: int, seed: int
) -> dict[str, list[Tensor]]:
    """What is wanted at the layers' positions: name -> (N * positions, C) of each batch."""
    targets: dict[str, list[Tensor]] = {layer.name: [] for layer in layers}

    def take(name: str, output: Tensor) -> None:
        targets[name].append(pick(output, positions, seed, len(targets[name])))

    outputs_at(original, layers, batches, take)
    return targets


class _Stop(Exception):
    """Ends a forward pass where its rest is not needed."""


def output_at(model: nn.Module, images: Tensor, name: str) -> Tensor:
    """What a module gives, in a forward pass that ends there."""
    found: list[Tensor] = []

    def stop(call: Call) -> None:
        found.append(call.output)
        raise _Stop

    with contextlib.suppress(_Stop), hooked(model, [name], after=stop):
        model(images)
    return found[0]


def values_at(model: nn.Module, images: Tensor, layer: FittedLayer) -> tuple[Tensor, Tensor]:
    """A layer's output, and the input of its convolution, in one forward pass of the small network."""
    read: list[Tensor] = []  # cloned: what follows may write into it
    with hooked(model, [layer.conv], before=lambda call: read.append(call.args[0].clone())):
        return output_at(model, images, layer.output), read[0]
