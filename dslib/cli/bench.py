"""The command line's benchmarks: the files of `dslib.bench` that hold a `BENCHMARK`; they are listed unimported."""

from __future__ import annotations

import ast
import importlib
import inspect
from dataclasses import MISSING, Field, fields
from functools import partial
from pathlib import Path
from typing import Any

import click

from ..bench import GROUPS
from .lazy import LazyGroup

TYPES = {"int": int, "float": float, "str": str, "Path": Path}


def _listed() -> dict[str, tuple[str, str]]:
    """Name of a benchmark -> its group, and the question that it answers."""
    found = {}
    for path in sorted((Path(__file__).parents[1] / "bench").glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in tree.body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "BENCHMARK":
                group = ast.literal_eval(node.value.args[0])  # type: ignore[attr-defined]
                found[path.stem] = (group, (ast.get_docstring(tree) or "").partition("\n")[0])
    return found


LISTED = _listed()


class Benchmarks(LazyGroup):
    """The benchmarks, listed by the question that each answers."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """One section a group."""
        for wanted in GROUPS:
            with formatter.section(wanted):
                formatter.write_dl([(name, question) for name, (group, question) in LISTED.items() if group == wanted])


def command_of(name: str) -> click.Command:
    """The command of a benchmark: options are the fields of its settings, help texts its docstring's lines."""
    from .options import argument_texts

    benchmark = importlib.import_module(f"dslib.bench.{name}").BENCHMARK
    texts = argument_texts(benchmark.settings)
    parameters = [_parameter(each, texts.get(each.name, "")) for each in fields(benchmark.settings) if each.init]
    if benchmark.has_rows:
        told = "Begin nothing after so many; what is missing is told."
        parameters.append(click.Option(["--hours"], type=float, help=told))
    if benchmark.out != "none":
        kept = "Record (JSON) to keep each row in; begun again, it goes on."
        text = kept if benchmark.has_rows else "Where to write the record (JSON)."
        parameters.append(click.Option(["--out"], type=Path, required=benchmark.out == "required", help=text))

    def call(out: Path | None = None, hours: float | None = None, **given: Any) -> None:
        benchmark.run(benchmark.settings(**given), out, hours, click.echo)

    about = inspect.cleandoc(benchmark.settings.__doc__ or "").partition("\nArgs:")[0]
    return click.Command(name, params=parameters, callback=call, help=f"{LISTED[name][1]}\n\n{about}")


def _parameter(field: Field[Any], text: str) -> click.Parameter:
    """A settings' field as an option, or as an argument."""
    kind, several = str(field.type).removesuffix(" | None"), str(field.type).startswith("tuple")
    name = f"--{field.metadata.get('option', field.name).replace('_', '-')}"
    expected = field.metadata.get("expected", "")
    given: dict[str, Any] = {"default": field.default, "show_default": True, "help": text}
    if kind.startswith("dict"):
        from .options import parse_options

        given |= {"multiple": True, "default": (), "metavar": "NAME=VALUE"}
        return click.Option([name, field.name], callback=lambda _, __, words: parse_options(words), **given)
    if kind == "bool":
        names = f"{name}/--no-{name[2:]}" if field.default else name
        return click.Option([names, field.name], is_flag=True, **given)
    given["type"] = TYPES[kind.removeprefix("tuple[").removesuffix(", ...]")]
    if expected.startswith("one of "):
        given["type"] = click.Choice(expected.removeprefix("one of ").split(", "))
    if field.default is MISSING:
        return click.Argument([field.name], type=given["type"], nargs=-1 if several else 1, required=True)
    return click.Option([name, field.name], multiple=several, **given)


@click.group(
    "bench", cls=Benchmarks, lazy={name: (text, partial(command_of, name)) for name, (_, text) in LISTED.items()}
)
def bench() -> None:
    """Benchmarks; each can write a record of this machine."""
