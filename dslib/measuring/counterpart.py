"""The dense counterpart of a network: one convolution for each block, at the same multiply-accumulates.

The paper's motivating experiment: how much faster the same arithmetic runs when a block is one dense convolution.
Its weights are random, it is made to be measured, not to classify.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..algebra import Call, dtype_of, ghost_of, hooked, in_channels, removable_activations, trace
from ..errors import BadModel, NotTraceable, first_line
from ..models import find_head
from ..shrinking import activation_module
from ..sites import Site, Sites
from .latency import count_macs

TOLERANCE = 0.01
MULTIPLES = (8, 4, 2, 1)  # that widths are rounded to: the first with which the MACs agree
WIDEST, FINEST = 16.0, 1e-4  # factors on widths that are tried


class Dense(NamedTuple):
    """A dense counterpart, and how it was matched.

    `width`: the factor on every width; `multiple`: what widths are rounded to; `macs` and `original_macs`: of one
    image.
    """

    model: nn.Module
    width: float
    multiple: int
    macs: int
    original_macs: int


class DenseBlock(nn.Module):
    """One convolution, its input added where the shapes agree, one activation."""

    def __init__(self, c_in: int, c_out: int, kernel: tuple[int, int], stride: tuple[int, int], act: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, (kernel[0] // 2, kernel[1] // 2))
        self.residual, self.act = stride == (1, 1) and c_in == c_out, act

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) -> (N, C_out, H / stride, W / stride)."""
        y = self.conv(x)
        if self.residual:
            y += x
        found: Tensor = self.act(y)
        return found


@torch.no_grad()
def dense(model: nn.Module, sites: Sites) -> Dense:
    """The network with every site as one dense convolution, its widths scaled so that the MACs are the same.

    A site's convolution has the kernel and stride of its merged one (where it cannot be merged, of its largest). One
    factor scales every width, stem and head included; widths are rounded to multiples of 8, or of 4, 2, 1 where with 8
    no factor gives the original's MACs within 1 %.

    Args:
        model: the network; left as it is.
        sites: of the model; at their image size the MACs are matched.
    Raises:
        BadModel: if it has no site, a site has no single input, or a layer cannot be scaled; the layer is named.
    Source: Fu et al., ICML 2022, section 1 (the motivating profiling).
    """
    if not len(sites):
        raise BadModel("no site: nothing would be replaced; print(dslib.find_sites(model)) shows the blocks")
    shape = (in_channels(model), sites.image_size, sites.image_size)
    wanted = count_macs(model, shape)
    plain = copy.deepcopy(model)
    plain.eval()
    for site in (site for site in sites if site.convolutions):
        plain.set_submodule(site.name, _dense_block(model.get_submodule(site.name), site))
    ghost = ghost_of(plain)
    entries, head = _entries(ghost, shape), find_head(ghost)[0]

    def macs_of(width: float, multiple: int) -> int:
        try:
            return count_macs(_scaled(ghost, width, multiple, entries, head), shape)
        except BadModel:
            raise
        except Exception as error:  # the user's code runs, on other shapes than it was made with
            reason = f"{type(model).__name__} does not run with all widths times {width:.2f}: {first_line(error)}"
            raise BadModel(reason) from error

    width, multiple = _width_for(wanted, macs_of)
    made = _scaled(plain, width, multiple, entries, head)
    residual = [block for block in made.modules() if isinstance(block, DenseBlock) and block.residual]
    for block in residual:
        block.conv.weight *= len(residual) ** -0.5  # or the sums would grow with every block, and overflow float16
    return Dense(made, width, multiple, count_macs(made, shape), wanted)


def _width_for(wanted: int, macs_of: Callable[[float, int], int]) -> tuple[float, int]:
    """The factor on widths, and what they are rounded to, that give the wanted MACs within `TOLERANCE`.

    Raises:
        BadModel: if none does.
    """
    best = (math.inf, 0.0, 0)
    for multiple in MULTIPLES:
        low, high = 0.0, WIDEST
        while high - low > FINEST:
            width = (low + high) / 2
            macs = macs_of(width, multiple)
            low, high = (width, high) if macs < wanted else (low, width)
            best = min(best, (abs(macs / wanted - 1), width, multiple))
        if best[0] <= TOLERANCE:
            return best[1:]
    raise BadModel(f"no width gives {wanted:,} MACs within {TOLERANCE:.0%}: {best[0]:.1%} off at best")


