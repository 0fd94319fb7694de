"""Stage 1, search: learn which k sites keep their activations. One search yields a mask for every k.

Each site has one real number m and one gate, shared by all its activations: y = x + g * (act(x) - x), with g
the hard top-k indicator of m forward, and the gradient of m straight through backward.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .algebra import is_activation_module, removable_activations, structure_of, trace
from .data import Data
from .errors import BadConfig, MaskMismatch, ranged
from .profiling import CostTable
from .ranking import Importances
from .shrinking import activation_module, not_inplace, replace_activation
from .sites import Sites
from .training import Log, Train, groups, train

GATES = "dslib_gates"


@dataclass(frozen=True)
class Search(Train):
    """Settings of a search; defaults are the paper's on ImageNet.

    Args:
        k: sites kept at the end of the search.
        latency_weight: lambda of the latency-aware decay, in loss per unit of m.
        anneal: share of the training over which the number of open gates falls from all to k; 0 is the paper's:
            k from the first step.
        gate_lr_scale: learning rate of m, relative to the weights'.
    """

    k: int = 8
    latency_weight: float = ranged(0.0, "0 or more")
    anneal: float = ranged(0.0, "0 to 1")
    gate_lr_scale: float = ranged(1.0, "more than 0")


class Gates(nn.Module):
    """The importances of all sites and which gates are open: exactly `k` at every step.

    Args:
        names: of the sites.
    """

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = tuple(names)
        self.m = nn.Parameter(torch.ones(len(names)))
        self.open = [True] * len(names)
        self.register_buffer("flags", torch.ones(len(names), dtype=torch.bool), persistent=False)

    def keep(self, k: int) -> None:
        """Open the gates of the k largest m, close the others; ties go to the earlier site."""
        if not 0 <= k <= len(self.names):
            raise BadConfig(f"expected 0 to {len(self.names)} open gates, found {k}")
        values = self.m.tolist()
        ranked = sorted(range(len(self.names)), key=lambda i: (-values[i], i))
        for place, i in enumerate(ranked):
            self.open[i] = place < k
        self.get_buffer("flags").copy_(torch.tensor(self.open))

    @property
    def kept(self) -> tuple[str, ...]:
        """Names of the sites whose gates are open."""
        return tuple(name for name, on in zip(self.names, self.open, strict=True) if on)


class Gate(nn.Module):
    """An activation behind its site's gate: y = x + g * (act(x) - x), elementwise.

    Args:
        act: the activation; must leave its input as it is.
        gates: shared by all.
        index: of the site among them.
    """

    def __init__(self, act: nn.Module, gates: Gates, index: int) -> None:
        super().__init__()
        self.act, self.index = act, index
        self._gates = [gates]  # in a list: every gate would otherwise register the shared module as its own

    @property
    def gates(self) -> Gates:
        """What all gates share."""
        return self._gates[0]

    def forward(self, x: Tensor) -> Tensor:
        """The activation if the gate is open, x bit for bit if not."""
        if torch.compiler.is_compiling():  # a choice in Python would be compiled anew with every mask
            y = torch.where(self.gates.get_buffer("flags")[self.index], self.act(x), x)
        else:
            y = self.act(x) if self.gates.open[self.index] else x
        return _StraightThrough.apply(y, x.detach(), self.gates.m[self.index], self.act)


class _StraightThrough(torch.autograd.Function):
    """Passes y on; gives m the gradient sum(grad * (act(x) - x)), recomputed in the backward pass."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, m: Tensor, act: nn.Module) -> Tensor:
        ctx.save_for_backward(x)
        ctx.act = act
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor, None]:
        (x,) = ctx.saved_tensors
        with torch.no_grad():
            return grad, None, (grad * (ctx.act(x) - x)).sum(), None


def add_gates(model: nn.Module, sites: Sites, kind: type[Gate] = Gate) -> tuple[nn.Module, Gates]:
    """A copy of the network with a gate at every inner activation of every mergeable site.

    State keys stay, but for the importances, `dslib_gates.m` in the first gate, and slopes of activations that learn.

    Raises:
        MaskMismatch: if no site can be merged.
    """
    sites.check_k(len(sites.always_kept))
    gated, gates = copy.deepcopy(model), Gates(sites.mergeable)
    for index, name in enumerate(gates.names):
        block = gated.get_submodule(name)
        if is_activation_module(block):  # a single one, outside blocks
            gated.set_submodule(name, kind(not_inplace(block), gates, index))
            continue
        traced = trace(block, name)
        for node in removable_activations(traced):
            gate = kind(activation_module(traced, node), gates, index)
            replace_activation(traced, node, gate, f"gate_{node.name}")
        traced.delete_all_unused_submodules()
        traced.recompile()
        gated.set_submodule(name, traced)
    first = next(module for module in gated.modules() if isinstance(module, Gate))
    gates.to(next(model.parameters()).device)
    first.add_module(GATES, gates)  # not to the network itself: an nn.Sequential would call it
    return gated, gates


