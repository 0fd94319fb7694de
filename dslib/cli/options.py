"""Command-line options, derived from the fields of the settings classes and shared by the commands."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import BadConfig, BadModel
from ..measuring import RUNTIMES
from ..records import Record, commit
from ..training import Log

if TYPE_CHECKING:
    from ..data import Data
    from ..saving import Recipe

Command = Callable[..., Any]
TYPES = {"int": int, "float": float, "str": str, "int | None": int, "str | None": str, "bool": bool}


def all_of(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Decorator: several options, listed in this order."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def settings(
    config: type, prefix: str = "", skip: tuple[str, ...] = (), defaults: Any = None
) -> Callable[[Command], Command]:
    """Decorator: one option for each field of a settings class, `--<prefix><field>`, help from its docstring."""

    def decorate(command: Command) -> Command:
        texts = _argument_texts(config)
        for field in reversed([f for f in fields(config) if str(f.type) in TYPES and f.name not in skip]):
            default = getattr(defaults, field.name) if defaults is not None else field.default
            kind = str(field.type)
            given = {"required": True} if default is MISSING else {"default": default, "show_default": True}
            given |= {} if kind == "bool" else {"type": TYPES[kind]}
            name = f"--{prefix}{field.name}".replace("_", "-")
            name += name.replace("--", "/--no-", 1) if kind == "bool" else ""
            option = click.option(name, help=texts.get(field.name, ""), **given)
            command = option(command)
        return command

    return decorate


def weights_option(default: str) -> Callable[[Command], Command]:
    """Decorator: which weights."""
    return click.option("--weights", default=default, show_default=True, help="none, default, or a weights file.")


model_options = click.option("--model-option", "options", multiple=True, metavar="NAME=VALUE", help="For its function.")


def network_options(weights: str = "none") -> Callable[[Command], Command]:
    """Decorator: which network; `weights` is the default of --weights."""
    return all_of(
        click.option("--model", required=True, help="torchvision or timm name, or package.module:function."),
        weights_option(weights),
        model_options,
    )


device_option = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, mps.")
single_option = click.option("--single/--no-single", help="Activations outside blocks (stem, head) are sites too.")
runtime_option = click.option("--runtime", type=click.Choice(list(RUNTIMES)), default="eager", show_default=True)
# where no data says it
image_size_option = click.option("--image-size", default=224, show_default=True, help="Side in pixels.")
trust_option = click.option("--trust", metavar="PACKAGE.MODULE:FUNCTION", help="Your own code that recipes may call.")
tensorboard_option = click.option("--tensorboard", is_flag=True, help="Write TensorBoard's curves too.")
log_options = all_of(
    click.option("--curves", "curves", type=Path, help="Folder for a .csv of the training, one row an epoch."),
    tensorboard_option,
)
out_option = click.option("--out", type=Path, help="Where to write the record (JSON).")
resumed_option = click.option("--out", type=Path, help="Record (JSON) to keep each row in; begun again, it goes on.")
data_options = all_of(
    click.option("--data", required=True, help="digits, imagenette, cifar10, imagenet, a folder, or a .npz file."),
    click.option("--image-size", type=int, help="Side in pixels."),
    click.option("--skip-corrupt", is_flag=True, help="Leave unreadable images out instead of stopping."),
    device_option,
)


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


def trained_network(
    model: str,
    weights: str,
    options: tuple[str, ...],
    data: str,
    image_size: int | None,
    skip_corrupt: bool,
    device: str,
) -> tuple[Any, Any]:
    """The network and the data; a head that was never trained for the data's classes is refused."""
    import torch

    import dslib
    from dslib.measuring import pick_device
    from dslib.training import processes

    where = processes.start(pick_device(device))
    loaded = processes.first_per_machine(lambda: dslib.load_data(data, image_size, skip_corrupt))
    network, trained = dslib.load_model(model, loaded.classes, weights, parse_options(options))
    if not trained:
        raise BadModel(
            f"{model} with weights {weights!r} is not trained for the "
            f"{len(loaded.classes)} classes of {data}: "
            "give weights that are, or let `dslib run` train it first"
        )
    return network.to(where, memory_format=torch.channels_last), loaded  # type: ignore[call-overload]


def of_recipe(
    recipe: Path, data: str, image_size: int | None, skip_corrupt: bool, device: str, trust: str | None
) -> tuple[Any, Any, Any, Any]:
    """A recipe's network, the data, the device, and the recipe; data of other classes are refused."""
    import dslib
    from dslib.measuring import pick_device
    from dslib.training import processes

    where = processes.start(pick_device(device))
    network, found = dslib.load(recipe, trust)
    loaded = processes.first_per_machine(lambda: dslib.load_data(data, image_size or found.image_size, skip_corrupt))
    check_classes(recipe, found, data, loaded)
    return network, loaded, where, found


def check_classes(recipe: Path, found: Recipe, data: str, loaded: Data) -> None:
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


def keep_record(name: str, out: Path, config: Any, values: dict[str, Any], device: Any) -> None:
    """Write <out>.record.json beside what a training made: command, settings, history, machine."""
    from ..measuring import this_machine

    command = shlex.join(["dslib", *sys.argv[1:]])
    record = Record(name, command, asdict(config), values, this_machine(device), commit())
    record.save(out.with_name(f"{out.name.removesuffix('.json')}.record.json"))


def write_record(record: Record, out: Path | None) -> None:
    """Write a benchmark's record, if a file was given, and say so."""
    if out is not None:
        click.echo(f"written: {record.save(out)}")


def _argument_texts(config: type) -> dict[str, str]:
    """Field name -> its line under 'Args:' in the class docstring, base classes included."""
    texts: dict[str, str] = {}
    for kind in reversed(config.__mro__):
        for line in (kind.__doc__ or "").partition("Args:")[2].splitlines():
            name, colon, text = line.strip().partition(": ")
            if colon:
                texts.update({part.strip(): text for part in name.split(",")})
    return texts


def next_step(path: Path, model: str) -> str:
    """What to do with a merged network, for a user who has just made one of a model of this name."""
    name = shlex.quote(str(path)) + (f" --trust {model}" if ":" in model else "")
    return f"next: dslib export {name} --out net.onnx; its accuracy: dslib eval {name} --data ..."
