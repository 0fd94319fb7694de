"""Networks again from what their records say they are, for their latency, which weights do not change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..merging import merge
from ..shrinking import shrink
from ..sites import Mask, Plan, find_sites
from .channels import magnitudes
from .coupling import cut
from .slim import Slim

UNSAID = ("magnitude", "taylor")  # which channels go depends on gradients, or on norms of other weights


def rebuilt(method: str, model: nn.Module, image_size: int, found: Mapping[str, Any]) -> nn.Module | None:
    """What a method made of a network, with other weights; None if its record does not say which channels are left."""
    network = model
    if "widths" in found:
        slim = Slim(model, image_size)
        return slim.extract([found["widths"][group.makers[0]] for group in slim.groups])
    if "strength" in found and method not in UNSAID:
        network = cut(model, found["strength"], image_size, magnitudes, compete=False)
    if "removed" in found:
        mask = Mask({name: name not in found["removed"] for name in find_sites(network, image_size).names})
        dropped = found["removed"] if method == "layers" else found.get("dropped", ())
        network = merge(shrink(network, Plan(mask, dropped=dropped), image_size=image_size))
    return None if network is model else network
