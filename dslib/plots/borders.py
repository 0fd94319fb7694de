"""What merging does at the border of a feature map: three ways to merge, and how wrong each is where."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from ..errors import BadConfig
from ..merging import merge
from ..shrinking import shrink
from ..sites import Mask, Sites
from .drawing import new_figure, to_svg


def plot_border(errors: Mapping[str, np.ndarray], top: float | None = None) -> Figure:
    """Maps (H, W) of the largest difference over channels, relative to the largest output, one panel each.

    Args:
        errors: title -> map.
        top: the end of the colour scale; default the largest value.
    """
    figure, panels = new_figure(3.4 * len(errors) + 0.6, 3.2, columns=len(errors))
    top = top or max(float(error.max()) for error in errors.values())
    for axes, (title, error) in zip(np.atleast_1d(panels), errors.items(), strict=True):
        image = axes.imshow(error, cmap="viridis", vmin=0, vmax=top)
        axes.set(title=title, xlabel="column, px", ylabel="row, px")
    figure.colorbar(image, ax=panels, label="difference / largest output")
    return figure


def inputs_of(model: nn.Module, names: Sequence[str], images: Tensor) -> dict[str, Tensor]:
    """What each of these modules reads (B, C, H, W) when the model runs on images (B, C, H, W)."""
    found: dict[str, Tensor] = {}

    def note(name: str, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found[name] = inputs[0]

    hooks = [model.get_submodule(name).register_forward_pre_hook(partial(note, name)) for name in names]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    return found


def three_merges(model: nn.Module, mask: Mask, image_size: int) -> tuple[nn.Module, nn.Module, dict[str, nn.Module]]:
    """The network shrunk with its padding hoisted, and with its padding where it was; and three ways to merge them."""
    hoisted, torn = shrink(model, mask), shrink(model, mask, hoist=False)
    merges = {
        "plain, hoisted": merge(hoisted),
        "exact, a bias a position": merge(torn, image_size=image_size),
        "exact, a channel of ones": merge(torn),
    }
    return hoisted, torn, merges


def border_errors(
    inputs: Mapping[str, Tensor], torn: nn.Module, merges: Mapping[str, nn.Module]
) -> dict[str, dict[str, np.ndarray]]:
    """Block -> way to merge -> map (H, W): the largest difference over images and channels / the largest output.

    Args:
        inputs: block -> what it reads.
        torn: the network as it was before merging, its padding where it was.
        merges: title -> merged network.
    """

    def error(name: str, merged: nn.Module) -> np.ndarray:
        expected, found = (network.get_submodule(name)(inputs[name]) for network in (torn, merged))
        return ((found - expected).abs().amax((0, 1)) / expected.abs().max()).numpy()

    with torch.no_grad():
        return {name: {title: error(name, merged) for title, merged in merges.items()} for name in inputs}


def border_panes(errors: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, dict[str, str]]:
    """The maps of `border_errors` as SVG, all on one scale."""
    return {
        name: {title: to_svg(plot_border({f"{name}: {title}": error}, top=0.3)) for title, error in row.items()}
        for name, row in errors.items()
    }


def border_now(model: nn.Module, sites: Sites, images: Tensor) -> Callable[[str, str], str]:
    """(block, way to merge) -> its map, for any mergeable block: torn out alone and merged when asked for."""

    def now(name: str, title: str) -> str:
        if name not in sites.mergeable:
            raise BadConfig(f"expected one of {', '.join(sites.mergeable)}, found {name}")
        mask = sites.mask([other for other in sites.names if other != name])
        _, torn, merges = three_merges(model, mask, sites.image_size)
        if title not in merges:
            raise BadConfig(f"expected one of {', '.join(merges)}, found {title}")
        errors = border_errors(inputs_of(model, [name], images), torn, {title: merges[title]})
        return border_panes(errors)[name][title]

    return now
