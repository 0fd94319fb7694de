"""Export: a network as one ONNX file, or as a `torch.export` program, compared with the network before it is kept."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from .blocks import in_channels
from .errors import BadConfig, DslibError, first_line, require
from .graphs import dtype_of
from .records import whole_file

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
    require(path.suffix in WRITERS, f"expected a path ending in {' or '.join(WRITERS)}, found {path.name}")
    require(isinstance(image_size, int) and image_size > 0, f"image_size is in pixels, found {image_size!r}")
    require(
        not any(p.is_meta for p in model.parameters()), "the network is on the meta device: it has no values to write"
    )
    ready = copy.deepcopy(model).cpu().requires_grad_(False)
    ready.eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, in_channels(ready), image_size, image_size, generator=generator).to(dtype_of(ready))
    with torch.no_grad():
        try:
            expected = ready(images)
        except Exception as error:  # the user's code runs: anything can be raised
            raise BadConfig(f"{type(model).__name__} does not run on {image_size} x {image_size} images: "
                            f"{first_line(error)}") from error  # fmt: skip
    require(
        isinstance(expected, Tensor), f"expected a network that returns one tensor, found {type(expected).__name__}"
    )
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
    require(images.dtype != torch.bfloat16, "ONNX Runtime has no bfloat16 convolutions: export model.float()")
    import onnxruntime
    import onnxscript  # noqa: F401  (the exporter's own message is long)

    batch = torch.export.Dim("batch", min=1)
    torch.onnx.export(
        model, (images,), path, input_names=["images"], output_names=["logits"], dynamo=True, external_data=False,
        opset_version=OPSET, dynamic_shapes=({0: batch},), verbose=False,
    )  # fmt: skip
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
    require(found.shape == expected.shape and error <= limit,
            f"{path.name} was not kept: what it computes differs by {error:.1e} of the largest output from the "
            f"network, more than {limit:g}", DslibError)  # fmt: skip


WRITERS: dict[str, Callable[[nn.Module, Tensor, Path], Tensor]] = {".onnx": _write_onnx, ".pt2": _write_program}
