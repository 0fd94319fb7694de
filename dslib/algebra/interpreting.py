"""Running a traced block on an `Affine` in place of a tensor.

This one interpreter decides which blocks can be merged, predicts merged shapes (on the `meta` device),
does the merge, folds what has nothing to remove, and writes the reasons of what cannot be merged.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..errors import NotMergeable, NotTraceable, first_line
from . import affine
from .affine import Affine, Pair
from .graphs import describe, tail
from .layers import free_layers, from_avgpool, from_batchnorm, from_conv, pad_sides, padding_of, value, why_not
from .padding import PaddingBatchNorm2d
from .tracing import trace

Shift = Callable[[Affine, Tensor], Affine]
Seen = tuple[nn.Conv2d, Pair]  # a convolution, and its output's stride in the whole map

# method of `Interpreter` -> the functions, and the names of a tensor's methods, that it does
_OPERATIONS: dict[str, tuple[Any, ...]] = {
    "add": (operator.add, operator.iadd, torch.add, "add", "add_"),
    "sub": (operator.sub, operator.isub, torch.sub, "sub", "sub_"),
    "mul": (operator.mul, operator.imul, torch.mul, "mul", "mul_"),
    "div": (operator.truediv, torch.div, "div"),
    "neg": (operator.neg, torch.neg, "neg"),
    "cat": (torch.cat, torch.concat),
    "chunk": (torch.chunk, "chunk"),
    "split": (torch.split, "split"),
    "getitem": (operator.getitem,),
    "pad": (F.pad,),
    "same": (torch.clone, "clone", "contiguous"),
    "channel_shuffle": ("channel_shuffle",),
}
_METHOD_OF = {call: method for method, calls in _OPERATIONS.items() for call in calls}


def interpret_run(
    blocks: Sequence[fx.GraphModule], start: Affine, shift: Shift = affine.shift, seen: list[Seen] | None = None
) -> Affine:
    """The affine map that blocks in a row compute in eval, up to the activations at their ends, after the map `start`.

    Args:
        blocks: from `tracing.trace`, their activations out, weights of any device; `meta` gives shapes only.
        start: what is applied before the first, as a rule `start_of(channels, block)`.
        shift: how a constant is added to a map; `linear_part` and `ones_response` have their own ways.
        seen: a list to put the convolutions in that were passed.
    Returns:
        The map in float64 (on the CPU, or on `meta`).
    Raises:
        NotMergeable: naming the first operation that is not affine, its type and why.
    """
    for block in blocks:
        interpreter = Interpreter(block, shift)
        found = interpreter.run(start)
        if seen is not None:
            seen += interpreter.seen
        if not isinstance(found, Affine):
            raise NotMergeable(f"the block gives a {type(found).__name__}: expected one feature map")
        start = found
    return start


def start_of(channels: int, block: nn.Module) -> Affine:
    """The map that does nothing, where a block's weights have values on the CPU, else on `meta`."""
    return affine.identity(channels, device="meta" if any(p.is_meta for p in block.parameters()) else "cpu")


def linear_part(blocks: Sequence[fx.GraphModule], channels: int, seen: list[Seen] | None = None) -> Affine:
    """The blocks without their constants, f(x) - f(0): zero padding then stands wherever it stands."""
    return interpret_run(blocks, start_of(channels, blocks[0]), lambda whole, _: whole, seen)


def ones_response(blocks: Sequence[fx.GraphModule], channels: int) -> Affine:
    """f(0) as a convolution of an image of ones, (C_out, 1, k_v, k_h): right at the border for every image size."""
    one = start_of(channels, blocks[0]).weight
    return interpret_run(blocks, Affine(one.new_zeros(channels, 1, 1, 1)), affine.shift_by_ones)


def macs_of(seen: Sequence[Seen], whole: Affine) -> float:
    """Multiply-accumulates of convolutions per output pixel of `whole`, borders ignored."""
    pixels = whole.stride[0] * whole.stride[1]
    return sum(conv.weight.numel() * pixels / (v * h) for conv, (v, h) in seen)


