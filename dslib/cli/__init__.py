"""The command line; see `verbs`."""

from .verbs import main

__all__ = ["main"]
