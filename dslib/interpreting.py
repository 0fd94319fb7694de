"""Running a traced block on an `Affine` in place of a tensor.

This one interpreter decides which blocks can be merged, predicts merged shapes (on the `meta` device),
does the merge, and writes the reasons of those that cannot be merged.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from . import affine
from .affine import Affine, Sides
from .errors import NotMergeable
from .hoisting import PaddingBatchNorm2d
from .tracing import is_add, module_of, output_of, padding_of, tail

_FREE_CALLS = {torch.clone}
_FREE_METHODS = {"contiguous", "clone"}


def interpret(traced: fx.GraphModule, channels: int) -> Affine:
    """The affine map that a block computes in eval, up to the activations at its very end.

    Args:
        traced: a block from `tracing.trace` (activations out, padding hoisted), weights of any device;
            on `meta` only shapes come out.
        channels: C_in of the block's input.
    Returns:
        The map in float64 (on the CPU, or on `meta`).
    Raises:
        NotMergeable: naming the first operation that is not affine, its type and why.
    """
    ends = tail(traced)
    last = ends[0].all_input_nodes[0] if ends else output_of(traced)
    device = "meta" if any(p.is_meta for p in traced.parameters()) else "cpu"
    values: dict[fx.Node, Affine] = {}
    for node in traced.graph.nodes:
        if node.op == "placeholder" and not values:
            values[node] = affine.identity(channels, device=device)
        elif node.op not in ("placeholder", "get_attr", "output") and node not in ends:
            values[node] = _named(traced, node, values)
    return values[last]


def _named(traced: fx.GraphModule, node: fx.Node, values: dict[fx.Node, Affine]) -> Affine:
    try:
        return _step(traced, node, values)
    except NotMergeable as error:
        raise NotMergeable(f"{_describe(traced, node)}: {error}") from error


def _step(traced: fx.GraphModule, node: fx.Node, values: dict[fx.Node, Affine]) -> Affine:
    inputs = [values[n] for n in node.all_input_nodes if n in values]
    module = module_of(traced, node)
    if module is not None:
        return _apply_module(module, inputs[0])
    if is_add(node) and len(inputs) == 2:
        return affine.add(*inputs)
    if node.op == "call_function" and node.target is F.pad:
        return affine.pad_output(inputs[0], _pad_sides(node))
    if (node.op == "call_function" and node.target in _FREE_CALLS) or (
        node.op == "call_method" and node.target in _FREE_METHODS
    ):
        return inputs[0]
    raise NotMergeable("is not affine in the feature map")


def _apply_module(module: nn.Module, value: Affine) -> Affine:
    if isinstance(module, nn.Conv2d):
        return affine.compose(value, affine.from_conv(module, padding_of(module, None)))
    if isinstance(module, PaddingBatchNorm2d):
        if not value.pointwise:
            raise NotMergeable(f"expected a pointwise map before it, found kernel {value.kernel}")
        return affine.pad_input(affine.compose(value, affine.from_batchnorm(module)), module.ring)
    if isinstance(module, nn.BatchNorm2d):
        return affine.compose(value, affine.from_batchnorm(module))
    if isinstance(module, nn.ZeroPad2d):
        left, right, top, bottom = module.padding
        return affine.pad_output(value, (left, right, top, bottom))
    if isinstance(module, _free_modules()):
        return value
    raise NotMergeable("is not affine in the feature map")


def _free_modules() -> tuple[type[nn.Module], ...]:
    """Layers that do nothing in eval."""
    from timm.layers import DropBlock2d, DropPath
    from torchvision.ops import StochasticDepth

    return (nn.Identity, nn.Dropout, nn.Dropout2d, nn.AlphaDropout, StochasticDepth, DropPath, DropBlock2d)


def _pad_sides(node: fx.Node) -> Sides:
    sides = node.args[1] if len(node.args) > 1 else node.kwargs["pad"]
    rest: tuple[Any, ...] = tuple(node.args[2:]) + tuple(v for k, v in node.kwargs.items() if k in ("mode", "value"))
    if any(value not in ("constant", 0, 0.0, None) for value in rest) or len(sides) != 4:  # type: ignore[arg-type]
        raise NotMergeable("only zero padding on four sides is affine")
    left, right, top, bottom = sides  # type: ignore[misc]
    return (left, right, top, bottom)  # type: ignore[return-value]


def _describe(traced: fx.GraphModule, node: fx.Node) -> str:
    module = module_of(traced, node)
    if module is not None:
        return f"{node.target} ({type(module).__name__})"
    home = list(node.meta.get("nn_module_stack", {}).values())
    inside = f" in {home[-1][0]} ({home[-1][1].__name__})" if len(home) > 0 and home[-1][0] else ""
    return f"{getattr(node.target, '__name__', node.target)}{inside}"
