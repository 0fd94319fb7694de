"""DepthShrinker, the package: find sites, search, shrink, finetune, and merge exactly.

The way through: `find_sites` -> `profile` -> `search` -> `shrink` -> `finetune` -> `merge`; `run` does it all.
Without labels or training: `find_sites` -> `importance.rank` -> `calibrate`.
"""

from .algebra import fold
from .calibrating import calibrate
from .data import load_data
from .errors import DslibError
from .finetuning import Finetune, finetune
from .measuring import count_macs, count_parameters, measure
from .merging import merge, unmerged
from .models import load_model
from .profiling import CostTable, profile
from .ranking import Found
from .running import Run, run
from .saving import Recipe, export, load, save
from .searching import Search, search
from .shrinking import fade, shrink
from .sites import Mask, Plan, find_sites
from .training import Train, evaluate

__version__ = "0.1.0"
__all__ = [
    "CostTable",
    "DslibError",
    "Finetune",
    "Found",
    "Mask",
    "Plan",
    "Recipe",
    "Run",
    "Search",
    "Train",
    "calibrate",
    "count_macs",
    "count_parameters",
    "evaluate",
    "export",
    "fade",
    "find_sites",
    "finetune",
    "fold",
    "load",
    "load_data",
    "load_model",
    "measure",
    "merge",
    "profile",
    "run",
    "save",
    "search",
    "shrink",
    "unmerged",
]
