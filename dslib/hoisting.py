"""Hoisting: move a block's inner zero padding to the block's input, so that merging is exact.

A depthwise convolution pads *after* the expand convolution's bias, so no single convolution equals the two
near the border. Padding the block's input first, and giving the inner convolutions none, makes the block one
convolution everywhere; shapes stay, finetuning absorbs the change at the border. In training, BatchNorm must
not see the padding: its statistics would depend on the image size.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .affine import NO_PADDING, Pair, Sides
from .tracing import module_of, padding_of, plain_batchnorm


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
            var, mean = torch.var_mean(interior, (0, 2, 3), correction=0)
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
        assert self.num_batches_tracked is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        self.num_batches_tracked.add_(1)
        rate = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, rate)
        self.running_var.lerp_(var * (count / max(count - 1, 1)), rate)


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
        assert conv.bias is not None
        return ChannelPad2d(self.ring, conv.bias)


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


def hoist(traced: fx.GraphModule, sizes: dict[str, Pair] | None = None) -> None:
    """Rewrite a traced block, in place, so that it pads its input and nothing else.

    Every layer is replaced by one that shares its weights under the same name, so `state_dict` keys stay.

    Args:
        traced: a block from `tracing.trace`, its inner activations already out.
        sizes: node name -> (H, W) of its input, from `tracing.input_sizes`; needed for dynamic padding.
    """
    demands = _demands(traced, sizes or {})
    for node in list(traced.graph.nodes):
        rings = {user: ring for (source, user), ring in demands.items() if source is node}
        if node.op == "placeholder":
            _give(traced, node, rings, have=NO_PADDING)
        elif rings:
            _give(traced, node, rings, have=_largest(rings.values()))
    traced.graph.lint()
    traced.recompile()


def _demands(traced: fx.GraphModule, sizes: dict[str, Pair]) -> dict[tuple[fx.Node, fx.Node], Sides]:
    """(source, user) -> how far the user needs the source's map to go on beyond its border."""
    demands: dict[tuple[fx.Node, fx.Node], Sides] = {}
    for node in reversed(traced.graph.nodes):
        ring = _largest(demands.get((node, user), NO_PADDING) for user in node.users)
        module = module_of(traced, node)
        if isinstance(module, nn.Conv2d):
            ring = _through(module, ring, padding_of(module, sizes.get(node.name)))
            traced.set_submodule(str(node.target), _unpadded(module))
        elif isinstance(module, nn.BatchNorm2d) and ring != NO_PADDING:
            ring = _hoist_batchnorm(traced, node, module, ring)
        for source in node.all_input_nodes:
            if node.op != "output" and source.op != "get_attr":
                demands[source, node] = ring
    return demands


def _hoist_batchnorm(traced: fx.GraphModule, node: fx.Node, bn: nn.BatchNorm2d, ring: Sides) -> Sides:
    """Put in the BatchNorm that fits, and return what it needs of its input."""
    source = node.all_input_nodes[0]
    conv = module_of(traced, source)
    pointwise = isinstance(conv, nn.Conv2d) and (conv.kernel_size, conv.stride) == ((1, 1), (1, 1))
    at_start = pointwise and source.all_input_nodes[0].op == "placeholder" and len(source.users) == 1
    if not at_start or padding_of(conv, None) != NO_PADDING:  # type: ignore[arg-type]
        _replace_batchnorm(traced, node, bn, InteriorBatchNorm2d, ring)
        return ring
    _replace_batchnorm(traced, node, bn, PaddingBatchNorm2d, ring)
    if conv.bias is not None:  # type: ignore[union-attr]
        with traced.graph.inserting_before(node):
            node.args = (source, traced.graph.get_attr(f"{source.target}.bias"))
    return NO_PADDING


def _replace_batchnorm(
    traced: fx.GraphModule, node: fx.Node, bn: nn.BatchNorm2d, kind: type[InteriorBatchNorm2d], ring: Sides
) -> None:
    new = plain_batchnorm(bn, kind)
    setattr(new, "ring", ring)  # noqa: B010  (torch types attributes of modules as tensors)
    traced.set_submodule(str(node.target), new)


def _through(conv: nn.Conv2d, ring: Sides, padding: Sides) -> Sides:
    v, h = conv.stride
    left, right, top, bottom = (r * s + p for r, s, p in zip(ring, (h, h, v, v), padding, strict=True))
    return (left, right, top, bottom)


def _unpadded(conv: nn.Conv2d) -> nn.Conv2d:
    """The same convolution without padding, sharing its weights."""
    sizes = (conv.kernel_size, conv.stride, (0, 0), conv.dilation)
    kernel, stride, none, dilation = ((v, h) for v, h in sizes)
    new = nn.Conv2d(
        conv.in_channels, conv.out_channels, kernel, stride, none, dilation, conv.groups, bias=False, device="meta"
    )
    new.weight, new.bias = conv.weight, conv.bias
    return new.train(conv.training)


def _give(traced: fx.GraphModule, node: fx.Node, rings: dict[fx.Node, Sides], have: Sides) -> None:
    """Let every user read the node's map padded (or cropped) from `have` to what the user needs."""
    made: dict[Sides, fx.Node] = {have: node}
    for user, ring in rings.items():
        if ring not in made:
            change = [want - got for want, got in zip(ring, have, strict=True)]
            with traced.graph.inserting_after(node):
                made[ring] = traced.graph.call_function(F.pad, (node, change))
        user.replace_input_with(node, made[ring])


def _largest(rings: Iterable[Sides]) -> Sides:
    left, right, top, bottom = (max(sides) for sides in zip(NO_PADDING, *rings, strict=True))
    return (left, right, top, bottom)
