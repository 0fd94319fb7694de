"""Sites: the blocks whose inner activations are kept or removed together."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .affine import Affine
from .errors import BadConfig, MaskMismatch, NotMergeable, NotTraceable, require
from .hoisting import hoist
from .interpreting import interpret
from .masks import Mask
from .tracing import bypass, check_layers, dtype_of, input_sizes, removable_activations, tail, trace

if TYPE_CHECKING:
    import pandas as pd

Shape = tuple[int, int, int]
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class Site:
    """One block, as `find_sites` saw it.

    Args:
        name: module path in the network, e.g. 'features.3'.
        activations: how many inner activations go if the site is removed.
        input_shape: (C, H, W) at the image size looked at, or None if its input is not one feature map.
        c_out, kernel, stride: of the merged convolution; None if not mergeable.
        reason: why it cannot be merged; '' if it can.
        convolutions: how many it has.
        activation_at_end: whether an activation already ends the block.
    """

    name: str
    activations: int
    input_shape: Shape | None
    convolutions: int
    c_out: int | None = None
    kernel: tuple[int, int] | None = None
    stride: tuple[int, int] | None = None
    activation_at_end: bool = False
    reason: str = ""

    @property
    def mergeable(self) -> bool:
        """Whether one dense convolution can equal the block once its inner activations are out."""
        return not self.reason


class Sites(Sequence[Site]):
    """The sites of a network, in order. Printed as a table; `frame` is the same as a DataFrame.

    Args:
        found: the sites.
        foldable: names of blocks without inner activations (RepVGG, MobileOne): merging them needs no mask.
        image_size: the square image size (pixels) that the shapes are for.
    """

    def __init__(self, found: Sequence[Site], foldable: Sequence[str], image_size: int) -> None:
        self._found, self.foldable, self.image_size = tuple(found), tuple(foldable), image_size

    @overload
    def __getitem__(self, index: int) -> Site: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Site]: ...
    def __getitem__(self, index: int | slice) -> Site | Sequence[Site]:
        return self._found[index]

    def __len__(self) -> int:
        return len(self._found)

    def __repr__(self) -> str:
        lines = [self.frame.to_string() if self else "no sites"]
        if self.foldable:
            lines.append(f"foldable (no inner activation): {', '.join(self.foldable)}")
        return "\n".join(lines)

    @property
    def names(self) -> tuple[str, ...]:
        """Every site's name, in order."""
        return tuple(site.name for site in self)

    @property
    def mergeable(self) -> tuple[str, ...]:
        """Names of those that can be merged, in order."""
        return tuple(site.name for site in self if site.mergeable)

    @property
    def frame(self) -> pd.DataFrame:
        """One row per site: input, merged convolution, whether it can be merged and why not."""
        import pandas as pd

        rows = [
            {
                "site": site.name,
                "input": "x".join(map(str, site.input_shape or ())),
                "activations": site.activations,
                "c_out": site.c_out,
                "kernel": site.kernel and "x".join(map(str, site.kernel)),
                "stride": site.stride and site.stride[0],
                "mergeable": site.mergeable,
                "reason": site.reason,
            }
            for site in self
        ]
        return pd.DataFrame(rows).set_index("site") if rows else pd.DataFrame()

    def mask(self, kept: Collection[str]) -> Mask:
        """The mask that keeps these sites, and those that cannot be merged, and removes the others.

        Raises:
            MaskMismatch: if a name is not a site's.
        """
        unknown = set(kept) - set(self.names)
        require(not unknown, f"not sites of this network: {sorted(unknown)}; its sites: {', '.join(self.names)}",
                MaskMismatch)  # fmt: skip
        return Mask({site.name: site.name in kept or not site.mergeable for site in self})

    def check_k(self, k: int) -> None:
        """Raise `MaskMismatch` unless k sites can be kept: those that cannot be merged always are."""
        low, high = len(self) - len(self.mergeable), len(self)
        require(bool(self.mergeable), "this network has no mergeable site: nothing can be removed; "
                "print(dslib.find_sites(model)) shows why", MaskMismatch)  # fmt: skip
        require(isinstance(k, int) and low <= k <= high,
                f"k is the number of sites kept: expected {low} to {high} for this network, found {k}",
                MaskMismatch)  # fmt: skip


def find_sites(model: nn.Module, image_size: int = 224) -> Sites:
    """The network's sites, each with its merged shape or the reason why it cannot be merged.

    A site is the innermost module that is neither a container nor the root and owns at least two
    convolutions and two BatchNorms. No class names are looked at. The model is not changed.

    Args:
        model: any CNN whose forward takes (N, C, H, W).
        image_size: side of the square input, in pixels.
    Raises:
        BadConfig: if the network does not run at this image size.
    """
    names = site_names(model)
    shapes = input_shapes(model, names, image_size)
    shared = shared_modules(model)
    found = [
        replace(site, reason=shared[site.name]) if site.name in shared else site
        for site in (_look_at(name, model.get_submodule(name), shapes.get(name)) for name in names)
    ]
    foldable = [site.name for site in found if site.activations == 0 and site.mergeable]
    return Sites([site for site in found if site.name not in foldable], foldable, image_size)


