"""The verbs of the command line, but for `dslib run`: options, a call of the package, and what it gave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

import dslib

from ..calibrating import Calibrate, logits_of
from ..compressing import check_request
from ..data import FolderSplit, Split, load_data, load_photos
from ..errors import BadConfig
from ..measuring import pick_device, this_machine
from ..planning import pareto, plan
from ..ranking import Importance, agreement, importance, rank
from ..records import Record, as_words, commit
from ..saving import activation
from ..sites import find_sites
from ..training import Log, claimed, loss_of, predict, processes, top1
from .options import (
    call,
    check_classes,
    data_options,
    device_option,
    keep,
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
    partial_of,
    trained_network,
    trust_option,
)

recipe_argument = click.argument("recipe", type=Path)
plan_option = click.option("--mask", "--plan", "plan_file", type=Path, help="A mask's or plan's JSON.")
ASKED = ("k", "speedup", "drop", "runtime", "precision", "ranking", "rank_count")


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
        found = dslib.search(network, data, sites, costs, config, partial_of(out), log)
        keep(lambda: found.save(out), "search", out, config, {}, next(network.parameters()).device)
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
    recipe = dslib.Recipe(model, data.classes, data.image_size, options, boundary=boundary, hoist=hoist).planned(plan)
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
        done = dslib.finetune(small, data, guide if guide is None else on(where, guide), config, partial_of(out), log)
        accuracy = dslib.evaluate(done.model, data.val)
        values = {"accuracy": accuracy, "history": done.history}
        keep(lambda: dslib.save(out, done.model, found), "finetune", out, config, values, where)
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


@click.command("eval")
@recipe_argument
@data_options
@click.option("--batch-size", type=click.IntRange(min=1), default=64, show_default=True, help="Images a batch.")
@trust_option
def eval_command(batch_size: int, **given: Any) -> None:
    """Accuracy of a network (RECIPE, from any other command) on a dataset's validation split."""
    network, data, _ = call(of_recipe, given)
    logits = predict(network, data.val, batch_size)
    accuracy, loss = top1(logits, data.val), loss_of(logits, data.val)
    Log(echo=click.echo).say(
        f"accuracy {accuracy:.2%}, cross-entropy {loss:.4f}, on {len(data.val)} images of {data.image_size} px"
    )
    processes.finish()


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


@click.command("calibrate")
@network_options("default")
@click.option("--images", required=True, help="A folder of photos (labels are not needed), or a dataset's name.")
@click.option("--count", default=2048, show_default=True, help="Images used.")
@click.option("--image-size", type=int, help="Side in pixels; default 128, for small datasets their own.")
@click.option("--skip-corrupt", is_flag=True, help="Leave unreadable images out instead of stopping.")
@options_of(dslib.compress, *ASKED, defaults={"precision": "float32"})
@click.option("--mask", "--plan", "plan", type=Path, help="A mask's or plan's JSON, for --k.")
@device_option
@options_of(Calibrate)
@out_option("Recipe to write (.json; the weights go beside it).")
def calibrate_command(
    model: str, weights: str, options: tuple[str, ...], plan: Path | None, device: str, out: Path, **given: Any
) -> None:
    """Shrink and merge a trained network in seconds, from unlabelled photos, without training."""
    check_request(given["k"], given["speedup"], plan, given["drop"], given["rank_count"])
    photos, held, classes, size = call(_photos, given)
    loaded = dslib.load_model(model, classes, weights, parse_options(options))
    if not loaded.trained:
        raise BadConfig(f"{model} with weights {weights!r} is not trained for these images: give weights that are")
    network = loaded.model.to(pick_device(device))
    network.eval()
    asked = {name: given.pop(name) for name in ASKED}
    config = Calibrate(**given)
    chosen = None if plan is None else dslib.Plan.load(plan)
    done = dslib.compress(network, photos, plan=chosen, config=config, echo=click.echo, **asked)
    names = classes or [str(i) for i in range(logits_of(network, photos.first(1)).shape[1])]
    recipe = done.recipe(dslib.Recipe(model, tuple(names), size, parse_options(options)))
    click.echo(f"k={done.plan.mask.k} of {len(done.plan.mask)}, removed: {done.plan}")
    click.echo("error left in each block: " + ", ".join(f"{name} {error:.2f}" for name, error in done.errors.items()))
    if held is not None:
        before, after = (dslib.evaluate(net, held) for net in (network, done.model))
        click.echo(f"accuracy {after:.2%} (before {before:.2%})")
    else:
        same = agreement(*(logits_of(net, photos, config.batch_size) for net in (done.model, network)))
        click.echo(f"agrees with the original on {same:.2%} of the photos that it was made with (no labels were found)")
    click.echo(f"written: {dslib.save(out, done.model, recipe)}\n{next_step(out, model)}")


def _plan(search: Path | None, k: int | None, plan_file: Path | None) -> dslib.Plan:
    if plan_file is not None and search is None and k is None:
        return dslib.Plan.load(plan_file)
    if search is None or k is None or plan_file is not None:
        raise BadConfig("expected either --mask (--plan), or --search with --k")
    return dslib.Plan(dslib.Importances.load(search).mask(k))


def _photos(
    images: str, count: int, image_size: int | None, skip_corrupt: bool
) -> tuple[Split, Split | FolderSplit | None, tuple[str, ...] | None, int]:
    """Images to calibrate with; a labelled split and class names, if there are any; the image size."""
    if count < 1:
        raise BadConfig(f"--count: expected 1 or more, found {count}")
    path = Path(images).expanduser()
    if path.is_dir() and not (path / "train").is_dir():
        size = 128 if image_size is None else image_size
        return load_photos(path, size, count, skip_corrupt), None, None, size
    data = load_data(images, image_size, skip_corrupt)
    return data.train.first(count), data.val, data.classes, data.image_size
