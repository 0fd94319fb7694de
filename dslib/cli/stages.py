"""The command line: the stages one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

import dslib

from ..errors import BadConfig
from ..saving import activation
from ..sites import find_sites
from ..training import claimed, processes, remove_state
from .options import (
    call,
    check_classes,
    data_options,
    device_option,
    keep_record,
    log_for,
    log_options,
    network_of,
    network_options,
    next_step,
    of_recipe,
    on,
    options_of,
    out_option,
    parse_options,
    trained_network,
    trust_option,
)

recipe_argument = click.argument("recipe", type=Path)
plan_option = click.option("--mask", "--plan", "plan_file", type=Path, help="A mask's or plan's JSON.")


@click.command("sites")
@network_options()
@options_of(find_sites, "image_size")
def sites_command(image_size: int, **given: Any) -> None:
    """Print a network's sites, and why those that cannot be merged cannot."""
    click.echo(repr(find_sites(call(network_of, given), image_size)))


@click.command("profile")
@network_options()
@options_of(find_sites, "image_size", "single")
@options_of(dslib.profile, "batch_size", "runtime", "precision", "longest", defaults={"precision": "float32"})
@options_of(dslib.Run, "boundary")
@device_option
@plan_option
@out_option("Where to keep the table as JSON.", required=False)
def profile_command(boundary: str | None, plan_file: Path | None, out: Path | None, **given: Any) -> None:
    """Measure each site kept, linear and merged on this device."""
    network = call(network_of, given)
    sites = find_sites(network, given.pop("image_size"), given.pop("single"))
    table = dslib.profile(network, sites, boundary=activation(boundary), **given)
    click.echo(table.frame.round(3).to_string())
    click.echo(
        f"whole network {table.total:.2f} ms; ms per batch of {table.batch_size}; {table.device}, {table.runtime}"
    )
    for run, ms in table.runs.items():
        click.echo(f"{run} as one convolution: {ms:.3f} ms")
    if plan_file:
        for merged, how in ((True, "all merged"), (False, "merged where that is quicker")):
            predicted = table.predict(dslib.Plan.load(plan_file), merged)
            click.echo(f"{plan_file}: {predicted:.2f} ms predicted, {table.total / predicted:.2f} times as fast; {how}")
    if out:
        table.save(out)


@click.command("search")
@network_options()
@data_options
@options_of(dslib.Search)
@options_of(find_sites, "single")
@log_options
@click.option("--cost", type=Path, help="Cost table from `dslib profile --out`; needed for --latency-weight.")
@out_option("Where to write the search (JSON).")
def search_command(single: bool, cost: Path | None, out: Path, **given: Any) -> None:
    """Stage 1: learn every site's importance, and with it a mask for every k."""
    log = call(log_for, given)
    network, data = call(trained_network, given)
    costs = dslib.CostTable.load(cost) if cost else None
    sites, config = find_sites(network, data.image_size, single), dslib.Search(**given)
    with claimed(out):
        found = dslib.search(network, data, sites, costs, config, _partial(out), log)
        processes.on_rank_zero(lambda: found.save(out))
        processes.on_rank_zero(lambda: keep_record("search", out, config, {}, next(network.parameters()).device))
        processes.on_rank_zero(lambda: remove_state(_partial(out)))
    log.say(f"{found.frame.to_string()}\n{found.mask(config.k)!r}")
    processes.finish()


