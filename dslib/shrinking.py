"""Shrinking: take a mask's activations out, hoist the padding, put the boundary activation in."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch.nn.functional as F
from torch import Tensor, fx, nn

from .errors import MaskMismatch, NotMergeable, require
from .masks import Mask
from .merging import SITE_KEY
from .sites import input_shapes, is_foldable, linear_block, merged_shape, shared_modules, site_names
from .tracing import BOUNDARY, bypass, is_conv, module_of, output_of, tail

Boundary = Callable[[], nn.Module]


class Fade(nn.Module):
    """An activation on its way out (or in): (1 - t) * act(x) + t * x, elementwise.

    Args:
        act: the activation; replaced by one that does not write into its input.
        t: 0 is the activation, 1 is the identity.
    """

    def __init__(self, act: nn.Module, t: float) -> None:
        super().__init__()
        self.act, self.t = not_inplace(act), t

    def forward(self, x: Tensor) -> Tensor:
        """The blend."""
        if self.t >= 1:
            return x
        return self.act(x) if self.t <= 0 else self.act(x).lerp(x, self.t)

    def extra_repr(self) -> str:
        """Where the blend stands."""
        return f"t={self.t:g}"


def shrink(
    model: nn.Module,
    mask: Mask,
    boundary: Boundary | Mapping[str, Boundary] | None = None,
    image_size: int | None = None,
) -> nn.Module:
    """A copy of the network with the inner activations of the mask's removed sites taken out.

    Weights and state keys stay. The padding of each removed site is hoisted to its input, so that `merge` is
    exact; finetuning absorbs the change at the border.

    Args:
        model: the network; left as it is.
        mask: which sites keep their activations; must name every site of this network.
        boundary: makes the activation to put after each removed block, e.g. `nn.ReLU6`. Not used where an
            activation already ends the block, nor where the block has only two convolutions; a mapping from
            site name to maker is taken at its word. Default: none.
        image_size: side of the input in pixels; needed only where padding depends on it (`Conv2dSame`).
    Raises:
        MaskMismatch: if the mask's names are not this network's sites.
        NotMergeable, NotTraceable: if a removed site cannot be made affine.
    Source: Fu et al., ICML 2022, stages 1-2; hoisting is ours, see docs/decisions.md.
    """
    return _rewrite(model, mask, boundary, image_size, bypass)


def fade(
    model: nn.Module,
    mask: Mask,
    boundary: Boundary | Mapping[str, Boundary] | None = None,
    image_size: int | None = None,
) -> nn.Module:
    """As `shrink`, but activations are still there as `Fade` modules: `set_fade` moves them, `settle` ends it.

    Source: linear activation decay, an option of the paper's released code.
    """
    faded = _rewrite(model, mask, boundary, image_size, _wrap_in_fade)
    for block in faded.modules():
        if isinstance(block, fx.GraphModule) and BOUNDARY in dict(block.named_children()):
            block.boundary = Fade(block.get_submodule(BOUNDARY), 1.0)
    return faded


def set_fade(model: nn.Module, t: float) -> None:
    """Move every fading activation to `t` (0 as in the original, 1 out), boundary activations to 1 - t."""
    for name, module in model.named_modules():
        if isinstance(module, Fade):
            module.t = 1 - t if name.endswith(f".{BOUNDARY}") else t


def settle(model: nn.Module) -> nn.Module:
    """A copy of a faded network with its removed activations out and its boundary activations in."""
    settled = copy.deepcopy(model)
    for block in settled.modules():
        if isinstance(block, fx.GraphModule):
            _settle_block(block)
    return settled


def not_inplace(act: nn.Module) -> nn.Module:
    """A copy of an activation that leaves its input as it is."""
    act = copy.deepcopy(act)
    if getattr(act, "inplace", False):
        act.inplace = False  # type: ignore[assignment]
    return act


def activation_module(traced: fx.GraphModule, node: fx.Node) -> nn.Module:
    """The activation that a node applies, as a module that leaves its input as it is."""
    module = module_of(traced, node)
    if module is not None:
        return not_inplace(module)
    graph = fx.Graph()
    source = graph.placeholder("x")
    graph.output(graph.node_copy(node, lambda _: source))
    alone = fx.GraphModule(nn.Module(), graph)
    for copied in alone.graph.nodes:
        if "inplace" in copied.kwargs:
            copied.update_kwarg("inplace", False)
        if copied.op == "call_method":
            copied.target = str(copied.target).rstrip("_")
        elif copied.op == "call_function" and copied.target.__name__.endswith("_"):
            copied.target = getattr(F, copied.target.__name__.rstrip("_"))
        if True in copied.args:  # F.relu(x, True)
            copied.args = tuple(False if arg is True else arg for arg in copied.args)
    alone.recompile()
    return alone


def replace_activation(traced: fx.GraphModule, node: fx.Node, module: nn.Module, name: str) -> None:
    """Let a node call `module`, registered as `name`, on the same input."""
    traced.add_submodule(name, module)
    with traced.graph.inserting_before(node):
        call = traced.graph.call_module(name, (node.all_input_nodes[0],))
    node.replace_all_uses_with(call)
    traced.graph.erase_node(node)


def _rewrite(
    model: nn.Module,
    mask: Mask,
    boundary: Boundary | Mapping[str, Boundary] | None,
    image_size: int | None,
    take_out: Callable[[fx.GraphModule, fx.Node], None],
) -> nn.Module:
    small = copy.deepcopy(model)
    check_mask(small, mask)
    shapes = input_shapes(small, list(mask.removed), image_size) if image_size is not None else {}
    shared = shared_modules(small)
    for name in reversed(mask.removed):
        block = small.get_submodule(name)
        require(name not in shared, f"{name}: {shared.get(name)}; keep it in the mask", NotMergeable)
        try:
            merged_shape(block, name, shapes.get(name))
            traced = linear_block(block, name, shapes.get(name), take_out)
        except NotMergeable as error:
            raise NotMergeable(f"{name}: {error}; keep it in the mask") from error
        _add_boundary(traced, name, boundary)
        traced.meta[SITE_KEY] = name
        small.set_submodule(name, traced)
    return small


def check_mask(model: nn.Module, mask: Mask) -> None:
    """Raise `MaskMismatch` unless the mask names exactly this network's sites."""
    require(isinstance(mask, Mask), f"expected a dslib.Mask, found {type(mask).__name__}", MaskMismatch)
    names = site_names(model)
    strange = [name for name in mask if name not in names]
    missing = [name for name in names if name not in mask and not is_foldable(model.get_submodule(name))]
    require(not strange and not missing,
            f"the mask is of another network: {_listed('not sites here', strange)}"
            f"{_listed('not in the mask', missing)}"
            f"make one with dslib.find_sites(model).mask(...)", MaskMismatch)  # fmt: skip


