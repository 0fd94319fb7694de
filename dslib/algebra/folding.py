"""Folding: what has no activation inside becomes one convolution, the network's function unchanged.

A BatchNorm goes into the convolution before it, the branches of RepVGG and MobileOne into one. That is what
every deployment does, so it is also the fair baseline of a measurement.
"""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from timm.layers import BatchNormAct2d, Conv2dSame
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ..errors import BadConfig, DslibError, NotMergeable, NotTraceable
from . import affine
from .affine import NO_PADDING, Affine
from .blocks import check_weights, count_of, innermost
from .forward import Call, hooked
from .graphs import after, first_conv, module_of
from .interpreting import Interpreter, Shift, macs_of, start_of
from .layers import from_batchnorm, from_conv
from .linear import SITE_KEY, channels_of
from .merged_block import merged_block
from .tracing import check_layers, trace

LIMITS = {torch.float16: 1e-2, torch.bfloat16: 5e-2}  # of the largest output; others: 1e-3


def fold(model: nn.Module, images: Tensor, branches: bool = True, blocks: Iterable[str] = ()) -> nn.Module:
    """A copy, in eval, with parallel branches and BatchNorms folded into convolutions.

    Folded are the parallel branches at the beginning of a block, where that costs no more multiply-accumulates
    (RepVGG, MobileOne), and each BatchNorm that directly follows a convolution. What follows what is seen in one
    forward pass, so any model's code will do; the result is checked. Shrunk blocks stay several convolutions:
    `merge` is for them.

    Args:
        model: the network; left as it is.
        images: (N, C, H, W), any values; on the network's device.
        branches: False folds BatchNorms only; then every convolution stays under its name.
        blocks: names; a BatchNorm is not folded across the border of one of these.
    Raises:
        DslibError: if no folded copy agrees with the network, or its output is not finite.
        BadModel: if weights are quantised, or computed from others.
    Source: Ding et al., RepVGG, CVPR 2021, section 3.3.
    """
    check_weights(model)
    with torch.inference_mode(False), torch.no_grad():
        images = images.clone()  # not an inference tensor: those do not tell when they are written into
        plain = copy.deepcopy(model)
        plain.eval()  # some networks' train() returns nothing
        expected = _outputs(plain(images))
        if not all(bool(t.isfinite().all()) for t in expected):
            raise DslibError("the network's output is not finite: its weights are damaged, or the images are")
        for also_branches in (True, False) if branches else (False,):
            own = copy.deepcopy(plain) if also_branches else plain  # nothing comes after the last try
            try:
                folded = _folded(own, images, also_branches, tuple(f"{name}." for name in blocks))
                found = _outputs(folded(images))
            except Exception:  # the user's code runs: it may look into a block whose branches were folded away
                if not also_branches:
                    raise
                continue
            if _agree(found, expected):
                return folded
    raise DslibError("folding changed the output: please report the model")


def _folded(folded: nn.Module, images: Tensor, branches: bool, inside: tuple[str, ...]) -> nn.Module:
    """The network, changed in place."""
    for name in _branched(folded) if branches else ():
        _fold_block(folded, name)
    for conv_name, bn_name in _conv_bn_pairs(folded, images):
        if any(conv_name.startswith(block) != bn_name.startswith(block) for block in inside):
            continue
        bn = folded.get_submodule(bn_name)
        fused = _fused(folded.get_submodule(conv_name), bn)
        remains = getattr(bn, "folded", None)  # a hoisted BatchNorm also pads
        folded.set_submodule(conv_name, fused)
        folded.set_submodule(bn_name, remains(fused) if remains else nn.Sequential(*bn.children()))
    return folded


def _outputs(found: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor)]


