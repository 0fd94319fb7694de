"""Options derived from what they are given to: a function's arguments, or the fields of a settings class."""

from __future__ import annotations

import inspect
import json
import re
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

import dslib

from ..data import Data
from ..errors import BadConfig, BadModel
from ..measuring import PRECISIONS, RUNTIMES, pick_device, this_machine
from ..records import Record, commit
from ..training import Log, processes, remove_state

Command = Callable[..., Any]
TYPES = {"int": int, "float": float, "str": str, "bool": bool, "Path": Path}
# of functions; a settings class checks its own
CHOICES: dict[str, Mapping[str, Any]] = {"runtime": RUNTIMES, "precision": PRECISIONS}


def argument_texts(source: Callable[..., Any]) -> dict[str, str]:
    """Argument -> its whole text under 'Args:' in the docstring of a function or class, base classes included."""
    texts: dict[str, str] = {}
    for each in reversed(source.__mro__) if isinstance(source, type) else [source]:
        section = re.search(r"^Args:\n((?: .*\n?|\n)*)", inspect.cleandoc(each.__doc__ or ""), re.MULTILINE)
        for entry in re.split(r"^    (?=\S)", section[1], flags=re.MULTILINE)[1:] if section else []:
            names, _, text = entry.partition(": ")
            words = " ".join(text.split())
            texts.update({name.strip(): words[:1].upper() + words[1:] for name in names.split(",")})
    return texts


def options_of(
    source: Callable[..., Any],
    *names: str,
    prefix: str = "",
    skip: tuple[str, ...] = (),
    defaults: Mapping[str, Any] | None = None,
) -> Callable[[Command], Command]:
    """Decorator: an option for each argument of a function, or field of a settings class, that words can give.

    Args:
        source: the function or class: types and defaults are its signature's, help texts its docstring's.
        names: of the arguments; default all.
        prefix: put before each option's name.
        skip: arguments that get none.
        defaults: other defaults than the signature's.
    """
    texts, parameters = argument_texts(source), inspect.signature(source).parameters.values()
    options = []
    for parameter in parameters:
        kind = next((kind for kind in str(parameter.annotation).split(" | ") if kind in TYPES), None)
        if kind is None or parameter.name in skip or (names and parameter.name not in names):
            continue
        name = f"{prefix}{parameter.name}".replace("_", "-")
        default = (defaults or {}).get(parameter.name, parameter.default)
        given: dict[str, Any] = {"default": default, "show_default": True, "type": TYPES[kind]}
        if default is parameter.empty:
            given = {"required": True, "type": TYPES[kind]}
        if parameter.name in CHOICES and not isinstance(source, type):
            given["type"] = click.Choice(list(CHOICES[parameter.name]))
        switch = f"--{name}/--no-{name}" if kind == "bool" else f"--{name}"
        options.append(click.option(switch, help=texts.get(parameter.name, ""), **given))
    return all_of(*options)


