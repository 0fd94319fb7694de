"""Shrinking: take a plan's activations out, hoist the padding, put the boundary activation in."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .algebra import (
    BOUNDARY,
    SITE_KEY,
    Shape,
    TakeOut,
    bypass,
    channels_of,
    check_runs,
    check_weights,
    droppable,
    input_shapes,
    is_conv,
    is_foldable,
    linear_blocks,
    merged_shape,
    module_of,
    output_of,
    shared_modules,
    single_activations,
    site_names,
    tail,
)
from .errors import BadConfig, MaskMismatch, NotMergeable
from .merging import CHANNELS_KEY
from .sites import Mask, Plan, Sites

DEFAULT_SIZE = 224  # for looking at what calls what, where no size is given
Boundary = Callable[[], nn.Module]


class Fade(nn.Module):
    """An activation on its way out (or in): (1 - t) * act(x) + t * x, elementwise.

    Args:
        act: the activation; replaced by one that does not write into its input.
        t: 0 is the activation, 1 is the identity.
    """

    def __init__(self, act: nn.Module, t: float) -> None:
        super().__init__()
        self.act = not_inplace(act)
        self.register_buffer("amount", torch.tensor(float(t)), persistent=False)
        self._t = t

    @property
    def t(self) -> float:
        """How far the activation is out."""
        return self._t

    @t.setter
    def t(self, t: float) -> None:
        self._t = t
        self.get_buffer("amount").fill_(t)

    def forward(self, x: Tensor) -> Tensor:
        """The blend."""
        if torch.compiler.is_compiling():  # a number in Python would be compiled anew with every step
            return self.act(x).lerp(x, self.get_buffer("amount").to(x.dtype))
        if self.t >= 1:
            return x
        return self.act(x) if self.t <= 0 else self.act(x).lerp(x, self.t)

    def extra_repr(self) -> str:
        """Where the blend stands."""
        return f"t={self.t:g}"


def shrink(
    model: nn.Module,
    plan: Mask | Plan,
    boundary: Boundary | Mapping[str, Boundary] | None = None,
    image_size: int | None = None,
    hoist: bool = True,
) -> nn.Module:
    """A copy of the network with the inner activations of the removed sites taken out.

    Weights and state keys stay. The padding of each removed site (of each run) is hoisted to its input, so that
    it is one plain convolution everywhere; finetuning absorbs the change at the border.

    Args:
        model: the network; left as it is.
        plan: which sites keep their activations, a mask, and which are merged together or dropped whole, a plan;
            must name every site of this network.
        boundary: makes the activation to put after each removed block, e.g. `nn.ReLU6`. Not used where an
            activation already ends the block, nor where the block has only two convolutions; a mapping from
            (last) site name to maker is taken at its word. Default: none.
        image_size: side of the input in pixels; needed only where padding depends on it (`Conv2dSame`), a block
            splits its channels, or the network does not run at 224 and the plan is more than a mask.
        hoist: False leaves all padding where it is, for a network that will not be finetuned: but for the
            activations it computes what it did, and `merge` treats its borders apart.
    Raises:
        MaskMismatch: if the mask's names are not this network's sites.
        NotMergeable, NotTraceable: if a removed site cannot be made affine, or not be dropped, see `droppable`.
        BadConfig: if the sites of a run do not feed each other.
    Source: Fu et al., ICML 2022, stages 1-2; runs: Kim et al., ICML 2023; hoisting is ours, see docs/decisions.md.
    """
    return _rewrite(model, plan, boundary, image_size, bypass, lambda _: nn.Identity(), hoist)


def possible_runs(
    model: nn.Module, sites: Sites, longest: int, boundary: Boundary | None = None
) -> Iterator[tuple[tuple[str, ...], nn.Module]]:
    """Sites that follow each other and can become one convolution together, and the network with just these removed.

    Args:
        model: the network; left as it is.
        sites: of the model.
        longest: the most sites of a run; each has two at least.
        boundary: as for `shrink`.
    """
    for length in range(2, longest + 1):
        for first in range(len(sites) - length + 1):
            names = sites.names[first : first + length]
            if not set(names) <= set(sites.mergeable):
                continue
            mask = sites.mask([name for name in sites.names if name not in names])
            try:
                yield names, shrink(model, Plan(mask, [names]), boundary, sites.image_size)
            except (NotMergeable, BadConfig):
                continue


def fade(
    model: nn.Module,
    plan: Mask | Plan,
    boundary: Boundary | Mapping[str, Boundary] | None = None,
    image_size: int | None = None,
) -> nn.Module:
    """As `shrink`, but activations are still there as `Fade` modules: `set_fade` moves them, `settle` ends it.

    Blocks that are dropped go at once.

    Source: linear activation decay, an option of the paper's released code.
    """
    faded = _rewrite(model, plan, boundary, image_size, _wrap_in_fade, lambda act: Fade(act, 0.0))
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
    for name in [name for name, module in settled.named_modules() if isinstance(module, Fade)]:  # outside blocks
        settled.set_submodule(name, nn.Identity())
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
    plan: Mask | Plan,
    boundary: Boundary | Mapping[str, Boundary] | None,
    image_size: int | None,
    take_out: TakeOut,
    in_place_of: Callable[[nn.Module], nn.Module],
    hoist: bool = True,
) -> nn.Module:
    """`shrink`, `fade`: `take_out` is done to the activations of blocks; single ones are replaced."""
    plan = plan if isinstance(plan, Plan) else Plan(plan)
    check_weights(model)
    small = copy.deepcopy(model)
    _check_plan(small, plan, image_size or DEFAULT_SIZE)
    shapes = input_shapes(small, plan.mask.removed, image_size) if image_size is not None else {}
    single = single_activations(small)
    for name in plan.dropped:
        small.set_submodule(name, nn.Identity())
    for names in plan.groups:
        if names[0] in single:
            small.set_submodule(names[0], in_place_of(small.get_submodule(names[0])))
            continue
        blocks = _linear(small, names, [shapes.get(name) for name in names], take_out, hoist)
        _add_boundary(blocks[-1], names[-1], boundary)
        for name, block in zip(names, blocks, strict=True):
            small.set_submodule(name, block)
    return small


def _check_plan(model: nn.Module, plan: Plan, image_size: int) -> None:
    """Raise unless the plan is of this network, and its blocks can be replaced, merged together and dropped."""
    check_mask(model, plan.mask)
    if plan.runs:
        check_runs(model, plan.runs, image_size)
    stuck = set(plan.dropped) - set(droppable(model, plan.dropped, image_size) if plan.dropped else ())
    if stuck:
        raise NotMergeable(
            f"{', '.join(sorted(stuck))}: cannot be dropped (only a block of one name, with one map in "
            "and one out, of one shape, can); keep or merge it"
        )
    shared = shared_modules(model)
    for name in (name for names in plan.groups for name in names if name in shared):
        raise NotMergeable(f"{name}: {shared[name]}; keep it in the mask")


def _linear(
    model: nn.Module, names: tuple[str, ...], shapes: list[Shape | None], take_out: TakeOut, hoist: bool
) -> list[fx.GraphModule]:
    """The linear blocks of a group of sites, which say what they are."""
    blocks = [model.get_submodule(name) for name in names]
    try:
        merged_shape(blocks, names, shapes, hoist)
        linear = linear_blocks(blocks, names, shapes, take_out, hoist)
    except NotMergeable as error:
        raise NotMergeable(f"{'+'.join(names)}: {error}; keep it in the mask") from error
    channels = channels_of(linear[0], shapes[0])
    for block in linear:
        block.meta |= {SITE_KEY: names, CHANNELS_KEY: channels}
    return linear


def check_mask(model: nn.Module, mask: Mask) -> None:
    """Raise `MaskMismatch` unless the mask names exactly this network's sites."""
    if not isinstance(mask, Mask):
        raise MaskMismatch(f"expected a dslib.Mask, found {type(mask).__name__}")
    names = site_names(model)
    strange = [name for name in mask if name not in (*names, *single_activations(model))]
    missing = [name for name in names if name not in mask and not is_foldable(model.get_submodule(name))]
    wrong = {"not sites here": strange, "not in the mask": missing}
    listed = "; ".join(f"{what}: {', '.join(n[:5])}{' ...' if len(n) > 5 else ''}" for what, n in wrong.items() if n)
    if listed:
        raise MaskMismatch(f"the mask is of another network: {listed}; make one with dslib.find_sites(model).mask(...)")


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
    wanted = tail(traced) == [] and sum(is_conv(traced, node) for node in traced.graph.nodes) > 2
    make = boundary.get(name) if isinstance(boundary, Mapping) else boundary if wanted else None
    if make is None:
        return
    traced.add_submodule(BOUNDARY, make())
    last = output_of(traced)
    with traced.graph.inserting_after(last):
        call = traced.graph.call_module(BOUNDARY, (last,))
    last.replace_all_uses_with(call, delete_user_cb=lambda user: user is not call)
    traced.recompile()
