"""Merging: write every shrunk block as the one dense convolution that equals it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from .affine import Affine
from .errors import MaskMismatch, NotMergeable, require
from .interpreting import interpret
from .tracing import module_of, tail

SITE_KEY = "dslib_site"


class MergedBlock(nn.Module):
    """One dense convolution, then the activations that ended the block: (N, C_in, H, W) -> (N, C_out, H', W').

    Args:
        conv: the merged convolution, the residual folded in.
        act: what follows it, or None.
        pad: zero padding that a Conv2d cannot express (asymmetric), or None.
    """

    def __init__(self, conv: nn.Conv2d, act: nn.Module | None = None, pad: nn.Module | None = None) -> None:
        super().__init__()
        self.pad, self.conv, self.act = pad or nn.Identity(), conv, act or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """The block's output."""
        return self.act(self.conv(self.pad(x)))


@dataclass(frozen=True)
class MergeCost:
    """What merging one removed site changes, for a predicate given to `merge`.

    Args:
        site: its name.
        weights_linear, weights_merged: convolution weights before and after.
        macs_linear, macs_merged: multiply-accumulates per output pixel of the block, borders ignored.
    """

    site: str
    weights_linear: int
    weights_merged: int
    macs_linear: float
    macs_merged: float


def merge(model: nn.Module, only: Collection[str] | Callable[[MergeCost], bool] | None = None) -> nn.Module:
    """A copy of a shrunk network with each removed site merged into one `Conv2d`.

    The merged convolution takes over device, dtype, memory format, train flag and `requires_grad`; its state
    keys are `<site>.conv.weight` and `<site>.conv.bias`. Exact: the outputs agree to rounding, borders included.

    Args:
        model: a network from `shrink` (or `finetune`); left as it is.
        only: names of the sites to merge, or a predicate on their `MergeCost`; default all. Those left stay
            linear, and `unmerged` lists them.
    Raises:
        NotMergeable: if a removed site is not affine.
        MaskMismatch: if `only` names a site that is not removed.
    Source: Fu et al., ICML 2022, stage 3.
    """
    merged = copy.deepcopy(model)
    blocks = shrunk_blocks(merged)
    if only is not None and not callable(only):
        unknown = set(only) - set(blocks)
        require(not unknown, f"only: not removed sites of this network: {sorted(unknown)}; its removed sites: "
                f"{', '.join(blocks) or 'none'}", MaskMismatch)  # fmt: skip
    for name, block in reversed(blocks.items()):
        if only is None or (only(merge_cost(name, block)) if callable(only) else name in only):
            merged.set_submodule(name, merge_block(block, name))
    return merged.to(memory_format=torch.channels_last) if _is_channels_last(model) else merged


def unmerged(model: nn.Module) -> dict[str, MergeCost]:
    """Removed sites that still are several convolutions: name -> what merging each would change."""
    return {name: merge_cost(name, block) for name, block in shrunk_blocks(model).items()}


def shrunk_blocks(model: nn.Module) -> dict[str, fx.GraphModule]:
    """Site name -> linear block, for every removed and not yet merged site, in order."""
    found = ((name, module) for name, module in model.named_modules() if isinstance(module, fx.GraphModule))
    return {name: module for name, module in found if SITE_KEY in module.meta}


def merge_block(block: fx.GraphModule, name: str = "block") -> MergedBlock:
    """The one convolution (and the activations after it) that equals a linear block.

    Raises:
        NotMergeable: if the block is not affine, naming the site and the operation.
    """
    first = _first_conv(block)
    try:
        whole = interpret(block, first.in_channels)
    except NotMergeable as error:
        raise NotMergeable(f"{name}: {error}") from error
    conv, pad = _as_conv(whole, like=first.weight)
    conv.requires_grad_(first.weight.requires_grad)
    return MergedBlock(conv, _tail_module(block), pad).train(block.training)


def merge_cost(name: str, block: fx.GraphModule) -> MergeCost:
    """The cost of a linear block before and after merging, without doing the merge's arithmetic."""
    ghost = copy.deepcopy(block).to("meta")
    whole = interpret(ghost, _first_conv(ghost).in_channels)
    convs = [m for m in ghost.modules() if isinstance(m, nn.Conv2d)]
    linear, stride_left = 0.0, float(whole.stride[0] * whole.stride[1])
    for conv in convs:
        stride_left /= conv.stride[0] * conv.stride[1]
        linear += conv.weight.numel() * max(stride_left, 1.0)
    merged = whole.weight.numel()
    return MergeCost(name, sum(c.weight.numel() for c in convs), merged, linear, float(merged))


def _as_conv(whole: Affine, like: Tensor) -> tuple[nn.Conv2d, nn.Module | None]:
    """A `Conv2d` in the place and dtype of `like`, and the padding it cannot express."""
    left, right, top, bottom = whole.padding
    even = left == right and top == bottom and min(whole.padding) >= 0
    c_out, c_in = whole.weight.shape[:2]
    conv = nn.Conv2d(
        c_in * whole.groups, c_out, whole.kernel, whole.stride, (top, left) if even else 0, whole.dilation,
        whole.groups, device=like.device, dtype=like.dtype,
    )  # fmt: skip
    with torch.no_grad():
        conv.weight.copy_(whole.weight)
        conv.bias.copy_(whole.bias if whole.bias is not None else torch.zeros(c_out))  # type: ignore[union-attr]
    return conv, None if even else nn.ZeroPad2d(whole.padding)


def _is_channels_last(model: nn.Module) -> bool:
    """Whether the network was put into channels-last format."""
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]
    # a 1x1 or depthwise kernel is contiguous in both formats and tells nothing
    return any(w.is_contiguous(memory_format=torch.channels_last) and not w.is_contiguous() for w in weights)


def _first_conv(block: fx.GraphModule) -> nn.Conv2d:
    """The convolution that reads the block's input (through padding, dropout or BatchNorm at most)."""
    for node in block.graph.nodes:
        module = module_of(block, node)
        if isinstance(module, nn.Conv2d):
            return module
    raise NotMergeable("the block has no convolution")


def _tail_module(block: fx.GraphModule) -> nn.Module | None:
    """The block's final activations as one module."""
    nodes = tail(block)
    if not nodes:
        return None
    modules = [module_of(block, node) for node in nodes]
    if len(modules) == 1 and modules[0] is not None:
        return modules[0]
    graph = fx.Graph()
    value = graph.placeholder("x")
    moved = {nodes[0].all_input_nodes[0]: value}
    for node in nodes:
        moved[node] = graph.node_copy(node, lambda n: moved[n])
    graph.output(moved[nodes[-1]])
    return fx.GraphModule(block, graph)
