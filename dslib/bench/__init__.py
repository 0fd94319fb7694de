"""Benchmarks, run as `dslib bench NAME`, each a file of that name; and readers of their records.

benchmark      What a benchmark is: settings and an answer that is measured; its record follows.
settings       Settings of benchmarks: how a field is declared, and those that several benchmarks have.
plans          What becomes of a plan: calibrated, finetuned, evaluated, timed.
tables         Networks measured at several cases: what `table1` and `masks` share.
random_blocks  The blocks that `merge` tries.
"""

from importlib import import_module
from typing import Any

#: among which questions they are listed
GROUPS = (
    "Is merging exact?",
    "What does it cost and save here?",
    "Which activations?",
    "Calibration",
    "Training",
    "Against rivals",
)
_READERS = {
    "families": ("frame",),
    "merge": ("fuzz_merge",),
    "compare": ("side_by_side",),
    "masks": ("paper_mflops",),
    "sign": ("spearman",),
}


def __getattr__(name: str) -> Any:
    """A reader of records, imported when it is first asked for."""
    for module, names in _READERS.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
