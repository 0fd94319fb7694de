"""How fast is MobileNetV2-1.4 with the paper's masks A to F, beside narrower networks and the dense one?"""

from __future__ import annotations

import torch
from torch import nn

from ..algebra import in_channels
from ..baselines import PAPER_KEPT
from ..measuring import count_macs, dense
from ..merging import merge
from ..models import load_model
from ..shrinking import shrink
from ..sites import Sites, find_sites
from .benchmark import Benchmark, Context, Steps
from .tables import Measured, Table

STEM_ACTIVE = "BCF"  # the masks that leave the stem its activation (Fu et al. 2022)
WIDTHS = (0.65, 0.35)
ORIGINAL = ("mobilenet_v2", {"width_mult": 1.4})


def paper_networks(image_size: int = 224) -> dict[str, nn.Module]:
    """MobileNetV2-1.4, merged with each of the paper's masks, narrower ones and the dense one; random weights."""
    name, options = ORIGINAL
    original = load_model(name, options=options).model
    original.eval()
    sites = find_sites(original, image_size)
    networks = {"original": original, **{letter: masked(original, sites, letter) for letter in PAPER_KEPT}}
    for width in WIDTHS:
        networks[f"width {width}"] = load_model(name, options={"width_mult": width}).model
    networks["dense"] = dense(original, sites).model
    return networks


def masked(original: nn.Module, sites: Sites, letter: str) -> nn.Module:
    """MobileNetV2 merged with one of the paper's masks; its first block is never merged, also where it is removed."""
    mask = sites.mask([sites.names[i] for i in PAPER_KEPT[letter]])
    shrunk = shrink(original, mask, nn.ReLU6, sites.image_size)
    merged = merge(shrunk, only=[name for name in mask.removed if name != sites.names[0]])
    if letter not in STEM_ACTIVE:
        merged.set_submodule("features.0.2", nn.Identity())
    return merged


def paper_mflops(model: nn.Module, image_size: int = 224) -> float:
    """Millions of operations of one image as the paper counts them: MACs, and five for each output of a BatchNorm."""
    elements = 0

    def count(_: nn.Module, inputs: object, output: torch.Tensor) -> None:
        nonlocal elements
        elements += output.numel()

    shape = (in_channels(model), image_size, image_size)
    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        model(torch.zeros(1, *shape))
    for hook in hooks:
        hook.remove()
    return (count_macs(model, shape) + 5 * elements) / 1e6


def answer(config: Measured, context: Context[Measured]) -> Steps:
    """All networks of `paper_networks` in turns."""
    table = Table(config, context.device)
    yield from table.peaks()
    yield from table.rows("MobileNetV2-1.4", paper_networks(config.image_size))


BENCHMARK = Benchmark("What does it cost and save here?", Measured, answer, idle=True)
