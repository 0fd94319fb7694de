"""The command line's benchmarks of searching and planning: `dslib bench methods` and others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..baselines import METHODS
from ..bench.frontier import Frontier
from ..measuring import PRECISIONS, RUNTIMES
from .bench_options import (
    device_option,
    model_options,
    out_option,
    parse_options,
    resumed_option,
    runtime_option,
    settings,
    weights_option,
    write_record,
)


@click.command("methods")
@click.option("--model", default="mobilenet_v2", show_default=True)
@weights_option("default")
@model_options
@click.option("--data", default="imagenette", show_default=True)
@click.option("--image-size", type=int, help="Side in pixels; default the dataset's.")
@click.option("--method", "methods", multiple=True, help="Default: planner, search, random, keep the cheapest.")
@click.option("--speedup", "speedups", type=float, multiple=True, default=(1.2, 1.5), show_default=True)
@click.option("--seeds", default=3, show_default=True)
@click.option("--epochs", default=1, show_default=True, help="Of the finetuning.")
@click.option("--search-epochs", default=2, show_default=True)
@click.option("--latency-weight", default=0.3, show_default=True, help="Of the search.")
@click.option("--count", default=2048, show_default=True, help="Unlabelled images for a calibration.")
@click.option("--rank-count", default=512, show_default=True, help="Images for the ranking.")
@click.option("--batch-size", default=32, show_default=True, help="That latencies are measured at.")
@runtime_option
@device_option
@click.option("--hours", type=float, help="Begin nothing after so many; what is missing is told.")
@resumed_option
def methods_bench(
    options: tuple[str, ...], methods: tuple[str, ...], hours: float | None, out: Path | None, **given: Any
) -> None:
    """Ways to choose what to keep, within one predicted latency, finetuned alike."""
    from ..bench.methods import MINIMUM, Matrix, record_methods

    matrix = Matrix(**given, options=parse_options(options), methods=methods or MINIMUM)
    record_methods(matrix, hours, out, click.echo)


@click.command("joint")
@click.option("--model", default="mobilenet_v2", show_default=True)
@model_options
@click.option("--data", default="cifar10", show_default=True)
@click.option("--image-size", type=int, help="Side in pixels; default the dataset's.")
@click.option("--width", "widths", type=float, multiple=True, default=(1.0, 0.75, 0.5, 0.35), show_default=True)
@click.option(
    "--share",
    "shares",
    type=float,
    multiple=True,
    default=(0.8, 0.6, 0.45, 0.3),
    show_default=True,
    help="Budgets, of the widest network's latency.",
)
@click.option("--seeds", default=3, show_default=True)
@click.option("--pretrain-epochs", default=10, show_default=True, help="Of each network from nothing.")
@click.option("--epochs", default=1, show_default=True, help="Of the finetuning.")
@click.option("--count", default=1024, show_default=True, help="Images to calibrate on.")
@click.option("--batch-size", default=32, show_default=True, help="That latencies are measured at.")
@runtime_option
@device_option
@click.option("--hours", type=float, help="Begin nothing after so many; what is missing is told.")
@resumed_option
def joint_bench(options: tuple[str, ...], hours: float | None, out: Path | None, **given: Any) -> None:
    """A narrower network with more activations, or a wider one with fewer, within one predicted latency."""
    from ..bench.joint import Widths, record_joint

    record_joint(Widths(**given, options=parse_options(options)), hours, out, click.echo)


@click.command("sign")
@click.option(
    "--weight",
    "weights",
    type=float,
    multiple=True,
    default=(0.0, 0.03, 0.1, 0.3, 1.0, 3.0),
    show_default=True,
    help="Latency weights.",
)
@click.option("--seeds", default=3, show_default=True)
@click.option("--k", default=8, show_default=True, help="Sites to keep.")
@click.option("--epochs", default=3, show_default=True)
@click.option("--model", default="mobilenet_v2", show_default=True)
@model_options
@click.option("--accuracies/--no-accuracies", default=True, help="Of every k of the first seed, calibrated.")
@resumed_option
def sign_bench(options: tuple[str, ...], **given: Any) -> None:
    """Whether a larger latency weight makes the search's networks faster, on the embedded digits."""
    from ..bench.sign import record_sign

    record_sign(**given, options=parse_options(options), echo=click.echo)


