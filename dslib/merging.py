"""Merging: write every shrunk block, or run of blocks, as the one dense convolution that equals it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, fx, nn

from .algebra import (
    SITE_KEY,
    Affine,
    BorderBias,
    MergedBlock,
    OnesChannel,
    Pair,
    Seen,
    Shape,
    affine,
    after,
    bypass,
    first_conv,
    in_channels,
    input_shapes,
    interpret_run,
    linear_part,
    macs_of,
    merged_block,
    ones_response,
    start_of,
    tail,
)
from .errors import MaskMismatch, NotMergeable
from .sites import Plan

CHANNELS_KEY, LEFT_KEY = "dslib_channels", "dslib_left"  # in a shrunk block's .meta, beside SITE_KEY
Only = Collection[str] | Callable[["MergeCost"], bool] | Plan | None


@dataclass(frozen=True)
class MergeCost:
    """What merging one removed site, or run of sites, changes; for a predicate given to `merge`.

    Args:
        site: its name; of a run the names joined by '+'.
        weights_linear, weights_merged: convolution weights before and after.
        macs_linear, macs_merged: multiply-accumulates per output pixel, borders ignored.
        kernel: of the merged convolution, (vertical, horizontal).
        left: why `merge` left it as it is; '' before.
    """

    site: str
    weights_linear: int
    weights_merged: int
    macs_linear: float
    macs_merged: float
    kernel: Pair
    left: str = ""


def merge(model: nn.Module, only: Only = None, image_size: int | None = None) -> nn.Module:
    """A copy of a shrunk network with each removed site, or run of sites, merged into one `Conv2d`.

    The merged convolution takes over device, dtype, memory format, train flag and `requires_grad`; its state
    keys are `<site>.conv.weight` and `<site>.conv.bias`. Exact: the outputs equal those of the shrunk network in
    eval to rounding, borders included. Where the padding was not hoisted the border needs more than a
    convolution: with `image_size` a bias for each position (`<site>.border.bias`), right for images of that size
    only; without, a channel of ones appended to the input, right for all sizes, and slower. Neither has a
    `<site>.conv.bias`.

    Args:
        model: a network from `shrink` (or `finetune`); left as it is.
        only: names of the sites to merge, a plan that names them, or a predicate on their `MergeCost`; default
            all. Those left stay linear, and `unmerged` lists them and why.
        image_size: side of the input in pixels, for a network shrunk with `hoist=False`; else of no account.
    Raises:
        NotMergeable: if a removed site is not affine, or its weights are not numbers.
        MaskMismatch: if `only` names a site that is not removed.
    Source: Fu et al., ICML 2022, stage 3.
    """
    merged = copy.deepcopy(model)
    groups = removed_groups(merged)
    chosen = _chosen(groups, only)
    inputs = input_shapes(merged, [names[0] for names in chosen], image_size) if image_size is not None else {}
    for names in reversed(chosen):
        merged.set_submodule(names[0], merge_blocks(groups[names], "+".join(names), inputs.get(names[0])))
        for name in names[1:]:
            merged.set_submodule(name, nn.Identity())
    return merged.to(memory_format=torch.channels_last) if _is_channels_last(model) else merged


def unmerged(model: nn.Module) -> dict[str, MergeCost]:
    """Removed sites that still are several convolutions: name -> what merging each would change, why it was left."""
    costs = (merge_cost(names, blocks) for names, blocks in removed_groups(model).items())
    return {cost.site: cost for cost in costs}


def shrunk_blocks(model: nn.Module) -> dict[str, fx.GraphModule]:
    """Site name -> linear block, for every removed and not yet merged site, in order."""
    return {n: m for n, m in model.named_modules() if isinstance(m, fx.GraphModule) and SITE_KEY in m.meta}


def removed_groups(model: nn.Module) -> dict[tuple[str, ...], list[fx.GraphModule]]:
    """Site names -> linear blocks, those that become one convolution together, in order."""
    blocks = shrunk_blocks(model)
    return {names: [blocks[n] for n in names] for names in dict.fromkeys(b.meta[SITE_KEY] for b in blocks.values())}


def merge_blocks(
    blocks: Sequence[fx.GraphModule], name: str = "block", input_shape: Shape | None = None
) -> MergedBlock:
    """The one convolution (and the activations after it) that equals linear blocks in a row.

    Args:
        blocks: from `linear_blocks`.
        name: what to call them in errors.
        input_shape: (C, H, W), for a border bias in place of a channel of ones, where one is needed.
    Raises:
        NotMergeable: if the blocks are not affine, naming the site and the operation.
    """
    check_values(blocks, name)
    try:
        whole, before, border = _with_border(blocks, _channels(blocks), input_shape)
        ends = tail(blocks[-1])
        act = after(blocks[-1], ends[0].all_input_nodes[0]) if ends else None
        merged = merged_block(whole, first_conv(blocks[0]), act, before, border)
    except NotMergeable as error:
        raise NotMergeable(f"{name}: {error}") from error
    return merged.train(blocks[0].training)


def merge_cost(names: Sequence[str], blocks: Sequence[fx.GraphModule]) -> MergeCost:
    """The cost of linear blocks in a row before and after merging, without doing the merge's arithmetic."""
    ghosts = [copy.deepcopy(block).to("meta") for block in blocks]
    seen: list[Seen] = []
    whole = linear_part(ghosts, _channels(ghosts), seen)
    weights = sum(m.weight.numel() for ghost in ghosts for m in ghost.modules() if isinstance(m, nn.Conv2d))
    return MergeCost(
        site="+".join(names),
        weights_linear=weights,
        weights_merged=whole.weight.numel(),
        macs_linear=macs_of(seen, whole),
        macs_merged=float(whole.weight.numel()),
        kernel=whole.kernel,
        left=blocks[0].meta.get(LEFT_KEY, ""),
    )


