"""A network's blocks: which there are, what goes into each, and one or several in a row made linear."""

from __future__ import annotations

import copy
import hashlib
import operator
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import BadConfig, BadModel, NotTraceable, first_line
from .affine import NO_PADDING, Affine
from .graphs import (
    bypass,
    dtype_of,
    input_sizes,
    is_activation,
    is_activation_module,
    is_conv,
    removable_activations,
    tail,
)
from .interpreting import linear_part
from .layers import depends_on_size
from .padding import hoist, resolve_padding
from .tracing import check_layers, trace

SITE_KEY = "dslib_site"  # in the .meta of a shrunk block: the sites that it becomes one convolution with
Shape = tuple[int, int, int]
TakeOut = Callable[[fx.GraphModule, fx.Node], None]
_SPLITS = (torch.chunk, torch.split, operator.getitem, "chunk", "split")
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def site_names(model: nn.Module) -> list[str]:
    """Names of the innermost blocks with two convolutions and two BatchNorms, in order."""
    return innermost(
        model,
        lambda block: (
            sum(isinstance(m, nn.Conv2d) for m in block.modules()) >= 2
            and sum(isinstance(m, _BatchNorm) for m in block.modules()) >= 2
        ),
    )


def innermost(model: nn.Module, wanted: Callable[[nn.Module], bool]) -> list[str]:
    """Names of the modules that are `wanted` and hold no other such, in order; neither containers nor the root."""
    blocks = [n for n, m in model.named_modules() if n and not isinstance(m, _CONTAINERS) and wanted(m)]
    return [name for name in blocks if not any(other.startswith(f"{name}.") for other in blocks)]


def single_activations(model: nn.Module) -> list[str]:
    """Names of the activation layers outside those blocks, the stem's and the head's as a rule, in order."""
    blocks = tuple(f"{name}." for name in site_names(model))
    return [n for n, m in model.named_modules() if n and is_activation_module(m) and not n.startswith(blocks)]


def is_foldable(block: nn.Module) -> bool:
    """Whether a block has no inner activation: then it needs no mask to be merged."""
    try:
        return not removable_activations(trace(block))
    except NotTraceable:
        return False


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
        NotTraceable, NotMergeable: as `tracing.trace` and `hoisting.hoist` do.
    """
    made: list[fx.GraphModule] = []
    for i, (block, name, shape) in enumerate(zip(blocks, names, input_shapes, strict=True)):
        traced = trace(block, name)
        check_layers(traced)
        dynamic = any(map(depends_on_size, traced.modules()))
        sizes = input_sizes(traced, shape) if shape and dynamic else {}
        ends = [node for node in tail(traced) if is_activation(traced, node)] if i + 1 < len(blocks) else []
        for node in removable_activations(traced) + ends:
            take_out(traced, node)
        resolve_padding(traced, sizes)
        made.append(traced)
    ring = NO_PADDING
    for i, traced in reversed(list(enumerate(made))):
        if hoisted:
            ring = hoist(traced, ring, first=i == 0)
        traced.delete_all_unused_submodules()
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
        if is_conv(block, node) or any(source in after_conv for source in node.all_input_nodes):
            after_conv.add(node)
    splits = [n.name for n in block.graph.nodes if n.target in _SPLITS and n not in after_conv]
    if splits:
        raise BadConfig(f"{', '.join(splits[:1])} splits the block's channels: pass image_size")
    return in_channels(block)


def ghost_of(module: nn.Module) -> nn.Module:
    """A copy on the `meta` device, in eval: shapes without values."""
    ghost = copy.deepcopy(module).to("meta")
    ghost.eval()  # some networks' train() returns nothing
    return ghost


def check_runs(model: nn.Module, runs: Sequence[Sequence[str]], image_size: int) -> None:
    """Raise `BadConfig` unless each block of a run feeds the next and nothing else.

    That is known for neighbours in one `nn.Sequential` (or in one nested in another) that is called as a whole;
    whether it is, is seen in one forward pass on the `meta` device.
    """
    alone = set(single_activations(model))
    for names in runs:
        if not alone.isdisjoint(names):
            raise BadConfig(
                f"a run is of blocks: {', '.join(sorted(alone.intersection(names)))} is an activation by itself"
            )
        home, order = next(((h, leaves) for h, leaves in _orders(model) if names[0] in leaves), ("", []))
        for a, b in pairwise(names):
            known = a in order and b in order and order.index(a) < order.index(b)
            between = order[order.index(a) + 1 : order.index(b)] if known else []
            if not (known and all(isinstance(model.get_submodule(n), nn.Identity) for n in between)):
                raise BadConfig(f"the sites of a run must be neighbours in one nn.Sequential, found {a} and {b}")
        calls = _calls(model, (home, *names), image_size)
        once = [name for name in (home, *names) if calls[name] != 1]
        if once:
            raise BadConfig(
                f"the sites {', '.join(names)} cannot be merged together: {once[:1]} is called "
                f"{calls[once[0]] if once else 1} times in a forward pass, expected once"
            )


def _calls(model: nn.Module, names: Sequence[str], image_size: int) -> Counter[str]:
    ghost, calls = ghost_of(model), Counter[str]()
    for name in names:
        ghost.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
    _run(ghost, image_size)
    return calls


def _orders(model: nn.Module) -> list[tuple[str, list[str]]]:
    return [(name, _leaves((name, module))) for name, module in _outermost(model)]


def _outermost(model: nn.Module) -> list[tuple[str, nn.Sequential]]:
    plain = [(n, m) for n, m in model.named_modules() if _is_plain_sequential(m)]
    inside = {f"{n}.{child}" if n else child for n, m in plain for child, _ in m.named_children()}
    return [(n, m) for n, m in plain if n not in inside]


def _leaves(found: tuple[str, nn.Module]) -> list[str]:
    """Names of what a Sequential calls, in order, Sequentials inside it opened."""
    name, module = found
    if not _is_plain_sequential(module):
        return [name]
    return [leaf for child, m in module.named_children() for leaf in _leaves((f"{name}.{child}" if name else child, m))]


def _is_plain_sequential(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def structure_of(model: nn.Module) -> str:
    """Twelve hex digits that two networks share if their modules and the shapes of their parameters are the same.

    The number of classes, of the last linear layer, does not count.
    """
    kinds = [f"{name}:{type(module).__name__}" for name, module in model.named_modules()]
    head = next((name for name, m in reversed(list(model.named_modules())) if isinstance(m, nn.Linear)), None)
    shapes = [
        f"{name}:{tuple(parameter.shape)}"
        for name, parameter in model.named_parameters()
        if head is None or name.rpartition(".")[0] != head
    ]
    return hashlib.sha256("\n".join([*kinds, *shapes]).encode()).hexdigest()[:12]


def shared_modules(model: nn.Module) -> dict[str, str]:
    """Module name -> why it cannot be replaced, for modules that the network holds under several names."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    return {
        name: f"is one module under {len(found)} names ({', '.join(found)})"
        for found in names.values()
        if len(found) > 1
        for name in found
    }


