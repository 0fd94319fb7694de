"""The command line's stages one by one; options of a stage derive from the fields of its settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..errors import BadConfig
from ..finetuning import Finetune
from ..measuring import PRECISIONS
from ..searching import Search
from ..training import claimed, processes, remove_state
from .options import (
    check_classes,
    data_options,
    device_option,
    image_size_option,
    keep_record,
    log_for,
    log_options,
    network_options,
    next_step,
    of_recipe,
    parse_options,
    runtime_option,
    settings,
    single_option,
    trained_network,
    trust_option,
)


@click.command("sites")
@network_options()
@image_size_option
def sites_command(model: str, weights: str, options: tuple[str, ...], image_size: int) -> None:
    """Print a network's sites, and why those that cannot be merged cannot."""
    import dslib

    network = dslib.load_model(model, None, weights, parse_options(options)).model
    click.echo(repr(dslib.find_sites(network, image_size)))


@click.command("profile")
@network_options()
@image_size_option
@click.option("--batch-size", default=32, show_default=True)
@click.option("--boundary", help="Boundary activation, e.g. ReLU6.")
@device_option
@runtime_option
@click.option("--precision", type=click.Choice(list(PRECISIONS)), default="float32", show_default=True)
@click.option("--longest", default=1, show_default=True, help="Most sites in a row to measure as one convolution.")
@single_option
@click.option("--mask", "--plan", "plan_file", type=Path, help="A mask's or plan's JSON, to predict its latency.")
@click.option("--out", type=Path, help="Where to keep the table as JSON.")
def profile_command(
    model: str,
    weights: str,
    options: tuple[str, ...],
    image_size: int,
    batch_size: int,
    boundary: str | None,
    device: str,
    runtime: str,
    precision: str,
    longest: int,
    single: bool,
    plan_file: Path | None,
    out: Path | None,
) -> None:
    """Measure each site kept, linear and merged on this device."""
    import dslib
    from dslib.measuring import pick_device
    from dslib.saving import activation

    network = dslib.load_model(model, None, weights, parse_options(options)).model.to(pick_device(device))
    sites = dslib.find_sites(network, image_size, single)
    table = dslib.profile(
        network, sites, batch_size, activation(boundary), runtime=runtime, precision=precision, longest=longest
    )
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
@settings(Search)
@single_option
@log_options
@click.option("--cost", type=Path, help="Cost table from `dslib profile --out`; needed for --latency-weight.")
@click.option("--out", type=Path, required=True, help="Where to write the search (JSON).")
def search_command(
    model: str,
    weights: str,
    options: tuple[str, ...],
    data: str,
    image_size: int | None,
    skip_corrupt: bool,
    device: str,
    single: bool,
    cost: Path | None,
    curves: Path | None,
    tensorboard: bool,
    out: Path,
    **given: Any,
) -> None:
    """Stage 1: learn every site's importance, and with it a mask for every k."""
    import dslib

    log = log_for(curves, tensorboard)
    network, loaded = trained_network(model, weights, options, data, image_size, skip_corrupt, device)
    costs = dslib.CostTable.load(cost) if cost else None
    sites = dslib.find_sites(network, loaded.image_size, single)
    config = dslib.Search(**given)
    with claimed(out):
        found = dslib.search(network, loaded, sites, costs, config, _partial(out), log)
        processes.on_rank_zero(lambda: found.save(out))
        processes.on_rank_zero(lambda: keep_record("search", out, config, {}, next(network.parameters()).device))
        processes.on_rank_zero(lambda: remove_state(_partial(out)))
    log.say(f"{found.frame.to_string()}\n{found.mask(given['k'])!r}")
    processes.finish()


@click.command("shrink")
@network_options()
@click.option("--search", "search_file", type=Path, help="Result of `dslib search`; needs --k.")
@click.option("--k", type=int, help="Sites to keep.")
@click.option("--mask", "--plan", "mask_file", type=Path, help="A mask's or plan's JSON, for --search and --k.")
@click.option("--data", required=True, help="The dataset, for the classes.")
@click.option("--image-size", type=int, help="Side in pixels.")
@click.option("--boundary", help="Boundary activation, e.g. ReLU6.")
@click.option("--hoist/--no-hoist", default=True, show_default=True, help="Move padding to each block's input.")
@click.option("--out", type=Path, required=True, help="Recipe to write (.json; the weights go beside it).")
def shrink_command(
    model: str,
    weights: str,
    options: tuple[str, ...],
    search_file: Path | None,
    k: int | None,
    mask_file: Path | None,
    data: str,
    image_size: int | None,
    boundary: str | None,
    hoist: bool,
    out: Path,
) -> None:
    """Take the activations of the removed sites out; weights stay."""
    import dslib
    from dslib.saving import activation

    network, loaded = trained_network(model, weights, options, data, image_size, False, "cpu")
    plan = _plan(search_file, k, mask_file)
    small = dslib.shrink(network, plan, activation(boundary), loaded.image_size, hoist)
    recipe = dslib.Recipe(
        model,
        loaded.classes,
        loaded.image_size,
        parse_options(options),
        dict(plan.mask),
        boundary,
        runs=tuple(map(tuple, plan.runs)),
        hoist=hoist,
        dropped=tuple(plan.dropped),
    )
    click.echo(f"k={plan.mask.k} of {len(plan.mask)}, removed: {plan}\nwritten: {dslib.save(out, small, recipe)}")