def _chosen(groups: dict[tuple[str, ...], list[fx.GraphModule]], only: Only) -> list[tuple[str, ...]]:
    """The groups to merge; the others are marked with why they are left."""
    if only is None:
        return list(groups)
    if callable(only):
        chosen, left = [g for g, blocks in groups.items() if only(merge_cost(g, blocks))], "declined by the rule"
    else:
        named = _groups_named(groups, [n for group in only.groups for n in group] if isinstance(only, Plan) else only)
        chosen, left = [group for group in groups if group in named], "not named"
    for group in set(groups) - set(chosen):
        for block in groups[group]:
            block.meta[LEFT_KEY] = left
    return chosen


def _groups_named(groups: Collection[tuple[str, ...]], names: object) -> set[tuple[str, ...]]:
    """The groups that are named, by any of their sites or by all of them joined by '+'."""
    if isinstance(names, str) or not isinstance(names, Collection):
        raise MaskMismatch(f"only: expected names of sites, a plan or a rule, found {names!r}")
    known = {name: group for group in groups for name in (*group, "+".join(group))}
    unknown = sorted(name for name in names if name not in known)
    if unknown:
        there = ", ".join(map("+".join, groups)) or "none"
        raise MaskMismatch(f"only: not removed sites of this network: {unknown}; its removed sites: {there}")
    return {known[name] for name in names}


def _with_border(
    blocks: Sequence[fx.GraphModule], channels: int, input_shape: Shape | None
) -> tuple[Affine, nn.Module | None, nn.Module | None]:
    """The blocks as a convolution, with what comes before and after it for the sake of the border."""
    try:
        return interpret_run(blocks, start_of(channels, blocks[0])), None, None
    except NotMergeable:
        whole = linear_part(blocks, channels)  # raises again if the border was not the reason
    if input_shape is None:
        return affine.stack_inputs(whole, ones_response(blocks, channels)), OnesChannel(), None
    return whole, None, BorderBias(_response_to_zeros(blocks, input_shape))


def _response_to_zeros(blocks: Sequence[fx.GraphModule], input_shape: Shape) -> Tensor:
    """f(0), (1, C_out, H', W') in float64."""
    exact = [copy.deepcopy(block).cpu().double() for block in blocks]
    for block in exact:
        block.eval()
    for node in tail(exact[-1]):
        bypass(exact[-1], node)
    exact[-1].recompile()
    with torch.no_grad():
        return nn.Sequential(*exact)(torch.zeros(1, *input_shape, dtype=torch.float64))


def check_values(blocks: Sequence[nn.Module], name: str) -> None:
    """Raise `NotMergeable`, naming it, for a parameter or buffer that is on `meta`, NaN or infinite."""
    for key, tensor in chain.from_iterable(chain(b.named_parameters(), b.named_buffers()) for b in blocks):
        if tensor.is_meta:
            raise NotMergeable(
                f"{name}: {key} is on the meta device and has no values: load weights first; "
                "dslib.unmerged predicts what merging costs"
            )
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise NotMergeable(f"{name}: {key} holds NaN or infinity: train or load it again")


def _is_channels_last(model: nn.Module) -> bool:
    """Whether the network was put into channels-last format."""
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]
    # a 1x1 or depthwise kernel is contiguous in both formats and tells nothing
    return any(w.is_contiguous(memory_format=torch.channels_last) and not w.is_contiguous() for w in weights)


def _channels(blocks: Sequence[fx.GraphModule]) -> int:
    return int(blocks[0].meta.get(CHANNELS_KEY) or in_channels(blocks[0]))