def in_channels(model: nn.Module) -> int:
    """Channels that a network or block takes: those of its first convolution."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            return module.in_channels
    raise BadConfig(f"{type(model).__name__} has no convolution: expected a CNN")


def input_shapes(model: nn.Module, names: list[str], image_size: int) -> dict[str, Shape]:
    """Input (C, H, W) of each named module in one forward pass, on a copy."""
    if not (isinstance(image_size, int) and image_size > 0):
        raise BadConfig(f"image_size is in pixels, found {image_size!r}")
    ghost = copy.deepcopy(model)
    ghost.eval()
    shapes: dict[str, Any] = {}

    def note(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            alone = len(inputs) == 1 and not named and isinstance(inputs[0], torch.Tensor) and inputs[0].ndim == 4
            shape = tuple(inputs[0].shape[1:]) if alone else None
            shapes[name] = shape if shapes.get(name, shape) == shape else None  # called with maps of two sizes

        return hook

    for name in names:
        ghost.get_submodule(name).register_forward_pre_hook(note(name), with_kwargs=True)
    _run(ghost, image_size)
    return {name: shape for name, shape in shapes.items() if shape is not None}


def droppable(model: nn.Module, names: Sequence[str], image_size: int) -> tuple[str, ...]:
    """Those of some blocks that may go whole, so that what comes in goes out (not activations by themselves).

    Each stands under one name and gives one map, of the shape of the only one it takes, that is not changed in place.
    """
    copied = copy.deepcopy(model)
    copied.eval()
    shared, seen = shared_modules(copied), list[tuple[str, bool, Any, int]]()

    def note(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            maps = [value for value in (*inputs, output) if isinstance(value, torch.Tensor) and value.ndim == 4]
            same = len(inputs) == 1 and not named and len(maps) == 2 and maps[0].shape == maps[1].shape
            seen.append((name, same, output, output._version if same else 0))

        return hook

    blocks = [n for n in names if n not in shared and not is_activation_module(copied.get_submodule(n))]
    for name in blocks:
        copied.get_submodule(name).register_forward_hook(note(name), with_kwargs=True)
    _run(copied, image_size)
    wrong = {name for name, same, output, version in seen if not same or output._version != version}
    return tuple(name for name in blocks if name in {name for name, *_ in seen} - wrong)


def _run(ghost: nn.Module, image_size: int) -> None:
    """One forward pass of one image."""
    device = next((p.device for p in ghost.parameters()), torch.device("cpu"))
    images = torch.zeros(1, in_channels(ghost), image_size, image_size, device=device, dtype=dtype_of(ghost))
    try:
        with torch.no_grad():
            ghost(images)
    except Exception as error:  # the user's code runs: anything can be raised
        raise BadConfig(
            f"{type(ghost).__name__} does not run on {image_size} x {image_size} images ({first_line(error)}): "
            "choose another image_size"
        ) from error


def check_weights(model: nn.Module) -> None:
    """Raise `BadModel` for layers whose weights are not plain parameters: quantised, normed or pruned ones."""
    homes = ("torch.ao.nn", "torch.nn.quantized")
    found = [n for n, m in model.named_modules() if type(m).__module__.startswith(homes)]
    if found:
        raise BadModel(f"the network is quantised ({', '.join(found[:3])}): merge the float network, then quantise")
    layers = ((n, m) for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, _BatchNorm)))
    found = [n for n, m in layers if m.weight is not None and not isinstance(m.weight, nn.Parameter)]
    if found:
        raise BadModel(
            f"weights are computed from others ({', '.join(found[:3])}), as by weight_norm or pruning: make "
            "them permanent first, with remove_parametrizations or prune.remove"
        )
