"""Recipes: a small JSON file from which a shrunk or merged network is rebuilt, beside its weights.

No code is stored: the recipe names the model's function, the weights are safetensors. A function of torchvision or timm
is called as it is; any other only if whoever loads the recipe names it too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import records
from .checkpoints import load_tensors, save_tensors
from .errors import BadConfig, BadModel, BadRecord, require
from .masks import Mask, Plan
from .merging import Only, merge, unmerged
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
        runs: sites that are merged together.
        dropped: sites whose whole block is gone.
        boundary: name of the boundary activation in `torch.nn`, or None.
        hoist: whether padding was hoisted.
        merged: names of the sites (of runs: joined by '+') that are merged.
        border_size: image size that the borders' biases are for; None for a channel of ones, or if hoisted.
    """

    model: str
    classes: tuple[str, ...]
    image_size: int
    options: Mapping[str, Any] = field(default_factory=dict)
    mask: Mapping[str, bool] | None = None
    boundary: str | None = None
    merged: tuple[str, ...] = ()
    runs: tuple[tuple[str, ...], ...] = ()
    hoist: bool = True
    border_size: int | None = None
    dropped: tuple[str, ...] = ()

    def build(self) -> nn.Module:
        """The network, with random weights, in eval."""
        model = load_model(self.model, self.classes, "none", self.options).model
        if self.mask is not None:
            plan = Plan(Mask(self.mask), self.runs, self.dropped)
            model = shrink(model, plan, activation(self.boundary), self.image_size, self.hoist)
        model = merge(model, self.merged, self.border_size) if self.merged else model
        model.eval()  # some networks' train() returns nothing
        return model

    def merge_into(
        self, model: nn.Module, only: Only = None, border_size: int | None = None
    ) -> tuple[nn.Module, Recipe]:
        """The network with its removed sites merged (those in `only`, if given), and its recipe."""
        require(border_size is None or not self.hoist, "the padding was hoisted: its borders need no image size")
        require(not self.merged or self.hoist or border_size == self.border_size,
                f"part of it was merged with borders for image size {self.border_size}, found {border_size}: "
                "merge the rest alike")  # fmt: skip
        done = merge(model, only, border_size)
        left = unmerged(done)
        merged = tuple(name for name in unmerged(model) if name not in left)
        return done, replace(self, merged=(*self.merged, *merged), border_size=border_size)


def save(path: Path | str, model: nn.Module, recipe: Recipe) -> Path:
    """Write weights (<path>.safetensors), then recipe (<path>.json); return the recipe's path."""
    path = _stem(path)
    save_tensors(_weights(path), model.state_dict())
    return records.write_json(_json(path), asdict(recipe))


def load(path: Path | str, trust: str | None = None) -> tuple[nn.Module, Recipe]:
    """The network that `save` wrote, in eval, and its recipe.

    Args:
        path: of the recipe, with or without '.json'; the weights lie beside it.
        trust: the 'package.module:function' that the recipe may import and call; without it only the functions of
            torchvision and timm are.
    Raises:
        BadRecord, BadModel: if either file is missing, damaged, or they do not fit; or if the recipe is of a function
            that is not trusted.
    """
    path = _stem(path)
    found = records.read_json(_json(path))
    try:
        recipe = Recipe(**{key: _tuples(value) for key, value in found.items()})
        own = str(recipe.model)
        require(":" not in own or own == trust, f"{_json(path)} would import and call {own}: if that is your own code, "
                f"give --trust {own} (in Python trust={own!r})", BadModel)  # fmt: skip
        model = recipe.build()
    except (AttributeError, TypeError, ValueError) as error:
        raise BadRecord(f"{_json(path)} is not a recipe: {error}") from error
    load_weights(model, load_tensors(_weights(path))[0], str(_weights(path)))
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


def _json(stem: Path) -> Path:
    return stem.with_name(f"{stem.name}.json")  # not with_suffix: 'net-0.5' has a dot


def _weights(stem: Path) -> Path:
    return stem.with_name(f"{stem.name}.safetensors")


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