@click.command("shrink")
@network_options()
@click.option("--search", type=Path, help="Result of `dslib search`; needs --k.")
@click.option("--k", type=int, help="Sites to keep.")
@plan_option
@click.option("--data", required=True, help="The dataset, for the classes.")
@options_of(dslib.load_data, "image_size")
@options_of(dslib.Run, "boundary")
@options_of(dslib.shrink, "hoist")
@out_option("Recipe to write (.json; the weights go beside it).")
def shrink_command(boundary: str | None, hoist: bool, out: Path, **given: Any) -> None:
    """Take the activations of the removed sites out; weights stay."""
    model, options = given["model"], parse_options(given["options"])
    network, data = call(trained_network, given)
    plan = _plan(**given)
    small = dslib.shrink(network, plan, activation(boundary), data.image_size, hoist)
    recipe = dslib.Recipe(
        model,
        data.classes,
        data.image_size,
        options,
        dict(plan.mask),
        boundary,
        runs=tuple(map(tuple, plan.runs)),
        hoist=hoist,
        dropped=tuple(plan.dropped),
    )
    click.echo(f"k={plan.mask.k} of {len(plan.mask)}, removed: {plan}\nwritten: {dslib.save(out, small, recipe)}")


@click.command("finetune")
@recipe_argument
@data_options
@options_of(dslib.Finetune)
@log_options
@click.option("--teacher", type=Path, help="Recipe of the unshrunk network.")
@click.option("--teacher-weights", help="Or its weights: default, or a file.")
@trust_option
@out_option("Recipe to write.")
def finetune_command(teacher: Path | None, teacher_weights: str | None, out: Path, **given: Any) -> None:
    """Stage 2: recover accuracy of a shrunk network (RECIPE, from `dslib shrink`)."""
    log, dataset, trust = call(log_for, given), given["data"], given["trust"]
    small, data, found = call(of_recipe, given)
    config, where, guide = dslib.Finetune(**given), next(small.parameters()).device, None
    if teacher is not None:
        guide, of_guide = dslib.load(teacher, trust)
        check_classes(teacher, of_guide, dataset, data)
    elif teacher_weights is not None:
        guide = dslib.load_model(found.model, data.classes, teacher_weights, found.options).model
    with claimed(out):
        done = dslib.finetune(small, data, guide if guide is None else on(where, guide), config, _partial(out), log)
        processes.on_rank_zero(lambda: dslib.save(out, done.model, found))
        accuracy = dslib.evaluate(done.model, data.val)
        values = {"accuracy": accuracy, "history": done.history}
        processes.on_rank_zero(lambda: keep_record("finetune", out, config, values, where))
        processes.on_rank_zero(lambda: remove_state(_partial(out)))
    log.say(f"accuracy {accuracy:.2%}; written: {out}")
    processes.finish()


@click.command("merge")
@recipe_argument
@click.option("--border-size", type=int, help="Shrunk with --no-hoist: a bias per position, for this image size only.")
@trust_option
@out_option("Recipe to write.")
def merge_command(recipe: Path, border_size: int | None, trust: str | None, out: Path) -> None:
    """Stage 3: merge every removed site of a shrunk network (RECIPE) into one convolution."""
    small, found = dslib.load(recipe, trust)
    merged, written = found.merge_into(small, border_size=border_size)
    click.echo(f"merged {len(written.merged)} sites; written: {dslib.save(out, merged, written)}")
    click.echo(next_step(out, written.model))


@click.command("export")
@recipe_argument
@click.option("--image-size", type=int, help="Side in pixels; default the recipe's.")
@trust_option
@out_option("File to write: .onnx (opset 18, one file) or .pt2.")
def export_command(recipe: Path, image_size: int | None, trust: str | None, out: Path) -> None:
    """Write a network (RECIPE) for other programs to run; the file is loaded again and compared first."""
    network, found = dslib.load(recipe, trust)
    click.echo(f"written: {dslib.export(network, out, image_size or found.image_size)}")


def _plan(search: Path | None, k: int | None, plan_file: Path | None) -> dslib.Plan:
    if plan_file is not None and search is None and k is None:
        return dslib.Plan.load(plan_file)
    if search is None or k is None or plan_file is not None:
        raise BadConfig("expected either --mask (--plan), or --search with --k")
    return dslib.Plan(dslib.Importances.load(search).mask(k))


def _partial(out: Path) -> Path:
    return out.with_name(f"{out.name.removesuffix('.json')}.partial.safetensors")