def _dense_block(block: nn.Module, site: Site) -> DenseBlock:
    """What stands for a site, at its own widths."""
    if site.input_shape is None:
        raise BadModel(f"{site.name}: {site.reason or 'no single input'}")
    before, dtype = (1, *site.input_shape), dtype_of(block)
    after = ghost_of(block)(torch.empty(before, device="meta", dtype=dtype)).shape
    sizes = [m.kernel_size for m in block.modules() if isinstance(m, nn.Conv2d)]
    kernel = site.kernel or max(((size[0], size[1]) for size in sizes), key=lambda size: size[0] * size[1])
    stride = (round(before[2] / after[2]), round(before[3] / after[3]))
    act = _activation(block)
    if hasattr(act, "inplace"):
        act.inplace = True  # type: ignore[assignment]
    found = DenseBlock(before[1], after[1], kernel, stride, act)
    ours = copy.deepcopy(found).to("meta")(torch.empty(before, device="meta")).shape
    if ours != after:
        raise BadModel(
            f"{site.name}: one convolution of kernel {kernel} and stride {stride} gives {tuple(ours)}, "
            f"the block {tuple(after)}"
        )
    return found.to(next(block.parameters()).device, dtype)


def _activation(block: nn.Module) -> nn.Module:
    """The first of a block's inner activations; ReLU where its code cannot be read."""
    try:
        traced = trace(block)
    except NotTraceable:
        return nn.ReLU()
    found = removable_activations(traced)
    return activation_module(traced, found[0]) if found else nn.ReLU()


def _entries(ghost: nn.Module, shape: tuple[int, int, int]) -> set[str]:
    """Names of the convolutions that read the network's input: its channels are not scaled."""
    images = torch.empty(1, *shape, device="meta", dtype=dtype_of(ghost))
    calls: list[Call] = []
    convolutions = [name for name, module in ghost.named_modules() if isinstance(module, nn.Conv2d)]
    with hooked(ghost, convolutions, before=calls.append):
        ghost(images)
    return {call.name for call in calls if call.args[0] is images}


def _scaled(base: nn.Module, width: float, multiple: int, entries: set[str], head: str) -> nn.Module:
    """A copy with all widths times `width`, with new random weights."""

    def wide(channels: int) -> int:
        return max(multiple, round(channels * width / multiple) * multiple)

    model = copy.deepcopy(base)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            depthwise = module.groups == module.in_channels > 1
            module.in_channels = module.in_channels if name in entries else wide(module.in_channels)
            module.out_channels = wide(module.out_channels)
            module.groups = module.in_channels if depthwise else module.groups
            _renew(module, module.out_channels, module.in_channels // module.groups, *module.kernel_size)
        elif isinstance(module, nn.Linear):
            module.in_features = wide(module.in_features)
            module.out_features = module.out_features if name == head else wide(module.out_features)
            _renew(module, module.out_features, module.in_features)
        elif isinstance(module, _BatchNorm):
            module.num_features = wide(module.num_features)
            for key, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                if value.ndim:
                    new = value.new_empty(module.num_features)
                    setattr(module, key, nn.Parameter(new) if isinstance(value, nn.Parameter) else new)
            module.reset_parameters()
        else:
            own = next(module.parameters(recurse=False), None)
            if own is not None:
                raise BadModel(f"{name} ({type(module).__name__}): its width cannot be scaled")
    return model


def _renew(layer: nn.Conv2d | nn.Linear, *shape: int) -> None:
    """New weights of this shape: their spread keeps that of the maps; no bias."""
    weight = nn.Parameter(layer.weight.new_empty(shape))
    if not weight.is_meta:
        nn.init.kaiming_normal_(weight, nonlinearity="relu")
    layer.weight = weight
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias.new_zeros(shape[0]))