def all_of(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Decorator: several options, listed in this order."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def network_options(weights: str = "none") -> Callable[[Command], Command]:
    """Decorator: which network; `weights` is the default of --weights."""
    texts = argument_texts(dslib.load_model)
    return all_of(
        click.option("--model", required=True, help=texts["name"]),
        options_of(dslib.load_model, "weights", defaults={"weights": weights}),
        click.option("--model-option", "options", multiple=True, metavar="NAME=VALUE", help=texts["options"]),
    )


device_option = options_of(dslib.Run, "device")
trust_option = options_of(dslib.load, "trust")
log_options = all_of(
    click.option("--curves", type=Path, help="Folder for a .csv of the training, one row an epoch."),
    click.option("--tensorboard", is_flag=True, help="Write TensorBoard's curves too."),
)
data_options = all_of(
    click.option("--data", required=True, help=argument_texts(dslib.load_data)["name"]),
    options_of(dslib.load_data, "image_size"),
    click.option("--skip-corrupt", is_flag=True, help=argument_texts(dslib.load_data)["skip_corrupt"]),
    device_option,
)


def out_option(text: str, required: bool = True) -> Callable[[Command], Command]:
    """Decorator: what to write, and where."""
    return click.option("--out", type=Path, required=required, help=text)


def call(function: Callable[..., Any], given: dict[str, Any]) -> Any:
    """What a function makes of those of the options that it takes; they are taken out of `given`."""
    names = inspect.signature(function).parameters.keys() & given.keys()
    return function(**{name: given.pop(name) for name in names})


def parse_options(options: tuple[str, ...]) -> dict[str, Any]:
    """'name=value' words as keyword arguments; values are JSON where they can be read so."""
    parsed: dict[str, Any] = {}
    for word in options:
        name, equals, value = word.partition("=")
        if not (name.isidentifier() and equals):
            raise BadConfig(f"--model-option: expected NAME=VALUE, found {word!r}")
        try:
            parsed[name] = json.loads(value)
        except json.JSONDecodeError:
            parsed[name] = value
    return parsed


def network_of(model: str, weights: str, options: tuple[str, ...], device: str = "cpu") -> nn.Module:
    """The network with the classes that its weights have, on the device."""
    return dslib.load_model(model, None, weights, parse_options(options)).model.to(pick_device(device))


def trained_network(
    model: str,
    weights: str,
    options: tuple[str, ...],
    data: str,
    image_size: int | None,
    skip_corrupt: bool = False,
    device: str = "cpu",
) -> tuple[nn.Module, Data]:
    """The network and the data; a head that was never trained for the data's classes is refused."""
    where = processes.start(pick_device(device))
    loaded = processes.first_per_machine(lambda: dslib.load_data(data, image_size, skip_corrupt))
    network, trained = dslib.load_model(model, loaded.classes, weights, parse_options(options))
    if not trained:
        raise BadModel(
            f"{model} with weights {weights!r} is not trained for the {len(loaded.classes)} classes of {data}: give "
            "weights that are, or let `dslib run` train it first"
        )
    return on(where, network), loaded


def of_recipe(
    recipe: Path, data: str, image_size: int | None, skip_corrupt: bool, device: str, trust: str | None
) -> tuple[nn.Module, Data, dslib.Recipe]:
    """A recipe's network, on the device, the data, and the recipe; data of other classes are refused."""
    where = processes.start(pick_device(device))
    network, found = dslib.load(recipe, trust)
    loaded = processes.first_per_machine(lambda: dslib.load_data(data, image_size or found.image_size, skip_corrupt))
    check_classes(recipe, found, data, loaded)
    return on(where, network), loaded, found


def on(device: torch.device, network: nn.Module) -> nn.Module:
    """The network on a device, channels last."""
    return network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def check_classes(recipe: Path, found: dslib.Recipe, data: str, loaded: Data) -> None:
    """Raise `BadModel` unless a recipe's network is for the data's classes."""
    if loaded.classes != found.classes:
        first, second = (", ".join(classes[:3]) for classes in (found.classes, loaded.classes))
        raise BadModel(
            f"{recipe} is for {len(found.classes)} classes ({first}, ...), {data} has {len(loaded.classes)} "
            f"({second}, ...): give the data that it was made for"
        )


def log_for(curves: Path | None, tensorboard: bool) -> Log:
    """Where a training of one stage tells how it goes."""
    if curves is None and tensorboard:
        raise BadConfig("--tensorboard: expected --curves too, a folder for them")
    return Log(curves, tensorboard, click.echo)


def partial_of(out: Path) -> Path:
    """Where the state of a training lies until `out` is made."""
    return out.with_name(f"{out.name.removesuffix('.json')}.partial.safetensors")


def keep(
    save: Callable[[], object], name: str, out: Path, config: Any, values: Mapping[str, Any], device: torch.device
) -> None:
    """Save what a training made, and <out>.record.json beside it; its state goes."""
    command = shlex.join(["dslib", *sys.argv[1:]])

    def write() -> None:
        save()
        record = Record(name, command, asdict(config), dict(values), this_machine(device), commit())
        record.save(out.with_name(f"{out.name.removesuffix('.json')}.record.json"))
        remove_state(partial_of(out))

    processes.on_rank_zero(write)


def next_step(path: Path, model: str) -> str:
    """What to do with a merged network, for a user who has just made one of a model of this name."""
    name = shlex.quote(str(path)) + (f" --trust {model}" if ":" in model else "")
    return f"next: dslib export {name} --out net.onnx; its accuracy: dslib eval {name} --data ..."
