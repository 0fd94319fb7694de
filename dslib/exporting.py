"""Recipes: a small JSON file from which a shrunk or merged network is rebuilt, beside its weights.

No code is stored and none is run: the recipe names the model's function, the weights are safetensors.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import records
from .checkpoints import load_tensors, save_tensors
from .errors import BadConfig, BadRecord, require
from .masks import Mask
from .merging import merge, unmerged
from .models import load_model, load_weights
from .shrinking import shrink


@dataclass(frozen=True)
class Recipe:
    """How a network was made, all but its weights.

    Args:
        model: name of the original, as for `load_model`.
        classes: names in label order.
        image_size: side in pixels.
        options: keyword arguments of the model's function.
        mask: site name -> kept; None for the original network.
        boundary: name of the boundary activation in `torch.nn`, or None.
        merged: names of the sites that are merged.
    """

    model: str
    classes: tuple[str, ...]
    image_size: int
    options: Mapping[str, Any] = field(default_factory=dict)
    mask: Mapping[str, bool] | None = None
    boundary: str | None = None
    merged: tuple[str, ...] = ()

    def build(self) -> nn.Module:
        """The network, with random weights, in eval."""
        model = load_model(self.model, self.classes, "none", self.options).model
        if self.mask is not None:
            model = shrink(model, Mask(self.mask), activation(self.boundary), self.image_size)
        return (merge(model, self.merged) if self.merged else model).eval()

    def merge_into(self, model: nn.Module, only: Collection[str] | None = None) -> tuple[nn.Module, Recipe]:
        """The network with its removed sites merged (those in `only`, if given), and its recipe."""
        merged = tuple(unmerged(model)) if only is None else tuple(only)
        return merge(model, merged), replace(self, merged=(*self.merged, *merged))


def save(path: Path | str, model: nn.Module, recipe: Recipe) -> Path:
    """Write weights (<path>.safetensors), then recipe (<path>.json); return the recipe's path."""
    path = _stem(path)
    save_tensors(path.with_suffix(".safetensors"), model.state_dict())
    return records.write_json(path.with_suffix(".json"), asdict(recipe))


def load(path: Path | str) -> tuple[nn.Module, Recipe]:
    """The network that `save` wrote, in eval, and its recipe.

    Args:
        path: of the recipe, with or without '.json'; the weights lie beside it.
    Raises:
        BadRecord, BadModel: if either file is missing, damaged, or they do not fit.
    """
    path = _stem(path)
    found = records.read_json(path.with_suffix(".json"))
    try:
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in found.items()}
        recipe = Recipe(**fields)
    except TypeError as error:
        raise BadRecord(f"{path.with_suffix('.json')} is not a recipe: {error}") from error
    model = recipe.build()
    load_weights(model, load_tensors(path.with_suffix(".safetensors"))[0], str(path.with_suffix(".safetensors")))
    return model, recipe


def activation(name: str | None) -> type[nn.Module] | None:
    """The activation class called `name` in `torch.nn`; None for None.

    Raises:
        BadConfig: if there is none of this name.
    """
    if name is None:
        return None
    found = getattr(nn.modules.activation, name, None)
    require(_is_elementwise(found),
            f"unknown boundary activation {name!r}: expected a name in torch.nn such as ReLU6", BadConfig)  # fmt: skip
    return found


def _is_elementwise(kind: Any) -> bool:
    """Whether `kind()` is a module that maps a feature map to one of the same shape."""
    try:
        return kind()(torch.zeros(1, 2, 2, 2)).shape == (1, 2, 2, 2)
    except Exception:  # not a class, not callable with nothing, not for feature maps
        return False


def _stem(path: Path | str) -> Path:
    path = Path(path)
    return path.with_suffix("") if path.suffix in (".json", ".safetensors") else path
