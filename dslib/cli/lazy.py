"""Groups of commands that are imported only when one is run, so that help is quick."""

from __future__ import annotations

import ast
import importlib
import importlib.util
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import click

#: Command name -> its help, and what gives the command itself
Lazy = Mapping[str, tuple[str, Callable[[], click.Command]]]


class LazyGroup(click.Group):
    """A group that lists its commands by name and help, and makes one when it is run.

    Args:
        lazy: the commands.
    """

    def __init__(self, *args: Any, lazy: Lazy, **given: Any) -> None:
        super().__init__(*args, **given)
        self._make = {name: make for name, (_, make) in lazy.items()}
        self.commands.update({name: click.Command(name, help=text) for name, (text, _) in lazy.items()})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command itself."""
        return self._make[cmd_name]() if cmd_name in self._make else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands in a help text, for which none is made."""
        click.Group(commands=self.commands).format_commands(ctx, formatter)


def commands_in(*modules: str) -> Lazy:
    """The commands and groups that modules declare by `@click.command(NAME)`; these are read, not imported.

    Args:
        modules: full names.
    """
    found = {}
    for module in modules:
        spec = importlib.util.find_spec(module)
        for node in ast.parse(spec.loader.get_source(module)).body:  # type: ignore[union-attr]
            name = _name_of(node)
            if isinstance(node, ast.FunctionDef) and name is not None:
                found[name] = (ast.get_docstring(node) or "", partial(_load, module, node.name))
    return found


def _name_of(node: ast.stmt) -> str | None:
    """NAME of a function's decorator `@click.command(NAME)` or `@click.group(NAME)`."""
    for call in getattr(node, "decorator_list", []):
        if isinstance(call, ast.Call) and ast.unparse(call.func) in ("click.command", "click.group"):
            return str(ast.literal_eval(call.args[0]))
    return None


def _load(module: str, function: str) -> click.Command:
    command: click.Command = getattr(importlib.import_module(module), function)
    return command
