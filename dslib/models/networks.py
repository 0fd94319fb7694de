"""Networks by name, their weights, and heads for the classes at hand."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..data import find_file
from ..errors import BadModel, first_line, nearest
from .weights import load_state_dict


class Loaded(NamedTuple):
    """A network and whether its head was trained for the classes asked for."""

    model: nn.Module
    trained: bool


def load_model(
    name: str,
    classes: Sequence[str] | None = None,
    weights: str = "none",
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Loaded:
    """The network called `name`, with a head for `classes`.

    Where the classes are ImageNet's WordNet ids and the weights ImageNet's, the head's rows are selected for
    them, so that the network classifies at once. For other classes the head is new and must be trained first.

    Args:
        name: a torchvision or timm model ('timm/...' or 'torchvision/...' to choose), or 'package.module:function'.
        classes: class names in label order; None keeps the head that the weights have.
        weights: 'none', 'default' (a file <name>.safetensors in a folder weights/ under DSLIB_DATA, else the
            library's own download), or the path of a .safetensors or state-dict file. A file does not say what its
            classes are: a head with a row for each of `classes` counts as trained for them.
        options: keyword arguments for the model's function, e.g. {'width_mult': 0.5}.
        seed: of the random weights; the caller's own random numbers go on as they would have.
    Raises:
        BadModel: if the name, the file or its shapes are wrong.
    """
    with torch.random.fork_rng(range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()):
        torch.manual_seed(seed)
        return _load_model(name, classes, weights, dict(options or {}))


def _load_model(name: str, classes: Sequence[str] | None, weights: str, options: dict[str, Any]) -> Loaded:
    if weights == "none":
        if classes is not None and not len(classes) > 1:
            raise BadModel("expected at least two classes")
        model = _build(name, None if classes is None else len(classes), options)
        return Loaded(model, False) if classes is None else Loaded(_fit_head(model, classes).model, False)
    pretrained = _pretrained(name, options) if weights == "default" else None
    model = _from_file(name, _weights_path(name, weights), options) if pretrained is None else pretrained
    return Loaded(model, True) if classes is None else _fit_head(model, classes)


def find_head(model: nn.Module) -> tuple[str, nn.Linear]:
    """Name and module of the classifier: the network's last linear layer.

    Raises:
        BadModel: if it has none.
    """
    linear = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise BadModel(f"{type(model).__name__} has no linear layer: expected a classifier")
    return linear[-1]


def imagenet_indices(classes: Sequence[str]) -> list[int] | None:
    """ImageNet-1k class index of each WordNet id, or None if one is no such id."""
    from timm.data import ImageNetInfo

    index = {wnid: i for i, wnid in enumerate(ImageNetInfo("imagenet-1k").label_names())}
    return [index[c] for c in classes] if all(c in index for c in classes) else None


def _fit_head(model: nn.Module, classes: Sequence[str]) -> Loaded:
    _, head = find_head(model)
    rows = imagenet_indices(classes) if head.out_features == 1000 else None
    if rows is None and head.out_features == len(classes):
        return Loaded(model, True)
    new = _replace_head(model, len(classes))
    if rows is not None:
        with torch.no_grad():
            new.weight.copy_(head.weight[rows])
            if head.bias is not None:
                new.bias.copy_(head.bias[rows])
    return Loaded(model, rows is not None)


def _replace_head(model: nn.Module, rows: int) -> nn.Linear:
    """Put a new classifier with `rows` outputs in, and return it."""
    name, head = find_head(model)
    new = nn.Linear(head.in_features, rows, bias=head.bias is not None)
    model.set_submodule(name, new)
    return new


def _build(name: str, num_classes: int | None, options: Mapping[str, Any]) -> nn.Module:
    function, options = _function(name), dict(options)
    if num_classes is not None and _takes(function, "num_classes"):
        options["num_classes"] = num_classes
    try:
        model = function(**options)
    except Exception as error:  # the user's code runs: anything can be raised
        raise BadModel(f"{name} cannot be built with {options}: {first_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise BadModel(f"{name} gave a {type(model).__name__}: expected a torch Module")
    return model


def _function(name: str) -> Any:
    """What to call with keyword arguments to get an untrained network."""
    import timm
    import torchvision

    if ":" in name:
        module, _, function = name.partition(":")
        try:
            return getattr(importlib.import_module(module), function)
        except Exception as error:  # the user's code runs: anything can be raised
            raise BadModel(f"no model {name!r}: {first_line(error)}; expected package.module:function") from error
    library, _, bare = name.rpartition("/")
    if library in ("", "torchvision") and bare in torchvision.models.list_models():
        return torchvision.models.get_model_builder(bare)
    if library in ("", "timm") and timm.is_model(bare):
        return lambda **options: timm.create_model(bare, **options)
    known = {*torchvision.models.list_models(module=torchvision.models), *timm.list_models()}
    raise BadModel(f"{nearest('model', name, known)}; or give package.module:function")


def _rows(state: dict[str, Tensor]) -> int | None:
    """Outputs of the last matrix in a state dict: the classifier's, as a rule."""
    return next((tensor.shape[0] for tensor in reversed(state.values()) if tensor.ndim == 2), None)


def _takes(function: Any, argument: str) -> bool:
    parameters = inspect.signature(function).parameters.values()
    return any(p.name == argument or p.kind is p.VAR_KEYWORD for p in parameters)


def _pretrained(name: str, options: Mapping[str, Any]) -> nn.Module | None:
    """The library's own pretrained network; None if a file under DSLIB_DATA stands for it."""
    if find_file(f"weights/{_bare(name)}.safetensors") is not None:
        return None
    if ":" in name:
        raise BadModel(f"{name} has no 'default' weights: give a file, or 'none'")

    function = _function(name)
    own = "weights" in inspect.signature(function).parameters  # torchvision's; timm has `pretrained`
    key = {"weights": "DEFAULT"} if own else {"pretrained": True}
    try:
        return function(**options, **key)
    except Exception as error:  # network, hub and hash errors alike
        raise BadModel(
            f"default weights of {name} cannot be downloaded ({first_line(error)}): go online, "
            f"or put weights/{_bare(name)}.safetensors into the folder DSLIB_DATA"
        ) from error


def _bare(name: str) -> str:
    return name.rpartition("/")[2].replace(":", ".")


def _weights_path(name: str, weights: str) -> Path:
    path = find_file(f"weights/{_bare(name)}.safetensors") if weights == "default" else Path(weights)
    if path is None or not path.is_file():
        raise BadModel(
            f"no weights file {weights!r}: expected 'none', 'default', or the path of a .safetensors or .pt file"
        )
    return path


def _from_file(name: str, path: Path, options: Mapping[str, Any]) -> nn.Module:
    state = load_state_dict(path)
    classes = inspect.signature(_function(name)).parameters.get("num_classes")
    needed = classes is not None and classes.default is classes.empty
    model = _build(name, _rows(state) if needed else None, options)
    heads = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and f"{n}.weight" in state]
    rows = len(state[f"{heads[-1][0]}.weight"]) if heads else 0
    if heads and rows != heads[-1][1].out_features:
        _replace_head(model, rows)
    load_weights(model, state, str(path))
    return model


def load_weights(model: nn.Module, state: dict[str, Tensor], origin: str) -> None:
    """Put a state dict into a network; every key and shape must fit.

    Raises:
        BadModel: naming the first keys or shapes that do not.
    """
    own = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    given = {key: tuple(tensor.shape) for key, tensor in state.items()}
    found = {
        "missing": sorted(set(own) - set(given)),
        "unknown": sorted(set(given) - set(own)),
        "wrong shape": [f"{k} {given[k]} for {own[k]}" for k in own if given.get(k, own[k]) != own[k]],
    }
    problems = [f"{what}: {', '.join(keys[:3])}" for what, keys in found.items() if keys]
    if problems:
        raise BadModel(f"{origin} does not fit {type(model).__name__}: {'; '.join(problems)}")
    model.load_state_dict(state)
