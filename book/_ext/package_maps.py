"""The page of all modules, written when the book is built: each package by what its map says others may use."""

import importlib
import inspect
import pkgutil
import re
from types import ModuleType

import dslib

PAGE = "book/modules"
HIDDEN = {"cli", "__main__"}  # `dslib --help` describes these


def public_names(module: ModuleType) -> list[str]:
    """What a module or a package's map offers and defines itself, without what `import dslib` gives already."""
    above = {getattr(dslib, name) for name in dslib.__all__}
    package = hasattr(module, "__path__")

    def offered(name: str, thing: object) -> bool:
        own = str(getattr(thing, "__module__", "")).startswith(module.__name__)
        is_table = package and isinstance(thing, dict)  # of methods, runtimes, precisions
        return not name.startswith("_") and (is_table or (callable(thing) and own and thing not in above))

    return [name for name, thing in vars(module).items() if offered(name, thing)]


def entry(module: ModuleType, name: str) -> str:
    """What Sphinx is told of one public name: its docstring, or, of a table, its keys."""
    thing, path = getattr(module, name), f"{module.__name__}.{name}"
    if isinstance(thing, dict):
        return f".. py:data:: {name}\n   :module: {module.__name__}\n\n   Keys: {', '.join(map(str, thing))}.\n"
    return f".. autoclass:: {path}\n   :members:\n" if isinstance(thing, type) else f".. autofunction:: {path}\n"


def section(name: str) -> str:
    """One module's part of the page."""
    module = importlib.import_module(f"dslib.{name}")
    told = inspect.getdoc(module) or ""
    told = re.sub(r"^(\w+) {2,}(.+)$", r"- **\1**: \2", told, flags=re.MULTILINE)  # a package's lines on its modules
    parts = [f".. py:module:: dslib.{name}\n\n{told}\n", *(entry(module, one) for one in public_names(module))]
    text = "\n".join(parts)
    return f"## dslib.{name}\n\n```{{eval-rst}}\n{text}```\n"


def write_page(app, docname: str, source: list[str]) -> None:
    """Sphinx's `source-read`: add a section for every module of the package to what stands in the page."""
    if docname == PAGE:
        names = [found.name for found in pkgutil.iter_modules(dslib.__path__) if found.name not in HIDDEN]
        source[0] += "\n" + "\n".join(map(section, names))


def setup(app) -> dict:
    """Register `write_page` with Sphinx."""
    app.connect("source-read", write_page)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
