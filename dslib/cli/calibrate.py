"""The command line: `dslib calibrate`, for people without labels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch

from ..algebra import droppable, structure_of
from ..calibrating import Calibrate
from ..errors import BadConfig, MaskMismatch
from ..measuring import PRECISIONS, RUNTIMES, dtype_for, runner_for
from .options import device_option, network_options, next_step, parse_options, settings


@click.command("calibrate")
@network_options("default")
@click.option("--images", required=True, help="A folder of photos (labels are not needed), or a dataset's name.")
@click.option("--count", default=2048, show_default=True, help="Images used.")
@click.option("--image-size", type=int, help="Side in pixels; default 128, for small datasets their own.")
@click.option("--skip-corrupt", is_flag=True, help="Leave unreadable images out instead of stopping.")
@click.option("--k", type=int, help="Sites to keep, the most important ones; they are ranked first (or --ranking).")
@click.option("--speedup", type=float, help="For --k: so many times faster than the original, measured here.")
@click.option(
    "--runtime",
    type=click.Choice(list(RUNTIMES)),
    default="eager",
    show_default=True,
    help="What --speedup is measured on, at batch 32.",
)
@click.option(
    "--precision", type=click.Choice(list(PRECISIONS)), default="float32", show_default=True, help="The same."
)
@click.option(
    "--ranking", type=Path, help="A ranking (for --k, a search too) made before; written here if it does not exist."
)
@click.option("--mask", "--plan", "mask_file", type=Path, help="A mask's or plan's JSON, for --k.")
@click.option("--drop/--no-drop", default=False, show_default=True, help="For --speedup: blocks may go whole.")
@click.option("--rank-count", default=512, show_default=True, help="Images used for ranking.")
@device_option
@settings(Calibrate)
@click.option("--out", type=Path, required=True, help="Recipe to write (.json; the weights go beside it).")
def calibrate_command(
    model: str,
    weights: str,
    options: tuple[str, ...],
    images: str,
    count: int,
    image_size: int | None,
    skip_corrupt: bool,
    k: int | None,
    speedup: float | None,
    runtime: str,
    precision: str,
    ranking: Path | None,
    mask_file: Path | None,
    drop: bool,
    rank_count: int,
    device: str,
    out: Path,
    **given: Any,
) -> None:
    """Shrink and merge a trained network in seconds, from unlabelled photos, without training."""
    import dslib

    from ..calibrating import logits_of
    from ..measuring import pick_device
    from ..ranking import agreement, rank

    ways = [way is not None for way in (k, speedup, mask_file)]
    if sum(ways) != 1:
        raise BadConfig("expected one of --k, --speedup and --mask (--plan)")
    if speedup is not None and not speedup > 1:
        raise BadConfig(f"--speedup: expected more than 1, found {speedup}")
    if drop and speedup is None:
        raise BadConfig("--drop is for --speedup: k and a mask say what is merged")
    if not (count > 0 and rank_count > 0):
        raise BadConfig(f"expected one or more images, found {count} and {rank_count}")
    config = Calibrate(**given)
    photos, held, classes, size = _photos(images, count, image_size, skip_corrupt)
    loaded = dslib.load_model(model, classes, weights, parse_options(options))
    if not loaded.trained:
        raise BadConfig(f"{model} with weights {weights!r} is not trained for these images: give weights that are")
    where = pick_device(device)
    network = loaded.model.to(where)
    network.eval()
    example = next(photos.batches(1))[0].to(where, dtype_for(precision))
    runner_for(torch.nn.Identity(), example, runtime)  # before the work
    if mask_file is not None:
        plan = dslib.Plan.load(mask_file)
    else:
        sites = dslib.find_sites(network, size)
        sites.check_k(len(sites) if k is None else k)
        found = dslib.Importances.load(ranking) if ranking is not None and ranking.exists() else None
        if found is not None:
            click.echo(f"ranking: taken from {ranking}")
            fits = not found.network or found.network == structure_of(network)
            fits = fits and found.sites == sites.names
            if not fits:
                raise MaskMismatch(f"{ranking} is of another network: rank this one")
            if drop and not found.dropped and droppable(network, sites.mergeable, size):
                raise MaskMismatch(f"{ranking} says nothing of whole blocks: remove it, to rank anew")
            can_add = k is not None or bool(found.unit)
            if not can_add:
                raise MaskMismatch(f"{ranking} only orders the sites, and --speedup adds importances: rank anew")
        else:
            few = photos.first(rank_count)
            whole = droppable(network, sites.mergeable, size) if drop else ()
            click.echo(
                f"ranking {len(sites.mergeable)} sites on {len(few)} photos, "
                f"{1 + len(sites.mergeable) + len(whole)} calibrations"
            )
            found = rank(network, sites, few, config, drop=drop)
            if ranking is not None:
                found.save(ranking)
        if k is not None:
            plan = dslib.Plan(found.mask(k))
        else:
            found = found if drop else replace(found, dropped={})
            plan = _quicker(network, sites, found, speedup or 1.0, runtime, precision)
    click.echo(f"calibrating on {len(photos)} photos")
    done = dslib.calibrate(network, plan, photos, config)
    names = classes or [str(i) for i in range(logits_of(network, photos.first(1)).shape[1])]
    merged = tuple("+".join(group) for group in plan.groups if group[-1] in done.errors)
    recipe = dslib.Recipe(
        model,
        tuple(names),
        size,
        parse_options(options),
        dict(plan.mask),
        merged=merged,
        runs=tuple(map(tuple, plan.runs)),
        dropped=tuple(plan.dropped),
    )
    click.echo(f"k={plan.mask.k} of {len(plan.mask)}, removed: {plan}")
    click.echo("error left in each block: " + ", ".join(f"{name} {error:.2f}" for name, error in done.errors.items()))
    if held is not None:
        before, after = (dslib.evaluate(net, held) for net in (network, done.model))
        click.echo(f"accuracy {after:.2%} (before {before:.2%})")
    else:
        same = agreement(*(logits_of(net, photos, config.batch_size) for net in (done.model, network)))
        click.echo(f"agrees with the original on {same:.2%} of the photos that it was made with (no labels were found)")
    click.echo(f"written: {dslib.save(out, done.model, recipe)}\n{next_step(out, model)}")


def _quicker(network: Any, sites: Any, found: Any, speedup: float, runtime: str, precision: str) -> Any:
    """The plan that is so many times faster here, told to the user."""
    from ..planning import for_speedup
    from ..profiling import profile

    click.echo(f"measuring {len(sites)} sites on {runtime}")
    cost = profile(network, sites, runtime=runtime, precision=precision)
    plan, (ratio, low, high) = for_speedup(network, found, cost, speedup, runtime=runtime, precision=precision)
    click.echo(f"{ratio:.2f} times as fast as the original (quartiles {low:.2f} to {high:.2f}; {cost.runtime})")
    return plan


def _photos(images: str, count: int, image_size: int | None, skip_corrupt: bool) -> tuple[Any, Any, Any, int]:
    """Images to calibrate with; a labelled split and class names, if there are any; the image size."""
    from ..data import load_data, load_photos

    path = Path(images).expanduser()
    if path.is_dir() and not (path / "train").is_dir():
        size = 128 if image_size is None else image_size
        return load_photos(path, size, count, skip_corrupt), None, None, size
    data = load_data(images, image_size, skip_corrupt)
    return data.train.first(count), data.val, data.classes, data.image_size
