"""The command line's benchmarks of training: `dslib bench ablation` and others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .bench_options import (
    device_option,
    model_options,
    out_option,
    parse_options,
    resumed_option,
    weights_option,
    write_record,
)


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
    from ..bench.ablation import record_ablation

    record_ablation(**given, options=parse_options(options), out=out, echo=click.echo)


@click.command("expand")
@click.option("--model", default="mobilenet_v2", show_default=True)
@model_options
@click.option("--data", default="cifar10", show_default=True)
@click.option("--image-size", type=int, help="Side in pixels; default the dataset's.")
@click.option("--ratio", default=2.0, show_default=True, help="Inner channels over input channels, while expanded.")
@click.option("--epochs", default=6, show_default=True, help="Of the expanded network.")
@click.option("--lr", default=0.1, show_default=True, help="Per 256 images of batch.")
@click.option("--batch-size", default=128, show_default=True)
@click.option("--seeds", default=3, show_default=True)
@device_option
@click.option("--hours", type=float, help="Begin nothing after so many; what is missing is told.")
@resumed_option
def expand_bench(options: tuple[str, ...], out: Path | None, **given: Any) -> None:
    """A small network trained as a larger one and shrunk back, against as it is for the same time."""
    from ..bench.expand import record_expand

    record_expand(**given, options=parse_options(options), out=out, echo=click.echo)


@click.command("overhead")
@click.option("--model", default="mobilenet_v2", show_default=True)
@click.option("--data", default="imagenette", show_default=True, help="Must fit into memory.")
@click.option("--batch-size", default=32, show_default=True)
@click.option("--rounds", default=40, show_default=True)
@device_option
@out_option
def overhead_bench(out: Path | None, **given: Any) -> None:
    """What a step of the training loop costs over a bare loop written by hand."""
    from ..bench.overhead import record_overhead

    record = record_overhead(**given)
    values = record.values
    click.echo(
        f"a step takes {values['dslib_over_bare']:.3f} times as long as the bare loop's (quartiles "
        f"{values['q25']:.3f} to {values['q75']:.3f}; {values['runtime']})"
    )
    write_record(record, out)


@click.command("kills")
@click.option("--kills", default=20, show_default=True, help="That hit the search or the finetuning.")
@click.option("--seed", default=0, show_default=True, help="Of the moments.")
@click.option("--epochs", default=12, show_default=True, help="Of the search, and of the finetuning.")
@out_option
def kills_bench(kills: int, seed: int, epochs: int, out: Path | None) -> None:
    """Kill a run at random moments and take it up again: its weights must end bit for bit the same."""
    from ..bench.kills import record_kills

    record = record_kills(kills, seed, epochs, click.echo)
    values = record.values
    click.echo(
        f"{values['kills']} kills, {values['in_search']} in the search, {values['in_finetune']} in the "
        "finetuning: the weights are those of a run that was not killed, bit for bit"
    )
    write_record(record, out)
