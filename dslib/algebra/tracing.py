"""Blocks as graphs: recording what a block does, and refusing what a graph would not show.

Blocks are traced, not whole models: a model's own code outside its blocks may be as dynamic as it likes.
A traced block is a `torch.fx.GraphModule` that shares its layers with the block it was traced from.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import NotMergeable, NotTraceable
from .graphs import module_of
from .layers import free_layers

# dropout: the train flag was recorded as a constant; pooling: hoisting takes a layer's padding out
_AS_MODULES: dict[Any, Callable[..., nn.Module]] = {
    F.dropout: lambda p=0.5, training=True, inplace=False: nn.Dropout(p),
    F.avg_pool2d: nn.AvgPool2d,
}
_WRITES = {operator.iadd, operator.isub, operator.imul, operator.itruediv}
_VIEWS = {torch.chunk, torch.split, operator.getitem, "chunk", "split", "contiguous", "detach", "view", "reshape"}


class TracedBlock(fx.GraphModule):
    """A block as a graph. Its `.meta` is kept when it is pickled, as it is when a graph module is copied."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (*super().__reduce__(), self.meta)


def _unpickled(make: Callable[..., fx.GraphModule], arguments: tuple[Any, ...], meta: dict[str, Any]) -> TracedBlock:
    plain = make(*arguments)
    block = TracedBlock(plain, plain.graph)
    block.meta = meta
    return block


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
    from timm.layers import BatchNormAct2d
    from torchvision.models.shufflenetv2 import channel_shuffle

    defaults = _defaults(block, name)
    flags = [(module, module.training) for module in block.modules()]
    try:
        block.eval()  # code that asks for the train flag is recorded as in eval
        graph = _BlockTracer(autowrap_functions=(channel_shuffle,)).trace(block, defaults)
        graph.lint()
    except Exception as error:  # tracing runs the user's code: anything can be raised
        raise NotTraceable(f"{name}: {type(block).__name__}.forward cannot be traced: {error}") from error
    finally:
        for module, flag in flags:
            module.training = flag
    if not isinstance(graph.output_node().args[0], fx.Node):
        raise NotTraceable(f"{name}: {type(block).__name__}.forward returns more than one feature map")
    traced = TracedBlock(block, graph)
    for node in list(graph.nodes):
        layer = module_of(traced, node)
        if isinstance(layer, BatchNormAct2d) and type(layer).forward is BatchNormAct2d.forward:
            _split_batchnorm(traced, node, layer)
        elif node.op == "call_function" and node.target in _AS_MODULES:
            _as_module(traced, node, _AS_MODULES[node.target])
    _check_writes(traced, name)
    traced.recompile()
    return traced


def _check_writes(traced: fx.GraphModule, name: str) -> None:
    """Raise `NotTraceable` if the block writes into a map in place that is read again under another name.

    A graph says which operation reads which result, not that two results are one piece of memory.
    """
    place = {node: i for i, node in enumerate(traced.graph.nodes)}
    memory: dict[fx.Node, fx.Node] = {}  # node -> the node whose memory it shows
    for node in traced.graph.nodes:
        first = node.all_input_nodes[0] if node.all_input_nodes else node
        shows = isinstance(module_of(traced, node), free_layers()) or node.target in _VIEWS
        memory[node] = memory[first] if shows else node
        if not _in_place(traced, node):
            continue
        written = memory[first]
        names = [other for other, root in memory.items() if root is written]
        again = any(user is not node and place[user] > place[node] for other in names for user in other.users)
        if again or written.op == "placeholder":
            raise NotTraceable(f"{name}: {node.name} writes into a map that is read again: set inplace=False")


def _defaults(block: nn.Module, name: str) -> dict[str, Any]:
    """The defaults of the forward's arguments after the first: a block is looked at as called with one map."""
    parameters = list(inspect.signature(block.forward).parameters.values())
    if not parameters:
        raise NotTraceable(f"{name}: {type(block).__name__}.forward takes no feature map")
    others = parameters[1:]
    needed = [p.name for p in others if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if needed:
        raise NotTraceable(f"{name}: {type(block).__name__}.forward takes more than one feature map: {needed[0]}")
    return {p.name: p.default for p in others if p.default is None or isinstance(p.default, (bool, int, float))}


def _in_place(traced: fx.GraphModule, node: fx.Node) -> bool:
    module = module_of(traced, node)
    if module is not None:
        return bool(getattr(module, "inplace", False))
    name = getattr(node.target, "__name__", str(node.target))
    if node.op not in ("call_function", "call_method"):
        return False
    return name.endswith("_") or node.target in _WRITES or bool(node.kwargs.get("inplace", False))


def _as_module(traced: fx.GraphModule, node: fx.Node, make: Callable[..., nn.Module]) -> None:
    """Let a module do what a function does, with the function's own arguments after the map."""
    if len(node.all_input_nodes) > 1:
        return  # sizes that are computed: the function stays, and is refused with its name
    try:
        module = make(*node.args[1:], **{k: v for k, v in node.kwargs.items() if k != "training"})
    except TypeError:
        return  # called in an odd way: the function stays, and is refused with its name
    traced.add_submodule(node.name, module.train(traced.training))
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
        if not isinstance(module, (nn.Conv2d, nn.AvgPool2d, _BatchNorm)):
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
