"""What one forward pass of a network shows, on a copy: hooks that come off again, and the shapes that go in."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import BadConfig, first_line

Shape = tuple[int, int, int]


class Call(NamedTuple):
    """One call of a named module; `output` is None before the call."""

    name: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = None


@contextmanager
def hooked(
    model: nn.Module,
    names: Iterable[str],
    before: Callable[[Call], object] | None = None,
    after: Callable[[Call], object] | None = None,
) -> Iterator[None]:
    """Within the block `before` and `after` are told of every call of the named modules."""
    handles = []
    for name in names:
        module = model.get_submodule(name)
        if before is not None:
            handles.append(module.register_forward_pre_hook(_teller(before, name), with_kwargs=True))
        if after is not None:
            handles.append(module.register_forward_hook(_teller(after, name), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _teller(tell: Callable[[Call], object], name: str) -> Callable[..., None]:
    def hook(*call: Any) -> None:  # what a hook returns would take the place of the output
        tell(Call(name, *call))

    return hook


def in_channels(model: nn.Module) -> int:
    """Channels that a network or block takes: those of its first convolution."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            return module.in_channels
    raise BadConfig(f"{type(model).__name__} has no convolution: expected a CNN")


def dtype_of(module: nn.Module) -> torch.dtype:
    """The floating dtype of a module's first parameter, float32 if it has none."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)


def ghost_of(module: nn.Module) -> nn.Module:
    """A copy on the `meta` device, in eval: shapes without values."""
    ghost = copy.deepcopy(module).to("meta")
    ghost.eval()  # some networks' train() returns nothing
    return ghost


def run_once(model: nn.Module, image_size: int) -> None:
    """One forward pass of one blank image."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    images = torch.zeros(1, in_channels(model), image_size, image_size, device=device, dtype=dtype_of(model))
    try:
        with torch.no_grad():
            model(images)
    except Exception as error:  # the user's code runs: anything can be raised
        raise BadConfig(
            f"{type(model).__name__} does not run on {image_size} x {image_size} images ({first_line(error)}): "
            "choose another image_size"
        ) from error


def is_map(value: Any) -> bool:
    """Whether a value is a batch of feature maps, (N, C, H, W)."""
    return isinstance(value, Tensor) and value.ndim == 4


def input_shapes(model: nn.Module, names: Iterable[str], image_size: int) -> dict[str, Shape]:
    """Input (C, H, W) of each named module that takes one feature map, always of one size, in one forward pass."""
    if not (isinstance(image_size, int) and image_size > 0):
        raise BadConfig(f"image_size is in pixels, found {image_size!r}")
    copied = copy.deepcopy(model)
    copied.eval()
    shapes: dict[str, set[Any]] = {}

    def note(call: Call) -> None:
        alone = len(call.args) == 1 and not call.kwargs and is_map(call.args[0])
        shapes.setdefault(call.name, set()).add(tuple(call.args[0].shape[1:]) if alone else None)

    with hooked(copied, names, before=note):
        run_once(copied, image_size)
    return {name: shape for name, seen in shapes.items() for shape in seen if len(seen) == 1 and shape is not None}
