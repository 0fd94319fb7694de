"""Questions about a traced block: which node is a convolution, an activation, the block's end, what comes after."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from ..errors import NotMergeable
from .affine import Pair

_ACTIVATION_FILES = ("torch.nn.modules.activation", "timm.layers.activations", "timm.layers.activations_me")
_NOT_POINTWISE = (nn.Softmax, nn.Softmax2d, nn.LogSoftmax, nn.Softmin, nn.GLU, nn.MultiheadAttention)
_ACTIVATION_NAMES = (
    "relu",
    "relu_",
    "relu6",
    "silu",
    "gelu",
    "hardswish",
    "hardtanh",
    "leaky_relu",
    "elu",
    "celu",
    "selu",
    "mish",
    "softplus",
    "tanh",
    "sigmoid",
)
_ACTIVATION_CALLS = {getattr(home, n) for n in _ACTIVATION_NAMES for home in (F, torch) if hasattr(home, n)}
_JOINS = {operator.add, operator.iadd, operator.sub, operator.isub, torch.add, torch.sub, torch.cat, torch.concat}
_JOIN_METHODS = {"add", "add_", "sub", "sub_"}
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
    inside = f" in {home[-1][0]} ({home[-1][1].__name__})" if len(home) > 0 and home[-1][0] else ""
    return f"{getattr(node.target, '__name__', node.target)}{inside}"


def input_sizes(traced: fx.GraphModule, input_shape: tuple[int, int, int]) -> dict[str, Pair]:
    """Node name -> (H, W) of its first argument, for an input of `input_shape` (C, H, W).

    Runs on the `meta` device: no arithmetic is done.
    """
    ghost = copy.deepcopy(traced).to("meta")
    ShapeProp(ghost).propagate(torch.empty(2, *input_shape, device="meta", dtype=dtype_of(ghost)))
    shapes = {n.name: n.meta["tensor_meta"].shape for n in ghost.graph.nodes if _has_map(n)}
    first = {n.name: n.all_input_nodes[0].name for n in ghost.graph.nodes if n.all_input_nodes}
    return {name: tuple(shapes[source][2:]) for name, source in first.items() if source in shapes}


def dtype_of(module: nn.Module) -> torch.dtype:
    """The floating dtype of a module's first parameter, float32 if it has none."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)


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
    return (node.op == "call_function" and node.target in _JOINS) or (
        node.op == "call_method" and node.target in _JOIN_METHODS
    )


def is_activation_module(module: nn.Module) -> bool:
    """Whether a layer is an elementwise activation of torch or timm."""
    return type(module).__module__ in _ACTIVATION_FILES and not isinstance(module, _NOT_POINTWISE)


def is_activation(traced: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node is an elementwise activation: a module, a function or a method."""
    module = module_of(traced, node)
    if module is not None:
        return is_activation_module(module)
    if node.op == "call_method":
        return node.target in _ACTIVATION_NAMES
    return node.op == "call_function" and node.target in _ACTIVATION_CALLS


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


def _has_map(node: fx.Node) -> bool:
    meta = node.meta.get("tensor_meta")
    return meta is not None and hasattr(meta, "shape") and len(meta.shape) == 4


def ancestors(node: fx.Node) -> Iterator[fx.Node]:
    """All nodes that a node depends on."""
    seen, queue = {node}, [node]
    while queue:
        for source in queue.pop().all_input_nodes:
            if source not in seen:
                seen.add(source)
                queue.append(source)
                yield source
