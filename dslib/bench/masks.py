"""The paper's masks A to F of MobileNetV2-1.4, beside narrower networks and the dense one; `dslib bench masks`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from ..blocks import in_channels
from ..dense import dense
from ..devices import pick_device, this_machine
from ..measuring import count_macs
from ..merging import merge
from ..models import load_model
from ..records import Record, as_words, commit
from ..shrinking import shrink
from ..sites import find_sites
from .rows import Rows
from .tables import add_case, add_peaks, add_sizes, cases, say

# Fu et al. 2022: sites kept, and whether the stem keeps its activation
MASKS = {
    "A": ((0, 3, 4, 6, 8, 10, 11, 13, 14, 15, 16), False), "B": ((3, 4, 10, 11, 13, 14, 15, 16), True),
    "C": ((0, 3, 10, 11, 13, 14, 15, 16), True), "D": ((3, 4, 13, 14, 15, 16), False),
    "E": ((0, 3, 13, 14, 15, 16), False), "F": ((), True),
}  # fmt: skip
WIDTHS = (0.65, 0.35)
ORIGINAL = ("mobilenet_v2", {"width_mult": 1.4})


def paper_networks(image_size: int = 224) -> dict[str, nn.Module]:
    """MobileNetV2-1.4, merged with each of the paper's masks, narrower ones and the dense one; random weights."""
    name, options = ORIGINAL
    original = load_model(name, options=options).model
    original.eval()
    networks = {"original": original, **{letter: masked(original, letter, image_size) for letter in MASKS}}
    for width in WIDTHS:
        networks[f"width {width}"] = load_model(name, options={"width_mult": width}).model
    networks["dense"] = dense(original, find_sites(original, image_size)).model
    return networks


def masked(original: nn.Module, letter: str, image_size: int = 224) -> nn.Module:
    """MobileNetV2 merged with one of the paper's masks; its first block is never merged, also where it is removed."""
    kept, stem_activation = MASKS[letter]
    sites = find_sites(original, image_size)
    mask = sites.mask([name for i, name in enumerate(sites.names) if i in kept])
    shrunk = shrink(original, mask, nn.ReLU6, image_size)
    merged = merge(shrunk, only=[name for name in mask.removed if name != sites.names[0]])
    if not stem_activation:
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


def record_masks(
    device: str = "auto", image_size: int = 224, batch_size: tuple[int, ...] = (), runtime: tuple[str, ...] = (),
    precision: tuple[str, ...] = (), rounds: int = 30, out: Path | None = None, echo: Callable[[str], object] = print,
) -> Record:  # fmt: skip
    """All networks of `paper_networks` in turns, over runtimes, precisions and batch sizes.

    Args:
        device: to measure.
        image_size: side in pixels.
        batch_size, runtime, precision: all combinations; default what `tables.cases` says.
        rounds: measurements of each.
        out: the record's file; rows that stand there are not measured again.
        echo: is told each row.
    """
    where = pick_device(device)
    config = {"device": str(where), "image_size": image_size, "batch_size": batch_size, "runtime": runtime,
              "precision": precision, "rounds": rounds}  # fmt: skip
    command = f"dslib bench masks {as_words(config)}"
    rows = Rows(Record("masks", command, config, {}, this_machine(where), commit()), out)
    wanted = cases(where, batch_size, runtime, precision)
    peaks = add_peaks(rows, where, (case.precision for case in wanted))
    networks = paper_networks(image_size)
    add_sizes(rows, "MobileNetV2-1.4", networks, image_size)
    for case in wanted:
        echo(say(add_case(rows, "MobileNetV2-1.4", networks, image_size, case, where, peaks, rounds)))
    return rows.record
