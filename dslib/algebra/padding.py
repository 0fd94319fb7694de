"""Hoisting: move a block's inner zero padding to the block's input, so that merging is exact.

A depthwise convolution pads *after* the expand convolution's bias, so no single convolution equals the two
near the border. Padding the block's input first, and giving the inner convolutions none, makes the block one
convolution everywhere; shapes stay, finetuning absorbs the change at the border. In training, BatchNorm must
not see the padding: its statistics would depend on the image size.

A block of two 3 x 3 convolutions and a shortcut, read from its end: by how many pixels each map must go on beyond its
border, for those that read it.

    before      x --+------ a (pads 1) --- bn --- b (pads 1) --- + --- y
                    +--------------------------------------------+
    required    2 by a,     1              1      0              0
                0 by +
    after       pad by 2 -+- a ----------- bn' -- b ------------ + --- y      bn' does not count a ring of 1
                          +- crop by 2 --------------------------+
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..errors import NotMergeable
from .affine import NO_PADDING, Pair, Sides, add_sides, scale_sides
from .graphs import bypass, describe, maps_of, module_of, tail
from .layers import depends_on_size, pad_sides, padding_of, unpadded
from .tracing import plain_batchnorm


class InteriorBatchNorm2d(nn.BatchNorm2d):
    """A BatchNorm whose batch statistics leave out a ring of hoisted padding.

    Input and output (N, C, H, W); the outer `ring` (left, right, top, bottom) of the input is normalised
    like the rest but not counted.
    """

    ring: Sides = NO_PADDING

    def forward(self, x: Tensor) -> Tensor:
        """The normalised map."""
        scale, shift = self._scale_shift(F.pad(x, [-side for side in self.ring]))
        return torch.addcmul(shift, x, scale)

    def folded(self, conv: nn.Conv2d) -> nn.Module:
        """What is left of this layer in eval once its scale and shift are in `conv`: nothing."""
        return nn.Sequential()

    def extra_repr(self) -> str:
        """The layer's settings, the ring among them."""
        return f"{super().extra_repr()}, ring={self.ring}"

    def _scale_shift(self, interior: Tensor) -> tuple[Tensor, Tensor]:
        """gamma / std and beta - mean * gamma / std, (1, C, 1, 1) each; running statistics move in train."""
        if self.training or self.running_mean is None or self.running_var is None:
            wide = interior.to(torch.promote_types(interior.dtype, torch.float32))  # as BatchNorm: half is too coarse
            var, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
            if self.training and self.track_running_stats:
                self._track(mean.detach(), var.detach(), interior.numel() // interior.shape[1])
        else:
            var, mean = self.running_var, self.running_mean
        scale = torch.rsqrt(var + self.eps)
        if self.weight is not None:
            scale = scale * self.weight
        shift = -mean * scale if self.bias is None else self.bias - mean * scale
        return scale.reshape(1, -1, 1, 1), shift.reshape(1, -1, 1, 1)

    def _track(self, mean: Tensor, var: Tensor, count: int) -> None:
        batches = self.get_buffer("num_batches_tracked").add_(1)
        rate = 1 / float(batches) if self.momentum is None else self.momentum
        for name, found in (("running_mean", mean), ("running_var", var * (count / max(count - 1, 1)))):
            running = self.get_buffer(name)
            running.lerp_(found.to(running), rate)


class PaddingBatchNorm2d(InteriorBatchNorm2d):
    """A BatchNorm that then pads by `ring` with what it makes of the preceding layer's answer to zeros.

    After a pointwise convolution that is the very function that padding the block's input with zeros gives,
    without computing the expand convolution on the padding: (N, C, H, W) -> (N, C, H + top + bottom, ...).
    """

    def forward(self, x: Tensor, response: Tensor | None = None) -> Tensor:
        """The normalised and padded map; `response` (C,) is the preceding convolution's bias, if any."""
        scale, shift = self._scale_shift(x)
        # pad(x * scale - constant) + constant, written so that the map is passed over only once before padding
        if response is None:
            return F.pad(x * scale, self.ring) + shift
        response = response.reshape(1, -1, 1, 1)
        return torch.addcmul(shift, F.pad(x - response, self.ring) + response, scale)

    def folded(self, conv: nn.Conv2d) -> nn.Module:
        """The padding alone."""
        return ChannelPad2d(self.ring, conv.get_parameter("bias"))


class ChannelPad2d(nn.Module):
    """Padding by one constant per channel: what is left of a `PaddingBatchNorm2d` once it is folded.

    Args:
        ring: (left, right, top, bottom).
        constant: (C,), the folded convolution's bias, which is its answer to zeros.
    """

    def __init__(self, ring: Sides, constant: Tensor) -> None:
        super().__init__()
        self.ring = ring
        self.register_buffer("constant", constant.detach().reshape(1, -1, 1, 1))

    def forward(self, x: Tensor, response: Tensor | None = None) -> Tensor:
        """The padded map; `response` is not needed any more."""
        constant = self.get_buffer("constant")
        return F.pad(x - constant, self.ring) + constant


def hoist(traced: fx.GraphModule, beyond: Sides = NO_PADDING, first: bool = True) -> Sides:
    """Rewrite a traced block's graph, in place, so that it pads its input and nothing else.

    Every layer is replaced by one that shares its weights under the same name, so `state_dict` keys stay.

    Args:
        traced: a block from `tracing.trace`, its inner activations out and its padding resolved.
        beyond: how far its output must go on beyond its border, for a block after it that does not pad by itself.
        first: whether it pads its input by itself; else it expects an input that goes on beyond its border.
    Returns:
        How far that input must go on beyond its border; nothing if it pads by itself.
    """
    required = required_padding(traced, beyond, first)
    ends = tail(traced)
    pads = [n for n in traced.graph.nodes if n not in ends and _explicit_padding(traced, n) is not None]
    expected = NO_PADDING
    for node in list(traced.graph.nodes):
        if node.op == "placeholder" and required[node]:
            expected = NO_PADDING if first else _largest(required[node].values())
            _pad_for_users(traced, node, required[node], available=expected)
        elif required[node] and not _is_tuple(node):
            source = next((source for source in node.all_input_nodes if _is_tuple(source)), node)
            _pad_for_users(traced, node, required[node], available=_largest(required[source].values()))
    for node in pads:
        bypass(traced, node)
    traced.graph.lint()
    return expected


def required_padding(traced: fx.GraphModule, beyond: Sides, first: bool) -> dict[fx.Node, dict[fx.Node, Sides]]:
    """Node -> user -> how far that user needs the node's map to go on beyond its border.

    Found from the block's end to its input; on the way each layer loses its own padding.
    """
    required = defaultdict[fx.Node, dict[fx.Node, Sides]](dict)
    maps, ends = maps_of(traced), tail(traced)
    for node in reversed(traced.graph.nodes):
        sides = beyond if node.op == "output" else _largest(required[node].values())
        try:
            sides = sides if node in ends else _required_of_input(traced, node, sides, first)
        except NotMergeable as error:
            raise NotMergeable(f"{describe(traced, node)}: {error}") from error
        for source in maps.intersection(node.all_input_nodes):
            required[source][node] = sides
    return required


def _required_of_input(traced: fx.GraphModule, node: fx.Node, sides: Sides, first: bool) -> Sides:
    """How far a node needs its input to go on so that its output goes on by `sides`; its layer's padding goes."""
    module = module_of(traced, node)
    explicit = _explicit_padding(traced, node)
    if isinstance(module, (nn.Conv2d, nn.AvgPool2d)):
        stride = module.stride if isinstance(module.stride, tuple) else (module.stride, module.stride)
        sides = add_sides(scale_sides(sides, stride), padding_of(module))
        traced.set_submodule(str(node.target), unpadded(module))
    elif explicit is not None:
        sides = add_sides(sides, explicit)
    elif isinstance(module, nn.BatchNorm2d) and sides != NO_PADDING:
        sides = _hoist_batchnorm(traced, node, module, sides, first)
    return sides


def _hoist_batchnorm(traced: fx.GraphModule, node: fx.Node, bn: nn.BatchNorm2d, ring: Sides, first: bool) -> Sides:
    """Put in the BatchNorm that fits, and return what it needs of its input."""
    source = node.all_input_nodes[0]
    conv = module_of(traced, source)
    if first and isinstance(conv, nn.Conv2d) and _starts_pointwise(source, conv):
        _replace_batchnorm(traced, node, bn, PaddingBatchNorm2d, ring)
        if conv.bias is not None:
            with traced.graph.inserting_before(node):
                node.args = (source, traced.graph.get_attr(f"{source.target}.bias"))
        return NO_PADDING
    _replace_batchnorm(traced, node, bn, InteriorBatchNorm2d, ring)
    return ring


def _starts_pointwise(node: fx.Node, conv: nn.Conv2d) -> bool:
    """Whether a convolution reads one pixel each of the block's input, and only one layer reads what it gives."""
    pointwise = conv.kernel_size == conv.stride == (1, 1)
    at_start = node.all_input_nodes[0].op == "placeholder" and len(node.users) == 1
    return pointwise and at_start and padding_of(conv) == NO_PADDING


def _replace_batchnorm(
    traced: fx.GraphModule, node: fx.Node, bn: nn.BatchNorm2d, kind: type[InteriorBatchNorm2d], ring: Sides
) -> None:
    new = plain_batchnorm(bn, kind)
    setattr(new, "ring", ring)  # noqa: B010  (torch types attributes of modules as tensors)
    traced.set_submodule(str(node.target), new)


def resolve_padding(traced: fx.GraphModule, sizes: dict[str, Pair]) -> None:
    """Write padding that depends on the input's size (`Conv2dSame`, `ceil_mode`) as padding of fixed sides, in place.

    Args:
        traced: a block from `tracing.trace`.
        sizes: node name -> (H, W) of its input, from `graphs.input_sizes`.
    """
    for node in list(traced.graph.nodes):
        layer = module_of(traced, node)
        if isinstance(layer, (nn.Conv2d, nn.AvgPool2d)) and depends_on_size(layer):
            sides = padding_of(layer, sizes.get(node.name))
            traced.set_submodule(str(node.target), unpadded(layer))
            with traced.graph.inserting_before(node):
                node.args = (traced.graph.call_function(F.pad, (node.args[0], sides)),)


def _explicit_padding(traced: fx.GraphModule, node: fx.Node) -> Sides | None:
    """The sides that an explicit zero padding in the block's own code adds; None for any other node."""
    module = module_of(traced, node)
    if isinstance(module, nn.ZeroPad2d):
        return module.padding
    if node.op == "call_function" and node.target is F.pad:
        return pad_sides(node.args[1:], node.kwargs)
    return None


def _is_tuple(node: fx.Node) -> bool:
    """Whether a node gives several maps (a chunk): what reads it picks one."""
    return any(user.target is operator.getitem and isinstance(user.args[1], int) for user in node.users)


def _pad_for_users(traced: fx.GraphModule, node: fx.Node, required: dict[fx.Node, Sides], available: Sides) -> None:
    """Let every user read the node's map padded (or cropped) from what is available to what the user requires."""
    made: dict[Sides, fx.Node] = {available: node}
    for user, sides in required.items():
        if sides not in made:
            change = [want - have for want, have in zip(sides, available, strict=True)]
            with traced.graph.inserting_after(node):
                made[sides] = traced.graph.call_function(F.pad, (node, change))
        user.replace_input_with(node, made[sides])


def _largest(sides: Iterable[Sides]) -> Sides:
    return tuple(max(side) for side in zip(NO_PADDING, *sides, strict=True))