def _listed(what: str, names: list[str]) -> str:
    return f"{what}: {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}; " if names else ""


def _wrap_in_fade(traced: fx.GraphModule, node: fx.Node) -> None:
    replace_activation(traced, node, Fade(activation_module(traced, node), 0.0), f"fade_{node.name}")


def _settle_block(block: fx.GraphModule) -> None:
    for node in list(block.graph.nodes):
        module = module_of(block, node)
        if isinstance(module, Fade) and node.target == BOUNDARY:
            block.boundary = module.act
        elif isinstance(module, Fade):
            bypass(block, node)
    block.delete_all_unused_submodules()
    block.recompile()


def _add_boundary(traced: fx.GraphModule, name: str, boundary: Boundary | Mapping[str, Boundary] | None) -> None:
    if isinstance(boundary, Mapping):
        make = boundary.get(name)
    else:
        convolutions = sum(is_conv(traced, node) for node in traced.graph.nodes)
        make = None if convolutions <= 2 or tail(traced) else boundary
    if make is None:
        return
    traced.add_submodule(BOUNDARY, make())
    last = output_of(traced)
    with traced.graph.inserting_after(last):
        call = traced.graph.call_module(BOUNDARY, (last,))
    last.replace_all_uses_with(call, delete_user_cb=lambda user: user is not call)
    traced.recompile()
