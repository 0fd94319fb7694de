"""The command line's benchmarks of training: `dslib bench ablation` and others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .cli_options import device_option, model_options, parse_options, resumed_option, weights_option


@click.command("ablation")
@click.option("--mask", default="A", show_default=True, help="One of the paper's, A to F.")
@click.option("--model", default="mobilenet_v2", show_default=True)
@weights_option("default")
@model_options
@click.option("--data", default="imagenette", show_default=True)
@click.option("--image-size", type=int, help="Side in pixels; default the dataset's.")
@click.option("--epochs", default=2, show_default=True)
@click.option("--lr", default=0.1, show_default=True, help="Per 256 images of batch.")
@click.option("--batch-size", default=64, show_default=True)
@click.option("--seeds", default=3, show_default=True)
@device_option
@click.option("--hours", type=float, help="Begin nothing after so many; what is missing is told.")
@resumed_option
def ablation_bench(options: tuple[str, ...], out: Path | None, **given: Any) -> None:
    """The paper's three accuracies of a mask: plain, with boundary activation, with self-distillation too."""
    from .bench.ablation import record_ablation

    record_ablation(**given, options=parse_options(options), out=out, echo=click.echo)


TRAINING = (ablation_bench,)