class Interpreter(fx.Interpreter):
    """Runs a traced block on maps. Values are `Affine` maps, tuples of them (after a chunk), and constants."""

    def __init__(self, traced: fx.GraphModule, shift: Shift) -> None:
        super().__init__(traced)
        self.extra_traceback = False
        self.traced, self.shift, self.ends = traced, shift, tail(traced)
        self.seen: list[Seen] = []

    def run_node(self, n: fx.Node) -> Any:
        """The node's value; a refusal names the node and its type."""
        if n in self.ends:
            return self.env[n.all_input_nodes[0]]
        try:
            return super().run_node(n)
        except NotMergeable as error:
            raise NotMergeable(f"{describe(self.traced, n)}: {error}") from error

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A layer, applied to a map."""
        module = self.traced.get_submodule(str(target))
        whole = args[0] if args else None
        if not isinstance(whole, Affine):
            raise NotMergeable("expected one feature map as its input")
        if isinstance(module, nn.Conv2d):
            whole = self._then(whole, from_conv(module, padding_of(module)))
            self.seen.append((module, whole.stride))
            return whole
        if isinstance(module, PaddingBatchNorm2d):
            if not whole.pointwise:
                raise NotMergeable(f"expected a pointwise map before it, found kernel {whole.kernel}")
            return affine.pad_input(self._then(whole, from_batchnorm(module)), module.ring)
        if isinstance(module, nn.BatchNorm2d):
            return self._then(whole, from_batchnorm(module))
        if isinstance(module, nn.AvgPool2d):
            return self._then(whole, from_avgpool(module, len(whole.weight), padding_of(module), whole.weight))
        if isinstance(module, nn.ZeroPad2d):
            return affine.pad_output(whole, module.padding)
        if isinstance(module, free_layers()):
            return whole
        if type(module).__module__.startswith("torch.nn"):
            raise _not_affine(type(module).__name__)
        return self._own_layer(module, whole)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A function; one of constants is simply computed."""
        if not _holds_map((args, *kwargs.values())):
            try:
                return target(*args, **kwargs)
            except RuntimeError as error:
                raise NotMergeable(f"cannot be computed from constants ({first_line(error)})") from error
        name = getattr(target, "__name__", str(target))
        return self._dispatch("channel_shuffle" if name == "channel_shuffle" else target, name, args, kwargs)

    def call_method(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A tensor's method; one of a constant is simply computed."""
        if not _holds_map((args, *kwargs.values())):
            return super().call_method(target, args, kwargs)
        return self._dispatch(target, str(target), args, kwargs)

    def _own_layer(self, module: nn.Module, whole: Affine) -> Affine:
        """A layer of the user's or another library's own, such as a learned scale: what its code does to each pixel."""
        kind = type(module).__name__
        if why_not(kind):
            raise _not_affine(kind)
        try:
            run = Interpreter(trace(copy.deepcopy(module)), affine.shift)
            run.ends = []  # an activation at its end is not the block's
            layer = run.run(affine.identity(len(whole.weight), device=str(whole.weight.device)))
        except (NotMergeable, NotTraceable) as error:
            raise NotMergeable(f"is not affine in the feature map ({error})") from error
        if not (isinstance(layer, Affine) and layer.pointwise and layer.padding == affine.NO_PADDING):
            raise NotMergeable("computes over several pixels in its own code: write it with layers of torch.nn")
        return self._then(whole, layer)

    def _dispatch(self, call: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if call not in _METHOD_OF:
            raise _not_affine(name)
        try:
            return getattr(self, f"_{_METHOD_OF[call]}")(*args, **kwargs)
        except (TypeError, ValueError, IndexError) as error:
            raise NotMergeable(f"is called in a way that is not known to be affine ({error})") from error

    def _then(self, first: Affine, layer: Affine) -> Affine:
        whole = affine.compose(first, replace(layer, bias=None))
        return whole if layer.bias is None else self.shift(whole, layer.bias)

    def _add(self, a: Any, b: Any, *, alpha: float = 1) -> Affine:
        if alpha != 1:
            b = self._mul(b, alpha) if isinstance(b, Affine) else b * alpha
        if isinstance(a, Affine) and isinstance(b, Affine):
            return affine.add(a, b)
        whole, constant = (a, b) if isinstance(a, Affine) else (b, a)
        if isinstance(constant, (int, float)) and constant == 0:
            return whole
        return self.shift(whole, _per_channel(constant, whole))

    def _sub(self, a: Any, b: Any, *, alpha: float = 1) -> Affine:
        return self._add(a, b, alpha=-alpha)

    def _mul(self, a: Any, b: Any) -> Affine:
        if isinstance(a, Affine) and isinstance(b, Affine):
            raise _not_affine("mul")
        whole, factor = (a, b) if isinstance(a, Affine) else (b, a)
        return affine.scale(whole, _per_channel(factor, whole))

    def _div(self, a: Any, b: Any) -> Affine:
        if isinstance(b, Affine):
            raise NotMergeable("is not affine: it divides by a feature map")
        return self._mul(a, 1 / b)

    def _neg(self, a: Affine) -> Affine:
        return self._mul(a, -1)

    def _same(self, a: Affine, **_: Any) -> Affine:
        return a

    def _pad(self, a: Affine, *args: Any, **kwargs: Any) -> Affine:
        return affine.pad_output(a, pad_sides(args, kwargs))

    def _cat(self, tensors: Sequence[Any], dim: int = 0) -> Affine:
        _check_channels(dim)
        if not all(isinstance(m, Affine) for m in tensors):
            raise NotMergeable("concatenates a constant to a feature map")
        return affine.concat(list(tensors))

    def _chunk(self, a: Affine, chunks: int, dim: int = 0) -> tuple[Affine, ...]:
        return self._split(a, -(-len(a.weight) // chunks), dim)

    def _split(self, a: Affine, split_size_or_sections: Any, dim: int = 0) -> tuple[Affine, ...]:
        _check_channels(dim)
        parts = torch.arange(len(a.weight)).split(split_size_or_sections)
        return tuple(affine.select(a, part.tolist()) for part in parts)

    def _getitem(self, a: Any, index: Any) -> Any:
        if not isinstance(a, Affine):
            return a[index]
        parts = list(index) if isinstance(index, tuple) else [index]
        if parts.count(...) == 1:
            place = parts.index(...)
            parts[place : place + 1] = [slice(None)] * (5 - len(parts))
        channels = parts[1] if len(parts) > 1 else None
        if not isinstance(channels, slice) or any(part != slice(None) for i, part in enumerate(parts) if i != 1):
            raise NotMergeable("is not affine in the feature map: only channels can be sliced")
        return affine.select(a, list(range(len(a.weight)))[channels])

    def _channel_shuffle(self, a: Affine, groups: int) -> Affine:
        return affine.select(a, torch.arange(len(a.weight)).reshape(groups, -1).T.flatten().tolist())


def _holds_map(args: Any) -> bool:
    return any(isinstance(a, Affine) or (isinstance(a, (tuple, list)) and _holds_map(a)) for a in args)


def _not_affine(name: str) -> NotMergeable:
    why = why_not(name)
    return NotMergeable(f"is not affine{f': it {why}' if why else ' in the feature map'}")


def _check_channels(dim: int) -> None:
    if dim not in (1, -3):
        raise NotMergeable(f"is affine over channels (dimension 1) only, found dimension {dim}")


def _per_channel(constant: Any, whole: Affine) -> Tensor:
    """A number, or a tensor of one value a channel that broadcasts over a feature map, as (C_out,)."""
    channels = len(whole.weight)
    if isinstance(constant, (int, float)):
        return whole.weight.new_full((channels,), float(constant))
    if not isinstance(constant, Tensor):
        raise NotMergeable(f"expected a number or one value a channel, found {type(constant).__name__}")
    number = value(constant).to(whole.weight.device)
    if constant.numel() == 1:
        return number.reshape(1).expand(channels)
    shape = tuple(constant.shape)
    if shape not in ((channels, 1, 1), (1, channels, 1, 1)):
        raise NotMergeable(f"expected a number or one value a channel, found a tensor of shape {shape}")
    return number.reshape(channels)
