"""The command line's benchmarks of merging and of latencies: `dslib bench merge` and others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ..errors import BadConfig, DslibError
from ..measuring import PRECISIONS, RUNTIMES
from .bench_options import (
    Command,
    all_of,
    device_option,
    image_size_option,
    out_option,
    resumed_option,
    runtime_option,
    write_record,
)

table_options = all_of(
    device_option,
    image_size_option,
    click.option("--batch-size", type=int, multiple=True, help="Default: what is usual on the device."),
    click.option("--runtime", type=click.Choice(list(RUNTIMES)), multiple=True, help="As --batch-size."),
    click.option("--precision", type=click.Choice(list(PRECISIONS)), multiple=True, help="As --batch-size."),
    click.option("--rounds", default=30, show_default=True),
    click.option("--passes", default=3, show_default=True, help="The rounds are spread over so many."),
    resumed_option,
)


def timing_options(rounds: int = 30) -> Callable[[Command], Command]:
    """Decorator: what one timing is made of."""
    return all_of(
        image_size_option,
        click.option("--batch-size", default=8, show_default=True),
        click.option("--rounds", default=rounds, show_default=True),
        out_option,
    )


@click.command("merge")
@click.option("--cases", default=10_000, show_default=True, help="Random blocks to merge.")
@click.option("--seed", default=0, show_default=True)
@out_option
def merge_bench(cases: int, seed: int, out: Path | None) -> None:
    """Merge random blocks of every kind and compare each with its layers; fails if one differs."""
    from ..bench.fuzz import record_fuzz

    if not cases > 0:
        raise BadConfig(f"--cases: expected 1 or more, found {cases}")
    record = record_fuzz(cases, seed)
    for line in record.values["failed"]:
        click.echo(line)
    values = record.values
    click.echo(
        f"{values['cases']} cases, {values['failures']} failures; worst relative error "
        f"{values['worst_relative_error_float64']:.1e} in float64, {values['worst_relative_error_float32']:.1e} in "
        f"float32; {values['exact_border_cases']} merged with exact borders too, "
        f"{values['exact_border_refused']} cannot be without hoisting"
    )
    write_record(record, out)
    if values["failures"]:
        raise DslibError(f"{values['failures']} of {values['cases']} blocks were merged wrongly: please report them")


@click.command("families")
@click.option("--model", "models", multiple=True, help="A network to look at; default one of each family.")
@image_size_option
@out_option
def families_bench(models: tuple[str, ...], image_size: int, out: Path | None) -> None:
    """Sites, mergeable ones and reasons, for one member of each torchvision and timm CNN family."""
    from ..bench.families import frame, record_families

    record = record_families(models, image_size)
    click.echo(frame(record).to_string())
    write_record(record, out)


@click.command("borders")
@click.option("--model", default="mobilenet_v2", show_default=True)
@timing_options()
def borders_bench(model: str, image_size: int, batch_size: int, rounds: int, out: Path | None) -> None:
    """What exact borders cost over hoisted ones, and how long merging takes."""
    from ..bench.borders import record_borders

    record = record_borders(model, image_size, batch_size, rounds)
    for name, value in record.values["networks"].items():
        click.echo(f"{name:8} {value['latency_ms']:.2f} ms per batch, {value['times_hoisted']:.3f} x hoisted")
    seconds = ", ".join(f"{s:.2f}" for s in record.values["merge_seconds"])
    click.echo(f"merged {record.values['sites']} sites, {len(record.values['merge_seconds'])} times, in {seconds} s")
    write_record(record, out)


@click.command("exact")
@click.option("--model", default="mobilenet_v2", show_default=True)
@click.option("--data", default="imagenette", show_default=True)
@click.option("--image-size", default=128, show_default=True)
@click.option("--remove", "removed", multiple=True, help="A site to remove; default three of MobileNetV2's.")
@out_option
def exact_bench(model: str, data: str, image_size: int, removed: tuple[str, ...], out: Path | None) -> None:
    """Merge with exact borders and compare with the unmodified original on every photo of a validation split."""
    from ..bench.exact import REMOVED, record_exact

    record = record_exact(model, data, image_size, removed or REMOVED)
    for name, value in record.values["networks"].items():
        click.echo(
            f"{name:5} differs by {value['largest_relative_difference']:.1e} of the largest logit, other top-1 "
            f"on {value['other_top1']} of {record.values['images']} images"
        )
    write_record(record, out)


@click.command("table1")
@click.option("--model", "models", multiple=True, help="A network; default the paper's six.")
@table_options
def table1_bench(models: tuple[str, ...], out: Path | None, **given: Any) -> None:
    """The paper's motivating table here: networks and their dense counterparts, over runtimes and batch sizes."""
    from ..bench.table1 import record_table1
    from ..bench.tables import Measured

    record_table1(models, Measured(**given), out, click.echo)


@click.command("masks")
@table_options
def masks_bench(out: Path | None, **given: Any) -> None:
    """MobileNetV2-1.4 with the paper's masks A to F, narrower ones and the dense one, in turns."""
    from ..bench.masks import record_masks
    from ..bench.tables import Measured

    record_masks(Measured(**given), out, click.echo)


@click.command("waterfall")
@click.option("--model", default="MobileNetV2", show_default=True)
@device_option
@timing_options()
def waterfall_bench(out: Path | None, **given: Any) -> None:
    """What part of the dense network's speed-up is BatchNorm, memory allocation, or the compiler."""
    from ..bench.waterfall import record_waterfall

    write_record(record_waterfall(**given, echo=click.echo), out)


@click.command("predict")
@click.option("--model", default="mobilenet_v2", show_default=True)
@runtime_option
@device_option
@click.option("--masks", default=20, show_default=True, help="Random masks.")
@click.option("--seed", default=0, show_default=True)
@timing_options(rounds=15)
def predict_bench(out: Path | None, **given: Any) -> None:
    """How far latencies predicted by a profile are from measured ones, over random masks."""
    from ..bench.predict import record_prediction

    record = record_prediction(**given)
    for row in record.values["rows"]:
        click.echo(
            f"{len(row['removed'])} removed: predicted {row['predicted_ms']:.1f} ms, measured "
            f"{row['measured_ms']:.1f} ms ({row['error']:+.1%})"
        )
    click.echo(f"median error {record.values['median_error']:.1%}, largest {record.values['largest_error']:.1%}")
    write_record(record, out)


@click.command("compare")
@click.argument("files", type=Path, nargs=-1, required=True)
def compare_bench(files: tuple[Path, ...]) -> None:
    """Records of table1 or masks, made on several machines, side by side."""
    from ..bench.tables import side_by_side
    from ..records import Record

    click.echo(side_by_side([Record.load(file) for file in files]).round(2).to_string())
