"""Questions about a traced block: which node is a convolution, an activation, the block's end, what comes after."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from ..errors import NotMergeable
from .affine import Pair
from .forward import Shape, dtype_of

_ACTIVATION_FILES = ("torch.nn.modules.activation", "timm.layers.activations", "timm.layers.activations_me")
_NOT_POINTWISE = (nn.Softmax, nn.Softmax2d, nn.LogSoftmax, nn.Softmin, nn.GLU, nn.MultiheadAttention)
_ACTIVATION_NAMES = (
    *("relu", "relu_", "relu6", "silu", "gelu", "hardswish", "hardtanh", "leaky_relu"),
    *("elu", "celu", "selu", "mish", "softplus", "tanh", "sigmoid"),
)
_ACTIVATION_CALLS = {getattr(home, n) for n in _ACTIVATION_NAMES for home in (F, torch) if hasattr(home, n)}
_JOINS: set[Any] = {operator.add, operator.iadd, operator.sub, operator.isub, "add", "add_", "sub", "sub_"}
_JOINS |= {torch.add, torch.sub, torch.cat, torch.concat}
BOUNDARY = "boundary"  # the name of the activation that shrinking puts after a block


def maps_of(traced: fx.GraphModule) -> set[fx.Node]:
    """The nodes that depend on the block's input: all but constants and what is computed from parameters alone."""
    found: set[fx.Node] = set()
    for node in traced.graph.nodes:
        if node.op == "placeholder" or any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def module_of(traced: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The layer that a node calls, or None if it calls none."""
    return traced.get_submodule(str(node.target)) if node.op == "call_module" else None


def describe(traced: fx.GraphModule, node: fx.Node) -> str:
    """A node for a message: its name in the block and its type."""
    module = module_of(traced, node)
    if module is not None:
        return f"{node.target} ({type(module).__name__})"
    home = list(node.meta.get("nn_module_stack", {}).values())
    inside = f" in {home[-1][0]} ({home[-1][1].__name__})" if home and home[-1][0] else ""
    return f"{getattr(node.target, '__name__', node.target)}{inside}"


def input_sizes(traced: fx.GraphModule, input_shape: Shape) -> dict[str, Pair]:
    """Node name -> (H, W) of its first argument, for an input of `input_shape` (C, H, W).

    Runs on the `meta` device: no arithmetic is done.
    """
    ghost = copy.deepcopy(traced).to("meta")
    ShapeProp(ghost).propagate(torch.empty(2, *input_shape, device="meta", dtype=dtype_of(ghost)))
    readers = {n.name: n.all_input_nodes[0] for n in ghost.graph.nodes if n.all_input_nodes}
    shapes = {name: getattr(source.meta.get("tensor_meta"), "shape", ()) for name, source in readers.items()}
    return {name: tuple(shape[2:]) for name, shape in shapes.items() if len(shape) == 4}


def is_conv(traced: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node is a two-dimensional convolution."""
    return isinstance(module_of(traced, node), nn.Conv2d)


def first_conv(block: fx.GraphModule) -> nn.Conv2d:
    """The first convolution in the order of the code: as a rule the one that reads the block's input."""
    for node in block.graph.nodes:
        module = module_of(block, node)
        if isinstance(module, nn.Conv2d):
            return module
    raise NotMergeable("the block has no convolution")


def is_join(node: fx.Node) -> bool:
    """Whether a node adds, subtracts or concatenates feature maps, as a call, a method or `+=`."""
    return node.op in ("call_function", "call_method") and node.target in _JOINS


def is_activation_module(module: nn.Module) -> bool:
    """Whether a layer is an elementwise activation of torch or timm."""
    return type(module).__module__ in _ACTIVATION_FILES and not isinstance(module, _NOT_POINTWISE)


def is_activation(traced: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node is an elementwise activation: a module, a function or a method."""
    module = module_of(traced, node)
    if module is not None:
        return is_activation_module(module)
    known = {"call_method": _ACTIVATION_NAMES, "call_function": _ACTIVATION_CALLS}
    return node.target in known.get(node.op, ())


def removable_activations(traced: fx.GraphModule) -> list[fx.Node]:
    """The block's inner activations: those upstream of a convolution, an add or a concatenation, in order."""
    upstream = {source for n in traced.graph.nodes if is_conv(traced, n) or is_join(n) for source in ancestors(n)}
    maps = maps_of(traced)
    return [n for n in traced.graph.nodes if n in upstream and n in maps and is_activation(traced, n)]


def bypass(traced: fx.GraphModule, node: fx.Node) -> None:
    """Take a node out of the graph: its users read its input instead."""
    node.replace_all_uses_with(node.all_input_nodes[0])
    traced.graph.erase_node(node)


def tail(traced: fx.GraphModule) -> list[fx.Node]:
    """The activations at the block's very end, after its last convolution and join, and what follows them, in order."""
    nodes: list[fx.Node] = []
    node = output_of(traced)
    while len(node.users) == len(node.all_input_nodes) == 1 and not (is_conv(traced, node) or is_join(node)):
        nodes.insert(0, node)
        node = node.all_input_nodes[0]
    while nodes and not (is_activation(traced, nodes[0]) or nodes[0].target == BOUNDARY):
        del nodes[0]
    return nodes


def after(traced: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """What the block does after a node, as one module; None if nothing."""
    wanted: list[fx.Node] = []
    for n in reversed(traced.graph.nodes):
        if n is not node and (n.op == "output" or any(user in wanted for user in n.users)):
            wanted.insert(0, n)
    *rest, _ = wanted
    layer = module_of(traced, rest[0]) if len(rest) == 1 else None
    if layer is not None or not rest:
        return layer
    graph = fx.Graph()
    moved = {node: graph.placeholder("x")}
    for n in rest:
        moved[n] = graph.node_copy(n, lambda source: moved[source])
    graph.output(moved[output_of(traced)])
    return fx.GraphModule(traced, graph)


def output_of(traced: fx.GraphModule) -> fx.Node:
    """The node whose value the block returns."""
    return traced.graph.output_node().all_input_nodes[0]


def ancestors(node: fx.Node) -> Iterator[fx.Node]:
    """All nodes that a node depends on."""
    seen, queue = {node}, [node]
    while queue:
        for source in queue.pop().all_input_nodes:
            if source not in seen:
                seen.add(source)
                queue.append(source)
                yield source
