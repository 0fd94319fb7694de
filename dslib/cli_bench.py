"""The command line's benchmarks: `dslib bench NAME`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .cli_options import Command
from .errors import DslibError, require
from .runtimes import PRECISIONS, RUNTIMES

if TYPE_CHECKING:
    from .records import Record

out_option = click.option("--out", type=Path, help="Where to write the record (JSON).")
resumed_option = click.option("--out", type=Path, help="Record (JSON) to keep each row in; begun again, it goes on.")


def trained_options(count: int = 2048) -> Callable[[Command], Command]:
    """Decorator: which trained network, which data, and how many images to calibrate and to rank with."""

    def decorate(command: Command) -> Command:
        for option in reversed([
            click.option("--model", default="mobilenet_v2", show_default=True),
            click.option("--data", default="imagenette", show_default=True),
            click.option("--image-size", type=int, help="Side in pixels; default the dataset's."),
            click.option("--count", default=count, show_default=True, help="Unlabelled images for a calibration."),
            click.option("--rank-count", default=512, show_default=True, help="Images for the ranking."),
        ]):  # fmt: skip
            command = option(command)
        return command

    return decorate


def device_options(command: Command) -> Command:
    """Decorator: what to measure on."""
    for option in reversed([
        click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, mps."),
        click.option("--image-size", default=224, show_default=True, help="Side in pixels."),
        click.option("--batch-size", type=int, multiple=True, help="Default: what is usual on the device."),
        click.option("--runtime", type=click.Choice(list(RUNTIMES)), multiple=True, help="As --batch-size."),
        click.option("--precision", type=click.Choice(list(PRECISIONS)), multiple=True, help="As --batch-size."),
        click.option("--rounds", default=30, show_default=True),
        resumed_option,
    ]):  # fmt: skip
        command = option(command)
    return command


@click.group()
def bench() -> None:
    """Benchmarks; each can write a record of this machine."""


@bench.command("merge")
@click.option("--cases", default=10_000, show_default=True, help="Random blocks to merge.")
@click.option("--seed", default=0, show_default=True)
@out_option
def merge_bench(cases: int, seed: int, out: Path | None) -> None:
    """Merge random blocks of every kind and compare each with its layers; fails if one differs."""
    from .bench.fuzz import record_fuzz

    require(cases > 0, f"--cases: expected 1 or more, found {cases}")
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
    _write(record, out)
    if values["failures"]:
        raise DslibError(f"{values['failures']} of {values['cases']} blocks were merged wrongly: please report them")


@bench.command("families")
@click.option("--model", "models", multiple=True, help="A network to look at; default one of each family.")
@click.option("--image-size", default=224, show_default=True)
@out_option
def families_bench(models: tuple[str, ...], image_size: int, out: Path | None) -> None:
    """Sites, mergeable ones and reasons, for one member of each torchvision and timm CNN family."""
    from .bench.families import frame, record_families

    record = record_families(models, image_size)
    click.echo(frame(record).to_string())
    _write(record, out)


@bench.command("borders")
@click.option("--model", default="mobilenet_v2", show_default=True)
@click.option("--image-size", default=224, show_default=True)
@click.option("--batch-size", default=8, show_default=True)
@click.option("--rounds", default=30, show_default=True)
@out_option
def borders_bench(model: str, image_size: int, batch_size: int, rounds: int, out: Path | None) -> None:
    """What exact borders cost over hoisted ones, and how long merging takes."""
    from .bench.borders import record_borders

    record = record_borders(model, image_size, batch_size, rounds)
    for name, value in record.values["networks"].items():
        click.echo(f"{name:8} {value['latency_ms']:.2f} ms per batch, {value['times_hoisted']:.3f} x hoisted")
    seconds = ", ".join(f"{s:.2f}" for s in record.values["merge_seconds"])
    click.echo(f"merged {record.values['sites']} sites, {len(record.values['merge_seconds'])} times, in {seconds} s")
    _write(record, out)


@bench.command("exact")
@click.option("--model", default="mobilenet_v2", show_default=True)
@click.option("--data", default="imagenette", show_default=True)
@click.option("--image-size", default=128, show_default=True)
@click.option("--remove", "removed", multiple=True, help="A site to remove; default three of MobileNetV2's.")
@out_option
def exact_bench(model: str, data: str, image_size: int, removed: tuple[str, ...], out: Path | None) -> None:
    """Merge with exact borders and compare with the unmodified original on every photo of a validation split."""
    from .bench.exact import REMOVED, record_exact

    record = record_exact(model, data, image_size, removed or REMOVED)
    for name, value in record.values["networks"].items():
        click.echo(f"{name:5} differs by {value['largest_relative_difference']:.1e} of the largest logit, other top-1 "
                   f"on {value['other_top1']} of {record.values['images']} images")  # fmt: skip
    _write(record, out)


@bench.command("frontier")
@trained_options(count=1024)
@click.option("--random-masks", default=2, show_default=True, help="Random masks beside, for each third k.")
@click.option("--seed", default=0, show_default=True)
@out_option
def frontier_bench(out: Path | None, **given: Any) -> None:
    """Rank the sites without labels, calibrate for every k, and evaluate; random masks beside."""
    from .bench.frontier import record_frontier

    record = record_frontier(**given)
    for row in record.values["frontier"]:
        shares = f"accuracy {row['accuracy']:.2%}, agreement {row['agreement']:.2%}"
        click.echo(f"k={row['k']:<3} {shares}, {row['seconds']:.1f} s")
    click.echo(f"{record.values['seconds_without_evaluation']:.0f} s in all, evaluation apart")
    _write(record, out)


@bench.command("ingredients")
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
    from .bench.ingredients import record_ingredients

    record = record_ingredients(**given)
    for row in record.values["rows"]:
        click.echo(f"{row['mask']}, {row['images']} images, seed {row['seed']}, {row['ingredients']}: "
                   f"accuracy {row['accuracy']:.2%}, {row['seconds']:.1f} s")  # fmt: skip
    click.echo(f"largest memory {record.values['peak_memory_gib']:.1f} GiB")
    _write(record, out)


@bench.command("speedup")
@trained_options()
@click.option("--speedup", default=1.3, show_default=True, help="Over the original, on the same runtime.")
@click.option(
    "--runtime",
    "runtimes",
    type=click.Choice(list(RUNTIMES)),
    multiple=True,
    default=("eager", "openvino"),
    show_default=True,
)
@click.option("--batch-size", default=32, show_default=True)
@click.option("--rounds", default=30, show_default=True)
@click.option("--seed", default=0, show_default=True)
@out_option
def speedup_bench(out: Path | None, **given: Any) -> None:
    """The accuracy that calibration keeps at a measured speed-up, on each runtime."""
    from .bench.speedup import record_speedup

    record = record_speedup(**given)
    for name, row in record.values["networks"].items():
        times = ", ".join(f"{t['speedup']:.2f} x on {runtime}" for runtime, t in row["timing"].items())
        click.echo(f"{name}: accuracy {row['accuracy']:.2%}, {len(row['removed'])} removed, {times}")
    _write(record, out)


@bench.command("table1")
@click.option("--model", "models", multiple=True, help="A network; default the paper's six.")
@device_options
def table1_bench(**given: Any) -> None:
    """The paper's motivating table here: networks and their dense counterparts, over runtimes and batch sizes."""
    from .bench.table1 import record_table1

    record_table1(**given, echo=click.echo)