def latency_decay(m: Tensor, savings: Tensor) -> Tensor:
    """sum_i s_i * m_i, with s the savings (ms, n,) clipped at zero and normalised to sum 1.

    Its gradient lowers the importance of the costliest sites most, so that they are removed first. (The released
    code keeps the smallest parameters and adds the same term: there the costly sites are protected.)
    """
    clipped = savings.clamp(min=0)
    return (clipped / clipped.sum().clamp(min=1e-12) * m).sum()


def search(
    model: nn.Module,
    data: Data,
    sites: Sites,
    cost: CostTable | Mapping[str, float] | None = None,
    config: Search | None = None,
    checkpoint: Path | None = None,
    log: Log | None = None,
) -> Importances:
    """The importance of every site, learnt together with the weights. The model is left as it is.

    Args:
        model: pretrained, on the device to search on.
        data: what to train on.
        sites: of the model.
        cost: from `profile`, or site name -> saving (ms) if it is removed; needed for a latency weight.
        config: the settings.
        checkpoint: where to keep the state, as for `train`.
        log: where to tell how it goes.
    Raises:
        MaskMismatch: if k does not fit the network.
    Source: Fu et al., ICML 2022, stage 1.
    """
    config = config or Search()
    sites.check_k(config.k)
    if config.latency_weight != 0 and cost is None:
        raise BadConfig("latency_weight needs cost: pass cost=dslib.profile(model, sites)")
    gated, gates = add_gates(model, sites)
    saving = dict.fromkeys(gates.names, 0.0) if cost is None else _savings(model, gates.names, cost)
    savings = torch.tensor([saving[name] for name in gates.names], device=gates.m.device)

    def keep_as_many_as_at(progress: float) -> None:
        gates.keep(k_at(progress, config, len(sites)) - len(sites.always_kept))

    def loss(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        value = F.cross_entropy(network(images), labels, label_smoothing=config.label_smoothing)
        return value + config.latency_weight * latency_decay(gates.m, savings)

    def note(epoch: int) -> dict[str, Any]:
        keep_as_many_as_at(epoch / config.epochs)
        return {"kept": list(gates.kept), "m": gates.m.tolist()}

    history = train(
        gated,
        data,
        loss,
        config,
        before_step=keep_as_many_as_at,
        after_epoch=note,
        parameters=gate_groups(gated, gates, config, config.gate_lr_scale),
        checkpoint=checkpoint,
        about=str(savings.tolist()),
        title="search",
        log=log,
    )
    scores = dict(zip(gates.names, gates.m.tolist(), strict=True))
    return Importances(scores, sites.always_kept, sites.names, history, network=structure_of(model))


def _savings(model: nn.Module, names: Sequence[str], cost: CostTable | Mapping[str, float]) -> Mapping[str, float]:
    """Site name -> ms saved, once it is sure that these are numbers, of this network."""
    if isinstance(cost, CostTable):
        cost.check(names)
        if cost.network not in ("", structure_of(model)):
            raise MaskMismatch("the costs are of another network: profile this one")
        return cost.savings
    unknown = [name for name in names if name not in cost]
    if unknown:
        raise MaskMismatch(f"cost has no saving for {', '.join(unknown)}: profile this network")
    wrong = {name: cost[name] for name in names if not math.isfinite(cost[name])}
    if wrong:
        raise MaskMismatch(f"savings are milliseconds, found {wrong}: profile again")
    return cost


def k_at(progress: float, config: Search, sites: int) -> int:
    """Open gates (with those always kept) at `progress` through the search: from all down to k, linearly."""
    if progress >= config.anneal:
        return config.k
    return config.k + round((sites - config.k) * (1 - progress / config.anneal))


def gate_groups(gated: nn.Module, gates: Gates, config: Train, lr_scale: float) -> list[dict[str, Any]]:
    """SGD groups of a gated network: weights as `groups` has them, and the gates' m with its own learning rate."""
    own = groups(gated, config)
    for group in own:
        group["params"] = [p for p in group["params"] if p is not gates.m]
    return [*own, {"params": [gates.m], "weight_decay": 0.0, "lr_scale": lr_scale}]
