"""The command line: `dslib importance` and `dslib plan`, which activations to keep by what they matter and cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

import dslib

from ..calibrating import Calibrate
from ..errors import BadConfig
from ..measuring import this_machine
from ..planning import pareto, plan
from ..ranking import Importance, importance, rank
from ..records import Record, as_words, commit
from ..sites import find_sites
from .options import call, data_options, network_options, options_of, out_option, trained_network


@click.command("importance")
@network_options("default")
@data_options
@options_of(Importance)
@click.option(
    "--labels/--no-labels",
    default=True,
    show_default=True,
    help="Loss with activations out; or divergence from the original, calibrated, no labels read.",
)
@options_of(find_sites, "single")
@out_option("Where to write the importances (JSON).")
def importance_command(labels: bool, single: bool, out: Path, **given: Any) -> None:
    """How much worse the network gets when a site alone, or a run of sites, is removed, or a block dropped."""
    told = {"model": given["model"], "weights": given["weights"], "model_option": given["options"]}
    told |= {"data": given["data"]}
    network, data = call(trained_network, given)
    network.eval()
    sites, config = find_sites(network, data.image_size, single), Importance(**given)
    partial = out.with_suffix(".partial.json")
    if labels:
        found = importance(network, data, sites, config, partial=partial)
    else:
        images, settings = data.train.first(config.count, config.seed), Calibrate(seed=config.seed)
        found = rank(network, sites, images, settings, longest=config.longest, partial=partial, drop=config.drop)
    click.echo(found.frame.sort_values("rank").round(4).to_string())
    for run, value in found.runs.items():
        click.echo(f"{run} as one convolution: {value:.4f}")
    for name, value in found.dropped.items():
        click.echo(f"{name} dropped: {value:.4f}")
    switches = {"labels": labels, "drop": config.drop, "single": single}
    flags = " ".join(f"--{'' if on else 'no-'}{name}" for name, on in switches.items())
    told |= {"image_size": data.image_size, "count": config.count, "longest": config.longest, "seed": config.seed}
    machine = this_machine(next(network.parameters()).device)
    command = f"dslib importance {as_words(told)} {flags}"
    record = Record("importance", command, told, found.as_json(), machine, commit())
    click.echo(f"written: {record.save(out)}")
    partial.unlink(missing_ok=True)


@click.command("plan")
@click.option("--importance", type=Path, required=True, help="From `dslib importance`.")
@click.option("--cost", type=Path, required=True, help="From `dslib profile --out`.")
@click.option("--latency", type=float, help="Of the whole network at most, ms per batch.")
@click.option("--speedup", type=float, help="For --latency: so many times faster than the original, as predicted.")
@click.option(
    "--merged/--or-linear",
    default=True,
    show_default=True,
    help="Merge all removed sites, as calibrate does; or leave those linear that are quicker so, as `dslib run` does.",
)
@out_option("Where to write the plan (JSON), for shrink or calibrate; default only show.", required=False)
def plan_command(
    importance: Path, cost: Path, latency: float | None, speedup: float | None, merged: bool, out: Path | None
) -> None:
    """The plan within a latency that removes the least importance; without one, all that no other beats."""
    found, table = dslib.Importances.load(importance), dslib.CostTable.load(cost)
    if latency is not None and speedup is not None:
        raise BadConfig("expected one of --latency and --speedup")
    if speedup is not None:
        if not speedup > 0:
            raise BadConfig(f"--speedup: expected more than 0, found {speedup}")
        latency = table.total / speedup
    if latency is None:
        if out is not None:
            raise BadConfig("--out needs --latency or --speedup: which of the plans?")
        for one in pareto(found, table, merged):
            click.echo(
                f"{one.latency:9.2f} ms ({table.total / one.latency:.2f} times), importance {one.loss:.4f}: "
                f"k={one.plan.mask.k}, removed: {one.plan}"
            )
        return
    best = plan(found, table, latency, merged)
    predicted = table.predict(best, merged)
    times = table.total / predicted
    click.echo(f"{predicted:.2f} ms predicted, {times:.2f} times as fast; k={best.mask.k}, removed: {best}")
    if out is not None:
        click.echo(f"written: {best.save(out)}")
