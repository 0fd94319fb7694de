"""The command line's benchmarks: `dslib bench NAME`."""

from __future__ import annotations

import click

from .lazy import LazyGroup, commands_in

PARTS = ("bench_networks", "bench_calibration", "bench_search", "bench_training")


@click.group("bench", cls=LazyGroup, lazy=commands_in(*(f"dslib.cli.{part}" for part in PARTS)))
def bench() -> None:
    """Benchmarks; each can write a record of this machine."""
