"""The command line: `dslib calibrate`, for people without labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

import dslib

from ..calibrating import Calibrate, logits_of
from ..compressing import check_request
from ..data import FolderSplit, Split, load_data, load_photos
from ..errors import BadConfig
from ..measuring import pick_device
from ..ranking import agreement
from .options import call, device_option, network_options, next_step, options_of, out_option, parse_options

ASKED = ("k", "speedup", "drop", "runtime", "precision", "ranking", "rank_count")


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
