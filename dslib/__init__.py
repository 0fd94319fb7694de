"""DepthShrinker, the package: find sites, search, shrink, finetune, and merge exactly.

The way through: `find_sites` -> `profile` -> `search` -> `shrink` -> `finetune` -> `merge`; `run` does it all.
"""

from .datasets import load_data
from .errors import DslibError
from .exporting import Recipe, load, save
from .finetuning import Finetune, finetune
from .masks import Mask
from .measuring import count_macs, count_parameters, fold_batchnorm, measure
from .merging import merge, unmerged
from .models import load_model
from .profiling import CostTable, profile
from .running import Run, run
from .searching import Found, Search, search
from .shrinking import fade, shrink
from .sites import find_sites
from .training import Train, evaluate

__version__ = "0.1.0"
__all__ = [
    "CostTable",
    "DslibError",
    "Finetune",
    "Found",
    "Mask",
    "Recipe",
    "Run",
    "Search",
    "Train",
    "count_macs",
    "count_parameters",
    "evaluate",
    "fade",
    "find_sites",
    "finetune",
    "fold_batchnorm",
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
