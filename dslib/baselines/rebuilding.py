"""Networks again from what their records say they are, for their latency, which weights do not change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ..merging import merge
from ..shrinking import shrink
from ..sites import Mask, Plan, find_sites
from .channels import magnitudes
from .coupling import cut
from .slim import Slim

Kept = Mapping[str, Any]
Rebuild = Callable[[nn.Module, int, Kept], nn.Module]


def rebuilt(method: str, model: nn.Module, image_size: int, found: Kept) -> nn.Module | None:
    """The network that a method made, with other weights; None if its record does not say which channels are left.

    Args:
        method: name of one of `METHODS`.
        model: that the method began with.
        image_size: side in pixels.
        found: the record that the method returned.
    """
    rebuild = REBUILD.get(method)
    return None if rebuild is None else rebuild(model, image_size, found)


def _narrowed(model: nn.Module, image_size: int, found: Kept) -> nn.Module:
    return cut(model, found["strength"], image_size, magnitudes, compete=False)


def _slim(model: nn.Module, image_size: int, found: Kept) -> nn.Module:
    slim = Slim(model, image_size)
    return slim.extract([found["widths"][group.makers[0]] for group in slim.groups])


def _without(model: nn.Module, image_size: int, found: Kept) -> nn.Module:
    return _shrunk(model, image_size, {"removed": found["removed"], "dropped": found["removed"]})


def _shrunk(model: nn.Module, image_size: int, found: Kept) -> nn.Module:
    mask = Mask({name: name not in found["removed"] for name in find_sites(model, image_size).names})
    return merge(shrink(model, Plan(mask, dropped=found.get("dropped", ())), image_size=image_size))


def _both(model: nn.Module, image_size: int, found: Kept) -> nn.Module:
    return _shrunk(_narrowed(model, image_size, found), image_size, found)


#: those whose channels depend on gradients, or on norms of other weights, are not among them
REBUILD: dict[str, Rebuild] = {
    "uniform": _narrowed,
    "metapruning": _slim,
    "layers": _without,
    "depthshrinker": _shrunk,
    "given-masks": _shrunk,
    "layer-folding": _shrunk,
    "planner": _shrunk,
    "narrow-and-shrunk": _both,
}
