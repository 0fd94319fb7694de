"""The command line's benchmarks of calibration: `dslib bench depths` and others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ..measuring import RUNTIMES
from .bench_options import (
    Command,
    all_of,
    model_options,
    out_option,
    parse_options,
    resumed_option,
    weights_option,
    write_record,
)


def trained_options(count: int = 2048) -> Callable[[Command], Command]:
    """Decorator: which trained network, which data, and how many images to calibrate and to rank with."""
    return all_of(
        click.option("--model", default="mobilenet_v2", show_default=True),
        click.option("--data", default="imagenette", show_default=True),
        click.option("--image-size", type=int, help="Side in pixels; default the dataset's."),
        click.option("--count", default=count, show_default=True, help="Unlabelled images for a calibration."),
        click.option("--rank-count", default=512, show_default=True, help="Images for the ranking."),
    )


def _runtimes_option(*default: str) -> Any:
    """`--runtime`, any number of times."""
    kinds = click.Choice(list(RUNTIMES))
    return click.option("--runtime", "runtimes", type=kinds, multiple=True, default=default, show_default=True)


@click.command("depths")
@trained_options(count=1024)
@weights_option("default")
@model_options
@click.option("--random-masks", default=2, show_default=True, help="Random masks beside, for each third k.")
@click.option("--seed", default=0, show_default=True)
@out_option
def depths_bench(options: tuple[str, ...], out: Path | None, **given: Any) -> None:
    """Rank the sites without labels, calibrate for every k, and evaluate; random masks beside."""
    from ..bench.depths import record_depths

    record = record_depths(**given, options=parse_options(options))
    for row in record.values["depths"]:
        shares = f"accuracy {row['accuracy']:.2%}, agreement {row['agreement']:.2%}"
        click.echo(f"k={row['k']:<3} {shares}, {row['seconds']:.1f} s")
    click.echo(f"{record.values['seconds_without_evaluation']:.0f} s in all, evaluation apart")
    write_record(record, out)


@click.command("ingredients")
@trained_options()
@click.option("--k", "ks", type=int, multiple=True, default=(9, 5), show_default=True, help="Sites to keep.")
@click.option(
    "--images",
    "counts",
    type=int,
    multiple=True,
    default=(16, 64, 256, 1024, 4096),
    show_default=True,
    help="Other numbers of images, tried with the first k.",
)
@click.option("--seeds", default=2, show_default=True)
@out_option
def ingredients_bench(out: Path | None, **given: Any) -> None:
    """What each ingredient of calibration gives, and the number of images; several seeds."""
    from ..bench.ingredients import record_ingredients

    record = record_ingredients(**given)
    for row in record.values["rows"]:
        click.echo(
            f"{row['mask']}, {row['images']} images, seed {row['seed']}, {row['ingredients']}: "
            f"accuracy {row['accuracy']:.2%}, {row['seconds']:.1f} s"
        )
    click.echo(f"largest memory {record.values['peak_memory_gib']:.1f} GiB")
    write_record(record, out)


@click.command("speedup")
@trained_options()
@click.option("--speedup", default=1.3, show_default=True, help="Over the original, on the same runtime.")
@_runtimes_option("eager", "openvino")
@click.option("--batch-size", default=32, show_default=True)
@click.option("--rounds", default=30, show_default=True)
@click.option("--seed", default=0, show_default=True)
@out_option
def speedup_bench(out: Path | None, **given: Any) -> None:
    """The accuracy that calibration keeps at a measured speed-up, on each runtime."""
    from ..bench.speedup import record_speedup

    record = record_speedup(**given)
    for name, row in record.values["networks"].items():
        times = ", ".join(f"{t['speedup']:.2f} x on {runtime}" for runtime, t in row["timing"].items())
        click.echo(f"{name}: accuracy {row['accuracy']:.2%}, {len(row['removed'])} removed, {times}")
    write_record(record, out)


@click.command("memory")
@click.option("--model", default="mobilenet_v2", show_default=True)
@click.option("--image-size", default=128, show_default=True, help="Side in pixels.")
@click.option("--count", default=2048, show_default=True, help="Random images.")
@click.option("--last", default=16, show_default=True, help="How many of the network's last sites are removed.")
@out_option
def memory_bench(out: Path | None, **given: Any) -> None:
    """How much memory a calibration takes, in a process of its own."""
    from ..bench.memory import record_memory

    record = record_memory(**given)
    values = record.values
    click.echo(
        f"{values['peak_memory_gib']:.1f} GiB ({values['images_gib']:.1f} of them images), {values['seconds']:.0f} s"
    )
    write_record(record, out)


@click.command("networks")
@click.option("--folder", type=click.Path(path_type=Path), default=Path("data/networks"), show_default=True)
@click.option("--model", default="mobilenet_v2", show_default=True)
@click.option("--data", default="imagenette", show_default=True, help="The weights must be trained for its classes.")
@click.option("--image-size", default=128, show_default=True, help="Side in pixels.")
@click.option("--k", "ks", type=int, multiple=True, default=(8,), show_default=True, help="Sites to keep.")
@click.option(
    "--speedup",
    "speedups",
    type=float,
    multiple=True,
    default=(1.5,),
    show_default=True,
    help="To be reached by merging and dropping blocks.",
)
@click.option(
    "--planned-on",
    type=click.Choice(list(RUNTIMES)),
    default="onnxruntime",
    show_default=True,
    help="The runtime that --speedup is planned and measured on.",
)
@click.option("--count", default=2048, show_default=True, help="Images to calibrate with.")
@click.option("--rank-count", default=512, show_default=True, help="Images to rank with.")
@click.option("--batch-size", default=1, show_default=True, help="Images a batch, of the latencies.")
@_runtimes_option("eager", "onnxruntime", "openvino")
@out_option
def networks_bench(out: Path | None, **given: Any) -> None:
    """The trained networks that come with the book, original and calibrated; those that stand there are kept."""
    from ..bench.networks import record_networks

    write_record(record_networks(**given, echo=click.echo), out)


@click.command("starts")
@trained_options()
@click.option("--k", default=9, show_default=True, help="Sites to keep.")
@click.option(
    "--minutes",
    type=float,
    multiple=True,
    default=(5.0,),
    show_default=True,
    help="To finetune for; the first with all seeds, others with one.",
)
@click.option("--lr", "lrs", type=float, multiple=True, default=(0.003, 0.01, 0.03), show_default=True)
@click.option(
    "--tuning-minutes", default=1.5, show_default=True, help="For each learning rate and recipe of each start."
)
@click.option("--seeds", default=3, show_default=True)
@click.option("--batch-size", default=64, show_default=True)
@resumed_option
def starts_bench(**given: Any) -> None:
    """Finetune from a calibrated network and from one whose activations fade out, for the same time."""
    from ..bench.starts import record_starts

    record_starts(**given)
