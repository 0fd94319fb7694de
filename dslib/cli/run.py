"""The command line: `dslib run`, all stages in one."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import click

import dslib

from ..errors import BadConfig
from ..records import as_options, read_json
from ..running import CALIBRATED, FADING, trial
from ..training import Log, processes
from .options import data_options, network_options, next_step, options_of, out_option, parse_options

OWN = ("k", "seed")  # given once for a whole run, not per stage
STAGES = {"pretrain": dslib.Run.pretrain, "search": dslib.Run.search, "finetune": FADING}  # and their defaults
UNITS = ((3600, "s", 90), (60, "min", 90), (1, "h", float("inf")))  # an hour's number of each, and the most told so
HEADS = {
    "accuracy": "accuracy",
    "macs": "MMACs",
    "parameters": "M params",
    "latency_ms": "ms/batch",
    "images_per_s": "images/s",
}


def _from_file(context: click.Context, _: click.Parameter, path: Path | None) -> None:
    """Take a run's settings for the command's defaults."""
    if path is None:
        return
    found = read_json(path)
    for name in (*STAGES, "options"):
        part = found.get(name) or {}
        if not isinstance(part, dict):
            raise BadConfig(f"{path}: {name}: expected settings by name, found {part!r}")
    flat = {key: value for key, value in found.items() if key not in (*STAGES, "options")}
    flat["options"] = as_options(found.get("options"))
    for stage in STAGES:
        flat |= {f"{stage}_{key}": value for key, value in (found.get(stage) or {}).items() if key not in OWN}
    unknown = sorted(flat.keys() - {parameter.name for parameter in context.command.params})
    if unknown:
        raise BadConfig(f"{path}: unknown settings {', '.join(unknown)}; expected a run's config.json")
    context.default_map = {key: value for key, value in flat.items() if value is not None}


def _stage_options(stage: str) -> Any:
    return options_of(type(STAGES[stage]), prefix=f"{stage}-", skip=OWN, defaults=vars(STAGES[stage]))


@click.command("run")
@network_options("default")
@data_options
@options_of(dslib.Run, skip=("model", "data", "weights", "image_size", "skip_corrupt", "device"))
@_stage_options("pretrain")
@_stage_options("search")
@_stage_options("finetune")
@click.option(
    "--config",
    type=Path,
    callback=_from_file,
    is_eager=True,
    expose_value=False,
    help="A run's config.json, whose settings are taken where none is given here.",
)
@click.option("--dry-run", is_flag=True, help="Try a few steps of each training and tell what the run would take.")
@click.option("--tensorboard", is_flag=True, help="Write TensorBoard's curves too.")
@out_option("Folder for everything that the run makes.", required=False)
def run_command(out: Path | None, dry_run: bool, tensorboard: bool, **given: Any) -> None:
    """All three stages: search, finetune, merge, and a table of what was gained. Run again to go on.

    With --calibrate the finetuning is gentle by default: few epochs, a small rate, no augmentation, BatchNorm frozen.
    Started by torchrun or accelerate launch, all processes train together.
    """
    config, say = _config(**given), Log(echo=click.echo).say
    if dry_run:
        rows = trial(config).rename(columns={"hours": "time", "GPU-hours": "GPU-time"})
        say(rows.to_string(float_format="{:.3g}".format, formatters={"time": as_time, "GPU-time": as_time}))
    elif out is None:
        raise BadConfig("--out: expected a folder for what the run makes; found none")
    else:
        record = dslib.run(config, out, click.echo, tensorboard)
        say(table(record.values))
        say(f"written: {out}\n{next_step(out / 'merged.json', config.model)}")
    processes.finish()


def _config(options: tuple[str, ...], boundary: str | None, **given: Any) -> dslib.Run:
    """A run's settings, from the command's options."""
    if given["calibrate"]:
        source = click.get_current_context().get_parameter_source
        for field in fields(CALIBRATED):
            name = f"finetune_{field.name}"
            if name in given and source(name) == click.core.ParameterSource.DEFAULT:
                given[name] = getattr(CALIBRATED, field.name)
    stages: dict[str, Any] = {}
    for stage, default in STAGES.items():
        names = [field.name for field in fields(default) if f"{stage}_{field.name}" in given]
        stages[stage] = type(default)(**{name: given.pop(f"{stage}_{name}") for name in names})
    boundary = None if boundary == "none" else boundary
    return dslib.Run(options=parse_options(options), boundary=boundary, **stages, **given)


def as_time(hours: float | str) -> str:
    """Hours for people: "4.2 s", "12.0 min", "3.5 h"; what is no number stays."""
    if isinstance(hours, str):
        return hours
    return next(f"{hours * unit:.1f} {name}" for unit, name, most in UNITS if hours * unit < most)


def table(values: dict[str, Any]) -> str:
    """What a run gained, as text: original (BatchNorm folded) beside merged."""
    import pandas as pd

    frame = pd.DataFrame(values["networks"]).T[list(HEADS)].astype(float)
    frame["accuracy"] *= 100
    frame[["macs", "parameters"]] /= 1e6
    speed = values["speedup"]
    return "\n".join(
        [
            frame.rename(columns=HEADS | {"accuracy": "accuracy %"}).round(2).to_string(),
            f"merged is {speed['ratio_of_medians']:.2f} times as fast "
            f"(quartiles {speed['q25']:.2f} to {speed['q75']:.2f} of "
            f"{speed['rounds']} interleaved rounds, batch {values['batch_size']}, {values['runtime']})",
            "largest difference of merged to shrunk outputs: "
            f"{values['largest_relative_difference']:.1e} of the largest; "
            f"other top-1 on {values['top1_differences']} of {values['val_images']} images",
        ]
    )