@click.command("finetune")
@click.argument("recipe", type=Path)
@data_options
@settings(Finetune)
@log_options
@click.option("--teacher", type=Path, help="Recipe of the unshrunk network.")
@click.option("--teacher-weights", help="Or its weights: default, or a file.")
@trust_option
@click.option("--out", type=Path, required=True, help="Recipe to write.")
def finetune_command(
    recipe: Path,
    data: str,
    image_size: int | None,
    skip_corrupt: bool,
    device: str,
    teacher: Path | None,
    teacher_weights: str | None,
    trust: str | None,
    curves: Path | None,
    tensorboard: bool,
    out: Path,
    **given: Any,
) -> None:
    """Stage 2: recover accuracy of a shrunk network (RECIPE, from `dslib shrink`)."""
    import torch

    import dslib

    log, form = log_for(curves, tensorboard), {"memory_format": torch.channels_last}
    small, loaded, where, found = of_recipe(recipe, data, image_size, skip_corrupt, device, trust)
    guide = None
    if teacher is not None:
        guide, of_guide = dslib.load(teacher, trust)
        check_classes(teacher, of_guide, data, loaded)
    elif teacher_weights is not None:
        guide = dslib.load_model(found.model, loaded.classes, teacher_weights, found.options).model
    with claimed(out):
        guide = guide if guide is None else guide.to(where, **form)
        config = dslib.Finetune(**given)
        done = dslib.finetune(small.to(where, **form), loaded, guide, config, _partial(out), log)
        processes.on_rank_zero(lambda: dslib.save(out, done.model, found))
        accuracy = dslib.evaluate(done.model, loaded.val)
        values = {"accuracy": accuracy, "history": done.history}
        processes.on_rank_zero(lambda: keep_record("finetune", out, config, values, where))
        processes.on_rank_zero(lambda: remove_state(_partial(out)))
    log.say(f"accuracy {accuracy:.2%}; written: {out}")
    processes.finish()


@click.command("merge")
@click.argument("recipe", type=Path)
@click.option("--border-size", type=int, help="Shrunk with --no-hoist: a bias per position, for this image size only.")
@trust_option
@click.option("--out", type=Path, required=True, help="Recipe to write.")
def merge_command(recipe: Path, border_size: int | None, trust: str | None, out: Path) -> None:
    """Stage 3: merge every removed site of a shrunk network (RECIPE) into one convolution."""
    import dslib

    small, found = dslib.load(recipe, trust)
    merged, written = found.merge_into(small, border_size=border_size)
    click.echo(f"merged {len(written.merged)} sites; written: {dslib.save(out, merged, written)}")
    click.echo(next_step(out, written.model))


@click.command("export")
@click.argument("recipe", type=Path)
@click.option("--image-size", type=int, help="Side in pixels; default the recipe's.")
@trust_option
@click.option("--out", type=Path, required=True, help="File to write: .onnx (opset 18, one file) or .pt2.")
def export_command(recipe: Path, image_size: int | None, trust: str | None, out: Path) -> None:
    """Write a network (RECIPE) for other programs to run; the file is loaded again and compared first."""
    import dslib

    network, found = dslib.load(recipe, trust)
    click.echo(f"written: {dslib.export(network, out, image_size or found.image_size)}")


def _plan(search_file: Path | None, k: int | None, mask_file: Path | None) -> Any:
    import dslib

    if mask_file is not None and search_file is None and k is None:
        return dslib.Plan.load(mask_file)
    if search_file is None or k is None or mask_file is not None:
        raise BadConfig("expected either --mask (--plan), or --search with --k")
    return dslib.Plan(dslib.Importances.load(search_file).mask(k))


def _partial(out: Path) -> Path:
    return out.with_name(f"{out.name.removesuffix('.json')}.partial.safetensors")