def _agree(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(
        float((a - b).abs().max()) <= LIMITS.get(b.dtype, 1e-3) * float(b.abs().max()) + 1e-6
        for a, b in zip(found, expected, strict=True)
    )


def _branched(model: nn.Module) -> list[str]:
    """Names of the innermost blocks that hold more than one convolution and its BatchNorm."""

    def branched(block: nn.Module) -> bool:
        convolutions, norms = count_of(block, nn.Conv2d), count_of(block, _BatchNorm)
        shrunk = any(isinstance(m, fx.GraphModule) and SITE_KEY in m.meta for m in block.modules())
        return convolutions >= 1 and norms >= 1 and convolutions + norms >= 3 and not shrunk

    return innermost(model, branched)


def _fold_block(model: nn.Module, name: str) -> None:
    """Put one convolution in the place of a block's affine beginning, if that is several layers and costs no more."""
    try:
        linear = trace(model.get_submodule(name), name)
        check_layers(linear)
        found = affine_prefix(linear, start_of(channels_of(linear, None), linear))
        if found is not None and found.layers >= 3 and found.whole.weight.numel() <= found.macs:
            merged = merged_block(found.whole, first_conv(linear), after(linear, found.node))
            model.set_submodule(name, merged.eval())
    except (NotMergeable, NotTraceable, BadConfig):
        return  # it stays as it is


class Prefix(NamedTuple):
    """What a block computes before the first operation that is not affine.

    Args:
        whole: the map.
        node: the node that has computed it, the only one that the rest of the block reads.
        layers: how many convolutions and BatchNorms it holds.
        macs: multiply-accumulates of its convolutions per output pixel.
    """

    whole: Affine
    node: fx.Node
    layers: int
    macs: float


def affine_prefix(traced: fx.GraphModule, start: Affine) -> Prefix | None:
    """The longest affine beginning of a block in eval, or None if the rest reads more than its end."""
    run = _PrefixInterpreter(traced, affine.shift)
    run.run(start)
    rest = [n for n in traced.graph.nodes if n.op == "output" or run.values.get(n) is _OTHER]
    read = {a for n in rest for a in n.all_input_nodes if isinstance(run.values[a], (Affine, tuple))}
    end = read.pop() if len(read) == 1 else None
    whole = run.values[end] if end is not None else None
    if end is None or not isinstance(whole, Affine):
        return None
    done = [module_of(traced, n) for n in traced.graph.nodes if isinstance(run.values.get(n), Affine)]
    layers = sum(isinstance(m, (nn.Conv2d, nn.BatchNorm2d)) for m in done)
    return Prefix(whole, end, layers, macs_of(run.seen, whole))


_OTHER = object()  # the value of a node that is not affine


class _PrefixInterpreter(Interpreter):
    """Goes on after an operation that is not affine: what reads its value is not affine either."""

    def __init__(self, traced: fx.GraphModule, shift: Shift) -> None:
        super().__init__(traced, shift)
        self.ends = []
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        """The node's value, noted; `_OTHER` if it is not affine."""
        self.values[n] = _OTHER
        if not any(self.values[a] is _OTHER for a in n.all_input_nodes):
            with contextlib.suppress(NotMergeable):
                self.values[n] = super().run_node(n)
        return self.values[n]


def _fused(conv: Any, bn: Any) -> nn.Conv2d:
    """The convolution with the BatchNorm after it folded in; its class and padding stay."""
    whole: Any = affine.compose(from_conv(conv, NO_PADDING), from_batchnorm(bn))
    fused = copy.deepcopy(conv)
    fused.weight, fused.bias = (nn.Parameter(part.to(conv.weight)) for part in (whole.weight, whole.bias))
    return fused


def _conv_bn_pairs(model: nn.Module, images: Tensor) -> list[tuple[str, str]]:
    """Names of convolutions called once whose output a BatchNorm called once reads, and nothing else."""
    names = {kind: [n for n, m in model.named_modules() if isinstance(m, kind)] for kind in (nn.Conv2d, nn.BatchNorm2d)}
    seen = _Readers()
    convolutions = hooked(model, names[nn.Conv2d], after=seen.convolution)
    with seen, convolutions, hooked(model, names[nn.BatchNorm2d], before=seen.batchnorm, after=seen.leave):
        returned = {id(output) for output in _outputs(model(images))}
    return [
        (made.name, made.batchnorm)
        for key, made in seen.made.items()
        if made.batchnorm
        and made.readers == 0
        and key not in returned
        and seen.calls[made.name] == seen.calls[made.batchnorm] == 1
    ]


@dataclass
class _Made:
    """A convolution's output: held, so that its id is not used again, with what reads it."""

    name: str
    output: Tensor
    version: int
    readers: int = 0
    batchnorm: str = ""


class _Readers(TorchFunctionMode):
    """Watches a forward pass: what reads each convolution's output."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, _Made] = {}
        self.calls: Counter[str] = Counter()
        self.inside = 0  # BatchNorms that are running: what they read is theirs

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if not self.inside and _outputs(found):
            for leaf in _outputs((args, kwargs)):
                if id(leaf) in self.made:
                    self.made[id(leaf)].readers += 1
        return found

    def convolution(self, call: Call) -> None:
        """A convolution is done."""
        self.calls[call.name] += 1
        if type(call.module).forward in (nn.Conv2d.forward, Conv2dSame.forward):
            self.made[id(call.output)] = _Made(call.name, call.output, call.output._version)

    def batchnorm(self, call: Call) -> None:
        """A BatchNorm begins."""
        self.calls[call.name] += 1
        self.inside += 1
        source = self.made.get(id(call.args[0]))
        if source is None:
            return
        layer: Any = call.module
        known = type(layer).forward in (nn.BatchNorm2d.forward, BatchNormAct2d.forward) or hasattr(layer, "folded")
        unread = not source.batchnorm and source.output._version == source.version
        if known and layer.track_running_stats and unread:
            source.batchnorm = call.name
        else:
            source.readers += 1

    def leave(self, _: Call) -> None:
        """A BatchNorm is done."""
        self.inside -= 1
