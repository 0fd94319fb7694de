"""DepthShrinker, the package: find sites, search, shrink, finetune, and merge exactly.

The way through: `find_sites` -> `profile` -> `search` -> `shrink` -> `finetune` -> `merge`; `run` does it all.
Without labels or training: `compress`, or its parts `ranking.rank` -> `planning.plan` -> `calibrate`.

Importing it is quick: what a public name or a submodule needs (torch, above all) is imported where it is first used.
"""
# ruff: noqa: I001  (the names are in the method's order)

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:  # and read below: this is the one list of the public names
    # networks and data
    from .models import load_model as load_model
    from .data import load_data as load_data

    # what can go, and what it costs
    from .sites import Mask as Mask, Plan as Plan, find_sites as find_sites
    from .profiling import CostTable as CostTable, profile as profile

    # stage 1: which activations stay
    from .searching import Search as Search, search as search
    from .ranking import Importances as Importances

    # stage 2: without the others
    from .shrinking import fade as fade, shrink as shrink
    from .finetuning import Finetune as Finetune, finetune as finetune
    from .training import Train as Train, evaluate as evaluate

    # stage 3: each linear block is one convolution
    from .merging import merge as merge, unmerged as unmerged
    from .algebra import fold as fold

    # in place of stages 1 and 2, without labels
    from .calibrating import calibrate as calibrate
    from .compressing import compress as compress

    # all of it, and what comes of it
    from .running import Run as Run, run as run
    from .saving import Recipe as Recipe, export as export, load as load, save as save
    from .measuring import count_macs as count_macs, count_parameters as count_parameters, measure as measure
    from .errors import DslibError as DslibError
else:

    def _public() -> dict[str, str]:
        """Public name -> the module that holds it, from the list above (as the lazy imports of SPEC 1 do)."""
        import ast

        tree = ast.parse(__loader__.get_source(__name__))
        listed = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
        return {alias.name: node.module for node in listed for alias in node.names}

    _MODULES = _public()
    __all__ = sorted(_MODULES)

    def __getattr__(name: str) -> Any:
        """A public name, or a submodule, imported when it is first asked for."""
        import importlib
        import importlib.util

        if name in _MODULES:
            globals()[name] = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
            return globals()[name]
        if not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}"):
            return importlib.import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
