"""The command line: `dslib run`, all stages in one."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from ..errors import BadConfig
from ..finetuning import Finetune
from ..records import as_options, read_json
from ..running import CALIBRATED, FADING, Run
from ..searching import Search
from ..training import Log, Train
from .options import (
    data_options,
    network_options,
    next_step,
    of_recipe,
    parse_options,
    settings,
    tensorboard_option,
    trust_option,
)

OWN = ("k", "seed")  # given once for a whole run, not per stage
STAGES = {"pretrain": Train, "search": Search, "finetune": Finetune}
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
    known = {parameter.name for parameter in context.command.params}
    unknown = sorted(flat.keys() - known)
    if unknown:
        raise BadConfig(f"{path}: unknown settings {', '.join(unknown)}; expected a run's config.json")
    context.default_map = {key: value for key, value in flat.items() if value is not None}


@click.command("run")
@network_options("default")
@data_options
@settings(Run, skip=("model", "data", "weights", "image_size", "skip_corrupt", "device"))
@settings(Train, "pretrain-", OWN, Run.pretrain)
@settings(Search, "search-", OWN, Run.search)
@settings(Finetune, "finetune-", OWN, FADING)
@click.option(
    "--config",
    type=Path,
    callback=_from_file,
    is_eager=True,
    expose_value=False,
    help="A run's config.json, whose settings are taken where none is given here.",
)
@click.option("--dry-run", is_flag=True, help="Try a few steps of each training and tell what the run would take.")
@tensorboard_option
@click.option("--out", type=Path, help="Folder for everything that the run makes.")
def run_command(
    out: Path | None, options: tuple[str, ...], boundary: str | None, dry_run: bool, tensorboard: bool, **given: Any
) -> None:
    """All three stages: search, finetune, merge, and a table of what was gained. Run again to go on.

    With --calibrate the finetuning is gentle by default: few epochs, a small rate, no augmentation, BatchNorm frozen.
    Started by torchrun or accelerate launch, all processes train together.
    """
    import dslib
    from dslib.training import processes

    if given["calibrate"]:
        source = click.get_current_context().get_parameter_source
        for field in fields(Finetune):
            name = f"finetune_{field.name}"
            if name in given and source(name) == click.core.ParameterSource.DEFAULT:
                given[name] = getattr(CALIBRATED, field.name)
    stages: dict[str, Any] = {
        stage: kind(**{f.name: given.pop(f"{stage}_{f.name}") for f in fields(kind) if f"{stage}_{f.name}" in given})
        for stage, kind in STAGES.items()
    }
    boundary = None if boundary in (None, "none") else boundary
    config = dslib.Run(options=parse_options(options), boundary=boundary, **stages, **given)
    say = Log(echo=click.echo).say
    if dry_run:
        from dslib.running import trial

        rows = trial(config).rename(columns={"hours": "time", "GPU-hours": "GPU-time"})
        say(rows.to_string(float_format="{:.3g}".format, formatters={"time": as_time, "GPU-time": as_time}))
        processes.finish()
        return
    if out is None:
        raise BadConfig("--out: expected a folder for what the run makes; found none")
    assert out is not None
    record = dslib.run(config, out, click.echo, tensorboard)
    say(table(record.values))
    say(f"written: {out}\n{next_step(out / 'merged.json', config.model)}")
    processes.finish()


@click.command("eval")
@click.argument("recipe", type=Path)
@data_options
@click.option("--batch-size", type=click.IntRange(min=1), default=64, show_default=True)
@trust_option
def eval_command(
    recipe: Path, data: str, image_size: int | None, skip_corrupt: bool, device: str, batch_size: int, trust: str | None
) -> None:
    """Accuracy of a network (RECIPE, from any other command) on a dataset's validation split."""
    import dslib
    from dslib.training import processes

    network, loaded, where = of_recipe(recipe, data, image_size, skip_corrupt, device, trust)[:3]
    logits = dslib.training.evaluating.predict(network.to(where), loaded.val, batch_size)
    accuracy = dslib.training.evaluating.top1(logits, loaded.val)
    loss = dslib.training.evaluating.loss_of(logits, loaded.val)
    Log(echo=click.echo).say(
        f"accuracy {accuracy:.2%}, cross-entropy {loss:.4f}, on {len(loaded.val)} images of {loaded.image_size} px"
    )
    processes.finish()


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