def site_names(model: nn.Module) -> list[str]:
    """Names of the innermost blocks with two convolutions and two BatchNorms, in order."""
    blocks = [
        name
        for name, module in model.named_modules()
        if name
        and not isinstance(module, _CONTAINERS)
        and sum(isinstance(m, nn.Conv2d) for m in module.modules()) >= 2
        and sum(isinstance(m, _BatchNorm) for m in module.modules()) >= 2
    ]
    return [name for name in blocks if not any(other.startswith(f"{name}.") for other in blocks)]


def is_foldable(block: nn.Module) -> bool:
    """Whether a block has no inner activation: then it needs no mask to be merged."""
    try:
        return not removable_activations(trace(block))
    except NotTraceable:
        return False


def linear_block(
    block: nn.Module,
    name: str,
    input_shape: Shape | None,
    take_out: Callable[[fx.GraphModule, fx.Node], None] = bypass,
) -> fx.GraphModule:
    """The block with its inner activations out and its padding hoisted, sharing its layers with `block`.

    Args:
        block: a site's module.
        name: its name, for errors.
        input_shape: (C, H, W); needed only where padding depends on it.
        take_out: what is done to each inner activation's node; by default it is bypassed.
    Raises:
        NotTraceable, NotMergeable: as `tracing.trace` and `hoisting.hoist` do.
    """
    traced = trace(block, name)
    check_layers(traced)
    sizes = input_sizes(traced, input_shape) if input_shape else None
    for node in removable_activations(traced):
        take_out(traced, node)
    hoist(traced, sizes)
    traced.delete_all_unused_submodules()
    return traced


def merged_shape(block: nn.Module, name: str, input_shape: Shape | None) -> Affine:
    """What a block would be merged into, on the `meta` device: shapes only.

    Raises:
        NotTraceable, NotMergeable: if it cannot be, with the reason.
    """
    linear = linear_block(copy.deepcopy(block).to("meta").eval(), name, input_shape)
    return interpret(linear, in_channels(linear))


def shared_modules(model: nn.Module) -> dict[str, str]:
    """Module name -> why it cannot be replaced, for modules that the network holds under several names."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    return {
        name: f"is one module under {len(found)} names ({', '.join(found)})"
        for found in names.values() if len(found) > 1 for name in found
    }  # fmt: skip


def in_channels(model: nn.Module) -> int:
    """Channels of the images that the network takes: those of its first convolution."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            return module.in_channels
    raise BadConfig(f"{type(model).__name__} has no convolution: expected a CNN")


def input_shapes(model: nn.Module, names: list[str], image_size: int) -> dict[str, Shape]:
    """Input (C, H, W) of each named module in one forward pass, on a copy."""
    require(isinstance(image_size, int) and image_size > 0, f"image_size is in pixels, found {image_size!r}")
    ghost = copy.deepcopy(model).eval()
    shapes: dict[str, Shape] = {}

    def note(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            if len(inputs) == 1 and isinstance(inputs[0], torch.Tensor) and inputs[0].ndim == 4:
                c, h, w = inputs[0].shape[1:]
                shapes[name] = (c, h, w)

        return hook

    for name in names:
        ghost.get_submodule(name).register_forward_pre_hook(note(name))
    device = next((p.device for p in ghost.parameters()), torch.device("cpu"))
    images = torch.zeros(1, in_channels(ghost), image_size, image_size, device=device, dtype=dtype_of(ghost))
    try:
        with torch.no_grad():
            ghost(images)
    except Exception as error:  # the user's code runs: anything can be raised
        raise BadConfig(
            f"{type(model).__name__} does not run on {image_size} x {image_size} images ({error}): "
            "choose another image_size"
        ) from error
    return shapes


def _look_at(name: str, block: nn.Module, input_shape: Shape | None) -> Site:
    ghost = copy.deepcopy(block).to("meta").eval()
    convolutions = sum(isinstance(m, nn.Conv2d) for m in ghost.modules())
    try:
        traced = trace(ghost, name)
        activations, ended = len(removable_activations(traced)), bool(tail(traced))
    except NotTraceable as error:
        return Site(name, 0, input_shape, convolutions, reason=str(error))
    if input_shape is None:
        reason = "its input is not one feature map"
        return Site(name, activations, None, convolutions, activation_at_end=ended, reason=reason)
    try:
        whole = merged_shape(ghost, name, input_shape)
    except (NotMergeable, NotTraceable) as error:
        return Site(name, activations, input_shape, convolutions, activation_at_end=ended, reason=str(error))
    return Site(name, activations, input_shape, convolutions, whole.weight.shape[0], whole.kernel, whole.stride, ended)
