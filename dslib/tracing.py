"""Blocks as graphs: recording a block's operations, and telling its activations and convolutions.

Blocks are traced, not whole models: a model's own code outside its blocks may be as dynamic as it likes.
A traced block is a `torch.fx.GraphModule` that shares its layers with the block it was traced from.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.modules.batchnorm import _BatchNorm

from .affine import Pair, Sides
from .errors import BadConfig, NotMergeable, NotTraceable

_ACTIVATION_FILES = ("torch.nn.modules.activation", "timm.layers.activations", "timm.layers.activations_me")
_NOT_POINTWISE = (nn.Softmax, nn.Softmax2d, nn.LogSoftmax, nn.Softmin, nn.GLU, nn.MultiheadAttention)
_ACTIVATION_NAMES = [
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
]
_ACTIVATION_CALLS = {getattr(home, n) for n in _ACTIVATION_NAMES for home in (F, torch) if hasattr(home, n)}
ADD_CALLS = {operator.add, operator.iadd, torch.add}
ADD_METHODS = {"add", "add_"}
BOUNDARY = "boundary"  # the name of the activation that shrinking puts after a block


class _BlockTracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        # plain symbolic_trace would walk into other libraries' BatchNorms and bake their train flag in
        native = module.__module__.startswith("torch.nn") and not isinstance(module, nn.Sequential)
        return native or isinstance(module, _BatchNorm) or next(module.children(), None) is None


def trace(block: nn.Module, name: str = "block") -> fx.GraphModule:
    """The block as a graph over the block's own layers (shared, not copied).

    A BatchNorm that carries an activation inside (timm's `BatchNormAct2d`) is split: the BatchNorm stays
    at its name, so that state keys do not change, and the activation becomes its sibling.

    Args:
        block: any module whose forward takes one feature map.
        name: what to call it in errors.
    Raises:
        NotTraceable: if its forward branches on values or does anything else that a graph cannot hold.
    """
    try:
        graph = _BlockTracer().trace(block)
    except Exception as error:  # tracing runs the user's code: anything can be raised
        raise NotTraceable(f"{name}: {type(block).__name__}.forward cannot be traced: {error}") from error
    if not isinstance(graph.output_node().args[0], fx.Node):
        raise NotTraceable(f"{name}: {type(block).__name__}.forward returns more than one feature map")
    traced = fx.GraphModule(block, graph)
    for node in list(graph.nodes):
        module = module_of(traced, node)
        if isinstance(module, _BatchNorm) and next(module.children(), None) is not None:
            _split_batchnorm(traced, node, module)
        elif node.op == "call_function" and node.target is F.dropout:
            _as_module(traced, node)
    for node in graph.nodes:
        if is_activation(traced, node) and _in_place(traced, node) and len(node.all_input_nodes[0].users) > 1:
            raise NotTraceable(f"{name}: {node.name} writes into a map that is read again: set inplace=False")
    traced.recompile()
    return traced


def module_of(traced: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The layer that a node calls, or None if it calls none."""
    return traced.get_submodule(str(node.target)) if node.op == "call_module" else None


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


def padding_of(conv: nn.Conv2d, size: Pair | None) -> Sides:
    """The zeros that a convolution puts around its input, (left, right, top, bottom).

    Args:
        conv: any `Conv2d`, also with `padding='same'`, or timm's `Conv2dSame`, which pads by input size.
        size: (H, W) of its input; needed only where padding depends on it.
    Raises:
        NotMergeable: for a padding mode other than zeros, or a subclass with its own arithmetic.
    """
    from timm.layers import Conv2dSame

    if conv.padding_mode != "zeros":
        raise NotMergeable(f"padding mode {conv.padding_mode!r} is not affine at the border: only zeros are")
    spans = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    if isinstance(conv, Conv2dSame):
        if size is None:
            raise BadConfig(f"{type(conv).__name__} pads by its input's size: pass image_size")
        spans = [max(-n % s - s + span + 1, 0) for n, s, span in zip(size, conv.stride, spans, strict=True)]
    elif type(conv).forward is not nn.Conv2d.forward:
        raise NotMergeable(f"{type(conv).__name__} computes its own way, not as Conv2d")
    elif isinstance(conv.padding, tuple):
        v, h = conv.padding
        return (h, h, v, v)
    elif conv.padding == "valid":
        spans = [0, 0]
    (v, h) = spans
    return (h // 2, h - h // 2, v // 2, v - v // 2)


def is_conv(traced: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node is a two-dimensional convolution."""
    return isinstance(module_of(traced, node), nn.Conv2d)


def is_add(node: fx.Node) -> bool:
    """Whether a node adds two feature maps, as a call, a method or `+=`."""
    called = (node.op == "call_function" and node.target in ADD_CALLS) or (
        node.op == "call_method" and node.target in ADD_METHODS
    )
    return called and len(node.all_input_nodes) == len(node.args) == 2 and node.kwargs.get("alpha") in (None, 1)


def is_activation(traced: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node is an elementwise activation: a module, a function or a method."""
    module = module_of(traced, node)
    if module is not None:
        return type(module).__module__ in _ACTIVATION_FILES and not isinstance(module, _NOT_POINTWISE)
    if node.op == "call_method":
        return node.target in _ACTIVATION_NAMES
    return node.op == "call_function" and node.target in _ACTIVATION_CALLS


def removable_activations(traced: fx.GraphModule) -> list[fx.Node]:
    """The block's inner activations: those upstream of its last convolution or add, in order."""
    ends = [n for n in traced.graph.nodes if is_conv(traced, n) or is_add(n)]
    if not ends:
        return []
    upstream = set(_ancestors(ends[-1]))
    return [n for n in traced.graph.nodes if n in upstream and is_activation(traced, n)]


def bypass(traced: fx.GraphModule, node: fx.Node) -> None:
    """Take a node out of the graph: its users read its input instead."""
    node.replace_all_uses_with(node.all_input_nodes[0])
    traced.graph.erase_node(node)


def tail(traced: fx.GraphModule) -> list[fx.Node]:
    """The activations at the block's very end, after everything affine, in order."""
    nodes: list[fx.Node] = []
    node = output_of(traced)
    while (is_activation(traced, node) or node.target == BOUNDARY) and len(node.users) == 1:
        nodes.insert(0, node)
        node = node.all_input_nodes[0]
    return nodes


def output_of(traced: fx.GraphModule) -> fx.Node:
    """The node whose value the block returns."""
    return traced.graph.output_node().all_input_nodes[0]


def _has_map(node: fx.Node) -> bool:
    meta = node.meta.get("tensor_meta")
    return meta is not None and hasattr(meta, "shape") and len(meta.shape) == 4


def _ancestors(node: fx.Node) -> Iterator[fx.Node]:
    seen, queue = {node}, [node]
    while queue:
        for source in queue.pop().all_input_nodes:
            if source not in seen:
                seen.add(source)
                queue.append(source)
                yield source


def _in_place(traced: fx.GraphModule, node: fx.Node) -> bool:
    module = module_of(traced, node)
    if module is not None:
        return bool(getattr(module, "inplace", False))
    name = getattr(node.target, "__name__", str(node.target))
    return name.endswith("_") or bool(node.kwargs.get("inplace", False)) or True in node.args


def _as_module(traced: fx.GraphModule, node: fx.Node) -> None:
    """Let a module do a functional dropout: the train flag was recorded as a constant."""
    probability = node.args[1] if len(node.args) > 1 else node.kwargs.get("p", 0.5)
    traced.add_submodule(node.name, nn.Dropout(float(probability)))  # type: ignore[arg-type]
    with traced.graph.inserting_before(node):
        call = traced.graph.call_module(node.name, (node.all_input_nodes[0],))
    node.replace_all_uses_with(call)
    traced.graph.erase_node(node)


def check_layers(traced: fx.GraphModule) -> None:
    """Raise `NotMergeable` for layers that rewriting would change silently.

    A convolution or BatchNorm called twice in one block cannot have two paddings; a BatchNorm subclass with a
    forward of its own is not the affine map that its parameters say.
    """
    called: set[str] = set()
    for node in traced.graph.nodes:
        module = module_of(traced, node)
        if not isinstance(module, (nn.Conv2d, _BatchNorm)):
            continue
        if str(node.target) in called:
            raise NotMergeable(f"{node.target} ({type(module).__name__}) is called twice in the block")
        if isinstance(module, _BatchNorm) and type(module).forward is not _BatchNorm.forward:
            raise NotMergeable(f"{node.target} ({type(module).__name__}) computes its own way, not as BatchNorm2d")
        called.add(str(node.target))


def _split_batchnorm(traced: fx.GraphModule, node: fx.Node, module: _BatchNorm) -> None:
    path = str(node.target)
    traced.set_submodule(path, plain_batchnorm(module, nn.BatchNorm2d))
    last = node
    for name, child in module.named_children():
        if isinstance(child, nn.Identity):
            continue
        sibling = f"{path}_{name}"
        traced.add_submodule(sibling, child)
        with traced.graph.inserting_after(last):
            call = traced.graph.call_module(sibling)
        last.replace_all_uses_with(call)
        call.args = (last,)
        last = call


def plain_batchnorm(bn: _BatchNorm, kind: type[nn.BatchNorm2d]) -> nn.BatchNorm2d:
    """A `kind` of BatchNorm that shares every tensor with `bn`."""
    new = kind(bn.num_features, bn.eps, bn.momentum, affine=False, track_running_stats=False)
    new.affine, new.track_running_stats = bn.affine, bn.track_running_stats
    new.weight, new.bias = bn.weight, bn.bias
    for name, buffer in bn.named_buffers(recurse=False):
        setattr(new, name, buffer)
    return new.train(bn.training)
