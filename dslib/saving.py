"""Recipes: a small JSON file from which a shrunk or merged network is rebuilt, beside its weights.

No code is stored: the recipe names the model's function, the weights are safetensors. A function of torchvision or timm
is called as it is; any other only if whoever loads the recipe names it too.

Export writes a network as one ONNX file, or as a `torch.export` program, compared with the network before it is kept.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import records
from .algebra import dtype_of, in_channels
from .errors import BadConfig, BadModel, BadRecord, DslibError, first_line
from .merging import Only, merge, unmerged
from .models import load_model, load_tensors, load_weights, save_tensors
from .records import whole_file
from .shrinking import shrink
from .sites import Mask, Plan


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

    def planned(self, plan: Plan, merged: tuple[str, ...] = ()) -> Recipe:
        """The recipe of the network after a plan, of whose sites (of runs: joined by '+') these are merged."""
        runs = tuple(map(tuple, plan.runs))
        return replace(self, mask=dict(plan.mask), runs=runs, dropped=tuple(plan.dropped), merged=merged)

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
        if border_size is not None and self.hoist:
            raise BadConfig("the padding was hoisted: its borders need no image size")
        if self.merged and not self.hoist and border_size != self.border_size:
            raise BadConfig(
                f"part of it was merged with borders for image size {self.border_size}, found {border_size}: "
                "merge the rest alike"
            )
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
        if ":" in own and own != trust:
            raise BadModel(
                f"{_json(path)} would import and call {own}: if that is your own code, "
                f"give --trust {own} (in Python trust={own!r})"
            )
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
    if not _is_elementwise(found):
        raise BadConfig(f"unknown boundary activation {name!r}: expected a name in torch.nn such as ReLU6")
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


OPSET = 18
LIMITS = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def export(model: nn.Module, path: Path | str, image_size: int) -> Path:
    """Write a network as a file that other programs run, by the path's suffix: .onnx or .pt2; return the path.

    The batch size stays free. The file is loaded again and run on two random images before it gets its name;
    where its answer differs from the network's, no file is left.

    Args:
        model: the network, as a rule a merged one; left as it is.
        path: ending in '.onnx' (ONNX, opset 18, one file) or '.pt2' (a program of `torch.export`).
        image_size: side of the input in pixels; that size is fixed.
    Raises:
        BadConfig: if the suffix is another, or a package is missing.
        DslibError: if the network cannot be exported, or the file computes something else.
    """
    path = Path(path)
    if path.suffix not in WRITERS:
        raise BadConfig(f"expected a path ending in {' or '.join(WRITERS)}, found {path.name}")
    if not (isinstance(image_size, int) and image_size > 0):
        raise BadConfig(f"image_size is in pixels, found {image_size!r}")
    if any(p.is_meta for p in model.parameters()):
        raise BadConfig("the network is on the meta device: it has no values to write")
    ready = copy.deepcopy(model).cpu().requires_grad_(False)
    ready.eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, in_channels(ready), image_size, image_size, generator=generator).to(dtype_of(ready))
    with torch.no_grad():
        try:
            expected = ready(images)
        except Exception as error:  # the user's code runs: anything can be raised
            raise BadConfig(
                f"{type(model).__name__} does not run on {image_size} x {image_size} images: {first_line(error)}"
            ) from error
    if not isinstance(expected, Tensor):
        raise BadConfig(f"expected a network that returns one tensor, found {type(expected).__name__}")
    with whole_file(path) as partial, torch.no_grad():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the exporters, about themselves
                found = WRITERS[path.suffix](ready, images, partial)
        except DslibError:
            raise
        except ImportError as error:
            raise BadConfig(f"{path.suffix} needs the package {error.name}: pip install 'dslib[export]'") from error
        except Exception as error:  # the exporters raise errors of many kinds
            raise DslibError(
                f"{type(model).__name__} cannot be exported to {path.suffix}: {first_line(error)}"
            ) from error
        _check_equal(found, expected, path)
    return path


def _write_onnx(model: nn.Module, images: Tensor, path: Path) -> Tensor:
    if images.dtype == torch.bfloat16:
        raise BadConfig("ONNX Runtime has no bfloat16 convolutions: export model.float()")
    import onnxruntime
    import onnxscript  # noqa: F401  (the exporter's own message is long)

    batch = torch.export.Dim("batch", min=1)
    torch.onnx.export(
        model,
        (images,),
        path,
        input_names=["images"],
        output_names=["logits"],
        dynamo=True,
        external_data=False,
        opset_version=OPSET,
        dynamic_shapes=({0: batch},),
        verbose=False,
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])


def _write_program(model: nn.Module, images: Tensor, path: Path) -> Tensor:
    batch = torch.export.Dim("batch", min=1)
    torch.export.save(torch.export.export(model, (images,), dynamic_shapes=({0: batch},)), path)
    found: Tensor = torch.export.load(path).module()(images)
    return found


def _check_equal(found: Tensor, expected: Tensor, path: Path) -> None:
    error = float((found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-12))
    limit = LIMITS.get(expected.dtype, 1e-4)
    if not (found.shape == expected.shape and error <= limit):
        raise DslibError(
            f"{path.name} was not kept: what it computes differs by {error:.1e} of the largest output from the "
            f"network, more than {limit:g}"
        )


WRITERS: dict[str, Callable[[nn.Module, Tensor, Path], Tensor]] = {".onnx": _write_onnx, ".pt2": _write_program}
