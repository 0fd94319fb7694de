"""Blocks made linear: their inner activations out, their padding hoisted, one or several in a row."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence

import torch
from torch import fx, nn

from ..errors import BadConfig
from .affine import NO_PADDING, Affine
from .forward import Shape, ghost_of, in_channels
from .graphs import bypass, input_sizes, is_activation, is_conv, removable_activations, tail
from .interpreting import linear_part
from .layers import depends_on_size
from .padding import hoist, resolve_padding
from .tracing import check_layers, trace

SITE_KEY = "dslib_site"  # in the .meta of a shrunk block: the sites that it becomes one convolution with
TakeOut = Callable[[fx.GraphModule, fx.Node], None]
_SPLITS = (torch.chunk, torch.split, operator.getitem, "chunk", "split")


def linear_blocks(
    blocks: Sequence[nn.Module],
    names: Sequence[str],
    input_shapes: Sequence[Shape | None],
    take_out: TakeOut = bypass,
    hoisted: bool = True,
) -> list[fx.GraphModule]:
    """Blocks that follow each other, without their inner activations, sharing their layers with `blocks`.

    In a run of several, the activations that end a block are inner ones too, but for the last block's; and the
    first block pads its input for all of them.

    Args:
        blocks: one or more sites' modules, in order.
        names: their names, for errors.
        input_shapes: (C, H, W) of each; needed only where padding depends on it.
        take_out: what is done to each activation's node; by default it is bypassed.
        hoisted: whether padding is moved to the input of the first; else all stays where it is.
    Raises:
        NotTraceable, NotMergeable: as `tracing.trace` and `padding.hoist` do.
    """
    made: list[fx.GraphModule] = []
    for block, name, shape in zip(blocks, names, input_shapes, strict=True):
        traced = trace(block, name)
        check_layers(traced)
        is_last = len(made) == len(blocks) - 1
        ends = [] if is_last else [node for node in tail(traced) if is_activation(traced, node)]
        sized = any(map(depends_on_size, traced.modules()))
        sizes = input_sizes(traced, shape) if shape and sized else {}
        for node in removable_activations(traced) + ends:
            take_out(traced, node)
        if sized:
            resolve_padding(traced, sizes)
        made.append(traced)
    beyond = NO_PADDING
    for i, traced in reversed(list(enumerate(made))):
        if hoisted:
            beyond = hoist(traced, beyond, first=i == 0)
        traced.delete_all_unused_submodules()
        traced.recompile()
    return made


def merged_shape(
    blocks: Sequence[nn.Module], names: Sequence[str], input_shapes: Sequence[Shape | None], hoisted: bool = True
) -> Affine:
    """What blocks in a row would be merged into, on the `meta` device: shapes only, no bias.

    Raises:
        NotTraceable, NotMergeable: if they cannot be, with the reason.
    """
    ghosts = [ghost_of(block) for block in blocks]
    linear = linear_blocks(ghosts, names, input_shapes, hoisted=hoisted)
    return linear_part(linear, channels_of(linear[0], input_shapes[0]))


def channels_of(block: fx.GraphModule, input_shape: Shape | None) -> int:
    """C_in of a traced block: of its input shape if that is known, else of its first convolution.

    Raises:
        BadConfig: if it splits its input's channels, and the shape is not known.
    """
    if input_shape is not None:
        return input_shape[0]
    after_conv: set[fx.Node] = set()
    for node in block.graph.nodes:
        if is_conv(block, node) or not after_conv.isdisjoint(node.all_input_nodes):
            after_conv.add(node)
        elif node.target in _SPLITS:
            raise BadConfig(f"{node.name} splits the block's channels: pass image_size")
    return in_channels(block)