@bench.command("masks")
@device_options
def masks_bench(**given: Any) -> None:
    """MobileNetV2-1.4 with the paper's masks A to F, narrower ones and the dense one, in turns."""
    from .bench.masks import record_masks

    record_masks(**given, echo=click.echo)


@bench.command("waterfall")
@click.option("--model", default="MobileNetV2", show_default=True)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, mps.")
@click.option("--image-size", default=224, show_default=True, help="Side in pixels.")
@click.option("--batch-size", default=8, show_default=True)
@click.option("--rounds", default=30, show_default=True)
@out_option
def waterfall_bench(out: Path | None, **given: Any) -> None:
    """What part of the dense network's speed-up is BatchNorm, memory allocation, or the compiler."""
    from .bench.waterfall import record_waterfall

    _write(record_waterfall(**given, echo=click.echo), out)


@bench.command("predict")
@click.option("--model", default="mobilenet_v2", show_default=True)
@click.option("--image-size", default=224, show_default=True, help="Side in pixels.")
@click.option("--batch-size", default=8, show_default=True)
@click.option("--runtime", type=click.Choice(list(RUNTIMES)), default="eager", show_default=True)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, mps.")
@click.option("--masks", default=20, show_default=True, help="Random masks.")
@click.option("--rounds", default=15, show_default=True)
@click.option("--seed", default=0, show_default=True)
@out_option
def predict_bench(out: Path | None, **given: Any) -> None:
    """How far latencies predicted by a profile are from measured ones, over random masks."""
    from .bench.predict import record_prediction

    record = record_prediction(**given)
    for row in record.values["rows"]:
        click.echo(f"{len(row['removed'])} removed: predicted {row['predicted_ms']:.1f} ms, measured "
                   f"{row['measured_ms']:.1f} ms ({row['error']:+.1%})")  # fmt: skip
    click.echo(f"median error {record.values['median_error']:.1%}, largest {record.values['largest_error']:.1%}")
    _write(record, out)


@bench.command("compare")
@click.argument("files", type=Path, nargs=-1, required=True)
def compare_bench(files: tuple[Path, ...]) -> None:
    """Records of table1 or masks, made on several machines, side by side."""
    from .bench.tables import side_by_side
    from .records import Record

    click.echo(side_by_side([Record.load(file) for file in files]).round(2).to_string())


@bench.command("starts")
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
    from .bench.starts import record_starts

    record_starts(**given)


def _write(record: Record, out: Path | None) -> None:
    if out is not None:
        click.echo(f"written: {record.save(out)}")
