"""The command line: `dslib run`, all stages in one."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from .cli_options import data_options, network_options, parse_options, settings
from .finetuning import Finetune
from .running import CALIBRATED, FADING, Run
from .schedules import Train
from .searching import Search

OWN = ("k", "seed")  # given once for a whole run, not per stage
STAGES = {"pretrain": Train, "search": Search, "finetune": Finetune}
HEADS = {
    "accuracy": "accuracy",
    "macs": "MMACs",
    "parameters": "M params",
    "latency_ms": "ms/batch",
    "images_per_s": "images/s",
}


@click.command("run")
@network_options("default")
@data_options
@settings(Run, skip=("model", "data", "weights", "image_size", "skip_corrupt", "device"))
@settings(Train, "pretrain-", OWN, Run.pretrain)
@settings(Search, "search-", OWN, Run.search)
@settings(Finetune, "finetune-", OWN, FADING)
@click.option("--out", type=Path, required=True, help="Folder for everything that the run makes.")
def run_command(out: Path, options: tuple[str, ...], boundary: str | None, **given: Any) -> None:
    """All three stages: search, finetune, merge, and a table of what was gained. Run again to go on.

    With --calibrate the finetuning is gentle by default: few epochs, a small rate, no augmentation, BatchNorm frozen.
    """
    import dslib

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
    record = dslib.run(config, out, click.echo)
    click.echo(table(record.values))
    click.echo(f"written: {out}")


def table(values: dict[str, Any]) -> str:
    """What a run gained, as text: original (BatchNorm folded) beside merged."""
    import pandas as pd

    frame = pd.DataFrame(values["networks"]).T[list(HEADS)].astype(float)
    frame["accuracy"] *= 100
    frame[["macs", "parameters"]] /= 1e6
    speed = values["speedup"]
    return "\n".join([
        frame.rename(columns=HEADS | {"accuracy": "accuracy %"}).round(2).to_string(),
        f"merged is {speed['ratio_of_medians']:.2f} times as fast "
        f"(quartiles {speed['q25']:.2f} to {speed['q75']:.2f} of "
        f"{speed['rounds']} interleaved rounds, batch {values['batch_size']}, {values['runtime']})",
        f"largest difference of merged to shrunk outputs: {values['largest_relative_difference']:.1e} of the largest; "
        f"other top-1 on {values['top1_differences']} of {values['val_images']} images",
    ])  # fmt: skip
