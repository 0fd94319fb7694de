"""A network's blocks: which there are, and which of them may be merged together, dropped or replaced."""

from __future__ import annotations

import copy
import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import BadConfig, BadModel, NotTraceable
from .forward import Call, ghost_of, hooked, is_map, run_once
from .graphs import is_activation_module, removable_activations
from .tracing import trace

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def site_names(model: nn.Module) -> list[str]:
    """Names of the innermost blocks with two convolutions and two BatchNorms, in order."""
    return innermost(model, lambda block: count_of(block, nn.Conv2d) >= 2 and count_of(block, _BatchNorm) >= 2)


def innermost(model: nn.Module, wanted: Callable[[nn.Module], bool]) -> list[str]:
    """Names of the modules that are `wanted` and hold no other such, in order; neither containers nor the root."""
    blocks = [n for n, m in model.named_modules() if n and not isinstance(m, _CONTAINERS) and wanted(m)]
    return [name for name in blocks if not any(other.startswith(f"{name}.") for other in blocks)]


def count_of(block: nn.Module, kind: type[nn.Module]) -> int:
    """How many layers of a kind a block has."""
    return sum(isinstance(m, kind) for m in block.modules())


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


def structure_of(model: nn.Module) -> str:
    """Twelve hex digits that two networks share if their modules and the shapes of their parameters are the same.

    The number of classes, of the last linear layer, does not count.
    """
    kinds = [f"{name}:{type(module).__name__}" for name, module in model.named_modules()]
    head = next((name for name, m in reversed(list(model.named_modules())) if isinstance(m, nn.Linear)), None)
    shapes = [f"{name}:{tuple(p.shape)}" for name, p in model.named_parameters() if name.rpartition(".")[0] != head]
    return hashlib.sha256("\n".join([*kinds, *shapes]).encode()).hexdigest()[:12]


def shared_modules(model: nn.Module) -> dict[str, str]:
    """Module name -> why it cannot be replaced, for modules that the network holds under several names."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    several = [found for found in names.values() if len(found) > 1]
    return {n: f"is one module under {len(found)} names ({', '.join(found)})" for found in several for n in found}


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


def droppable(model: nn.Module, names: Sequence[str], image_size: int) -> tuple[str, ...]:
    """Those of some blocks that may go whole, so that what comes in goes out (not activations by themselves).

    Each stands under one name and gives one map, of the shape of the only one it takes, that is not changed in place.
    """
    copied = copy.deepcopy(model)
    copied.eval()
    shared, seen = shared_modules(copied), list[tuple[Call, bool, int]]()

    def note(call: Call) -> None:
        maps = [value for value in (*call.args, call.output) if is_map(value)]
        same = len(call.args) == 1 and not call.kwargs and len(maps) == 2 and maps[0].shape == maps[1].shape
        seen.append((call, same, call.output._version if same else 0))

    blocks = [n for n in names if n not in shared and not is_activation_module(copied.get_submodule(n))]
    with hooked(copied, blocks, after=note):
        run_once(copied, image_size)
    wrong = {call.name for call, same, version in seen if not same or call.output._version != version}
    return tuple(name for name in blocks if name in {call.name for call, *_ in seen} - wrong)


def check_runs(model: nn.Module, runs: Sequence[Sequence[str]], image_size: int) -> None:
    """Raise `BadConfig` unless each block of a run feeds the next and nothing else.

    That is known for neighbours in one `nn.Sequential` (or in one nested in another) that is called as a whole;
    whether it is, is seen in one forward pass on the `meta` device.
    """
    single = set(single_activations(model))
    for names in runs:
        if not single.isdisjoint(names):
            alone = ", ".join(sorted(single.intersection(names)))
            raise BadConfig(f"a run is of blocks: {alone} is an activation by itself")
        home, order = next(((h, leaves) for h, leaves in _orders(model) if names[0] in leaves), ("", []))
        for a, b in pairwise(names):
            if not _are_neighbours(model, order, a, b):
                raise BadConfig(f"the sites of a run must be neighbours in one nn.Sequential, found {a} and {b}")
        calls = _calls(model, (home, *names), image_size)
        for name in (home, *names):
            if calls[name] != 1:
                raise BadConfig(
                    f"the sites {', '.join(names)} cannot be merged together: {[name]} is called "
                    f"{calls[name]} times in a forward pass, expected once"
                )


def _calls(model: nn.Module, names: Sequence[str], image_size: int) -> Counter[str]:
    """How often each of some modules is called in a forward pass."""
    ghost, calls = ghost_of(model), Counter[str]()
    with hooked(ghost, names, before=lambda call: calls.update([call.name])):
        run_once(ghost, image_size)
    return calls


def _are_neighbours(model: nn.Module, order: list[str], a: str, b: str) -> bool:
    if a not in order or b not in order[order.index(a) + 1 :]:
        return False
    between = order[order.index(a) + 1 : order.index(b)]
    return all(isinstance(model.get_submodule(name), nn.Identity) for name in between)


def _orders(model: nn.Module) -> list[tuple[str, list[str]]]:
    """Each outermost Sequential's name, and the names of what it calls, in order."""
    plain = [(n, m) for n, m in model.named_modules() if _is_plain_sequential(m)]
    inside = {_child(n, child) for n, m in plain for child, _ in m.named_children()}
    return [(n, _leaves(n, m)) for n, m in plain if n not in inside]


def _leaves(name: str, module: nn.Module) -> list[str]:
    """Names of what a Sequential calls, in order, Sequentials inside it opened."""
    if not _is_plain_sequential(module):
        return [name]
    return [leaf for child, m in module.named_children() for leaf in _leaves(_child(name, child), m)]


def _child(name: str, child: str) -> str:
    return f"{name}.{child}" if name else child


def _is_plain_sequential(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward
