"""Options that the benchmarks share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click

from ..measuring import RUNTIMES
from ..records import Record
from .options import Command, all_of, parse_options
from .options import options_of as settings

__all__ = ["Command", "all_of", "parse_options", "settings"]


def weights_option(default: str) -> Callable[[Command], Command]:
    """Decorator: which weights."""
    return click.option("--weights", default=default, show_default=True, help="none, default, or a weights file.")


model_options = click.option("--model-option", "options", multiple=True, metavar="NAME=VALUE", help="For its function.")


device_option = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, mps.")
runtime_option = click.option("--runtime", type=click.Choice(list(RUNTIMES)), default="eager", show_default=True)
# where no data says it
image_size_option = click.option("--image-size", default=224, show_default=True, help="Side in pixels.")
out_option = click.option("--out", type=Path, help="Where to write the record (JSON).")
resumed_option = click.option("--out", type=Path, help="Record (JSON) to keep each row in; begun again, it goes on.")


def write_record(record: Record, out: Path | None) -> None:
    """Write a benchmark's record, if a file was given, and say so."""
    if out is not None:
        click.echo(f"written: {record.save(out)}")
