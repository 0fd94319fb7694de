"""The command line: `dslib importance` and `dslib plan`, which activations to keep by what they matter and cost."""

from __future__ import annotations

from pathlib import Path

import click

from ..errors import BadConfig
from ..measuring import this_machine
from ..records import Record, as_words, commit
from .options import data_options, network_options, single_option, trained_network


@click.command("importance")
@network_options("default")
@data_options
@click.option("--count", default=1024, show_default=True, help="Images to recover on, and as many for the loss.")
@click.option("--longest", default=1, show_default=True, help="Most sites in a row to join into one convolution.")
@click.option("--drop/--no-drop", default=False, show_default=True, help="Look at dropping mergeable blocks too.")
@click.option(
    "--labels/--no-labels",
    default=True,
    show_default=True,
    help="Loss with activations out; or divergence from the original, calibrated, no labels read.",
)
@single_option
@click.option("--seed", default=0, show_default=True)
@click.option("--out", type=Path, required=True, help="Where to write the importances (JSON).")
def importance_command(
    model: str,
    weights: str,
    options: tuple[str, ...],
    data: str,
    image_size: int | None,
    skip_corrupt: bool,
    device: str,
    count: int,
    longest: int,
    drop: bool,
    labels: bool,
    single: bool,
    seed: int,
    out: Path,
) -> None:
    """How much worse the network gets when a site alone, or a run of sites, is removed, or a block dropped."""
    import dslib
    from dslib.calibrating import Calibrate
    from dslib.ranking import Importance, importance, rank

    network, loaded = trained_network(model, weights, options, data, image_size, skip_corrupt, device)
    network.eval()
    sites = dslib.find_sites(network, loaded.image_size, single)
    partial = out.with_suffix(".partial.json")
    if labels:
        config = Importance(count=count, longest=longest, drop=drop, seed=seed)
        found = importance(network, loaded, sites, config, partial=partial)
    else:
        if not count > 0:
            raise BadConfig(f"--count: expected 1 or more, found {count}")
        images = loaded.train.first(count, seed)
        found = rank(network, sites, images, Calibrate(seed=seed), longest=longest, partial=partial, drop=drop)
    click.echo(found.frame.sort_values("rank").round(4).to_string())
    for run, value in found.runs.items():
        click.echo(f"{run} as one convolution: {value:.4f}")
    for name, value in found.dropped.items():
        click.echo(f"{name} dropped: {value:.4f}")
    given = {
        "model": model,
        "weights": weights,
        "model_option": options,
        "data": data,
        "image_size": loaded.image_size,
        "count": count,
        "longest": longest,
        "seed": seed,
    }
    flags = " ".join(
        f"--{'' if on else 'no-'}{name}" for name, on in {"labels": labels, "drop": drop, "single": single}.items()
    )
    record = Record(
        "importance",
        f"dslib importance {as_words(given)} {flags}",
        given,
        found.as_json(),
        this_machine(next(network.parameters()).device),
        commit(),
    )
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
@click.option("--out", type=Path, help="Where to write the plan (JSON), for shrink or calibrate; default only show.")
def plan_command(
    importance: Path, cost: Path, latency: float | None, speedup: float | None, merged: bool, out: Path | None
) -> None:
    """The plan within a latency that removes the least importance; without one, all that no other beats."""
    import dslib
    from dslib.planning import pareto, plan

    found, table = dslib.Importances.load(importance), dslib.CostTable.load(cost)
    if latency is not None and speedup is not None:
        raise BadConfig("expected one of --latency and --speedup")
    if speedup is not None and not speedup > 0:
        raise BadConfig(f"--speedup: expected more than 0, found {speedup}")
    budget = table.total / speedup if speedup is not None else latency
    if budget is None:
        if out is not None:
            raise BadConfig("--out needs --latency or --speedup: which of the plans?")
        for one in pareto(found, table, merged):
            click.echo(
                f"{one.latency:9.2f} ms ({table.total / one.latency:.2f} times), importance {one.loss:.4f}: "
                f"k={one.plan.mask.k}, removed: {one.plan}"
            )
        return
    best = plan(found, table, budget, merged)
    predicted = table.predict(best, merged)
    times = table.total / predicted
    click.echo(f"{predicted:.2f} ms predicted, {times:.2f} times as fast; k={best.mask.k}, removed: {best}")
    if out is not None:
        click.echo(f"written: {best.save(out)}")