@click.command("steps")
@click.option("--model", default="mobilenet_v2", show_default=True)
@click.option("--image-size", default=128, show_default=True, help="Side in pixels.")
@click.option("--batch-size", default=32, show_default=True)
@click.option("--rounds", default=20, show_default=True)
@device_option
@click.option("--compiled", is_flag=True, help="Both by torch.compile.")
@out_option
def steps_bench(out: Path | None, **given: Any) -> None:
    """What a step of the search costs over a plain training step."""
    from ..bench.steps import record_steps

    record = record_steps(**given)
    values = record.values
    click.echo(
        f"a search step takes {values['search_over_plain']:.2f} times as long as a plain one (quartiles "
        f"{values['q25']:.2f} to {values['q75']:.2f}; {values['runtime']})"
    )
    write_record(record, out)


@click.command("plan")
@click.option("--sites", default=50, show_default=True, help="Of each random network.")
@click.option("--budgets", default=1000, show_default=True)
@click.option("--instances", default=20, show_default=True, help="Random networks.")
@click.option("--seed", default=0, show_default=True)
@out_option
def plan_bench(out: Path | None, **given: Any) -> None:
    """How long the planner takes, for all budgets and for one."""
    from ..bench.plan import record_planner

    record = record_planner(**given)
    seconds, plans = record.values["all_budgets_s"], [row["plans"] for row in record.values["rows"]]
    click.echo(
        f"all budgets of a network: {seconds['median']:.2f} s (at most {seconds['most']:.2f}), "
        f"{min(plans)} to {max(plans)} plans that no other beats"
    )
    write_record(record, out)


@click.command("frontier")
@settings(Frontier, skip=("image_size", "device", "precision", "runtime"))
@model_options
@click.option("--image-size", type=int, help="Side in pixels; default the dataset's.")
@click.option(
    "--method", "methods", multiple=True, default=Frontier.methods, show_default=True, help=f"Of {', '.join(METHODS)}."
)
@click.option("--speedup", "speedups", type=float, multiple=True, default=Frontier.speedups, show_default=True)
@click.option(
    "--repeated", type=float, multiple=True, help="Speed-ups with all seeds, the others have one; default all."
)
@click.option(
    "--lr",
    "lrs",
    type=float,
    multiple=True,
    default=Frontier.lrs,
    show_default=True,
    help="Tried for each method, by the usual recipe.",
)
@click.option(
    "--gentle-lr",
    "gentle_lrs",
    type=float,
    multiple=True,
    default=Frontier.gentle_lrs,
    show_default=True,
    help="Tried for each method, by the gentle recipe.",
)
@runtime_option
@click.option("--precision", type=click.Choice(list(PRECISIONS)), help="Default float32.")
@device_option
@click.option("--hours", type=float, help="Begin nothing after so many; what is missing is told.")
@resumed_option
def frontier_bench(options: tuple[str, ...], hours: float | None, out: Path | None, **given: Any) -> None:
    """Ours and its rivals within measured latencies, for the same time; begin it several times to share the points."""
    from ..bench.frontier import record_frontier
    from ..bench.points import table

    record = record_frontier(Frontier(**given, options=parse_options(options)), hours, out, click.echo)
    click.echo(table(record).round(3).to_string())


@click.command("retime")
@click.argument("record", type=Path)
@click.option("--runtime", type=click.Choice(list(RUNTIMES)), help="Default the record's.")
@click.option("--device", help="Default the record's.")
@click.option("--out", type=Path, required=True, help="Where to write the record with its new latencies (JSON).")
def retime_bench(record: Path, runtime: str | None, device: str | None, out: Path) -> None:
    """Latencies of a frontier's points (RECORD) once more, with nothing else running; or on another runtime."""
    from ..bench.retime import record_retimed

    write_record(record_retimed(record, runtime, device, click.echo), out)
