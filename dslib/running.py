"""The whole way, from a network and a dataset to a merged network and a record; every stage can be taken up again."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import processes, records
from .calibration import Calibrate, calibrate
from .comparing import compare
from .datasets import Data, load_data
from .devices import pick_device, this_machine, tune_allocator
from .errors import BadConfig, require
from .evaluating import evaluate
from .finetuning import Finetune, check_teacher, finetune
from .found import Found
from .importance import rank
from .models import find_head, load_model
from .profiling import CostTable, profile
from .recipes import Recipe, activation
from .schedules import Train
from .searching import Search, search
from .shrinking import fade
from .sites import find_sites
from .snapshots import FREE
from .splits import decoded_by
from .stages import Stages
from .states import claimed, remove_state
from .training import train
from .watching import Log

T = TypeVar("T")
RANKED_IMAGES, CALIBRATION_IMAGES = 512, 2048
FADING = Finetune(epochs=10, lr=0.03, batch_size=64)
CALIBRATED = Finetune(epochs=3, lr=0.003, batch_size=64, augment=False, freeze_batchnorm=True)  # see dslib bench starts


@dataclass(frozen=True)
class Run:
    """Settings of a whole run; defaults suit a laptop and ten classes, not ImageNet (see `Search`, `Finetune`).

    Args:
        model, weights, options: as for `load_model`.
        data, image_size, skip_corrupt: as for `load_data`.
        k: number of sites kept.
        single: whether activations outside blocks (the stem's, the head's) are sites too, as for `find_sites`.
        boundary: name of the boundary activation in torch.nn, or None.
        calibrate: whether to begin with `calibrate` on training images, in place of activations that fade out; the
            sites are then ranked by it too, in place of a search.
        pretrain: of a network without weights, or of a new head.
        search, finetune: of stages 1 and 2; their k and seed are those here. None finetunes with `CALIBRATED` or
            `FADING`, as the network begins.
        batch_size: at which latency is measured.
        rounds: measurements of latency.
        device: 'auto', or a torch device.
        seed: of everything.
    """

    model: str
    data: str
    k: int
    weights: str = "default"
    options: Mapping[str, Any] = field(default_factory=dict)
    image_size: int | None = None
    skip_corrupt: bool = False
    single: bool = False
    boundary: str | None = None
    calibrate: bool = False
    pretrain: Train = Train(epochs=10, lr=0.2, batch_size=64, warmup=1)
    search: Search = Search(epochs=3, lr=0.04, batch_size=64, anneal=0.8, latency_weight=0.03)
    finetune: Finetune | None = None
    batch_size: int = 32
    rounds: int = 40
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        """Hand k and seed down to the stages; check what needs no network."""
        activation(self.boundary)
        require(not (self.calibrate and self.boundary), "a calibrated network has no boundary activation: leave it out")
        require(self.rounds > 0, f"rounds: expected 1 or more, found {self.rounds}")
        require(self.batch_size > 0, f"batch_size: expected 1 or more, found {self.batch_size}")
        object.__setattr__(self, "finetune", self.finetune or (CALIBRATED if self.calibrate else FADING))
        for name, changes in (("pretrain", {}), ("search", {"k": self.k}), ("finetune", {})):
            object.__setattr__(self, name, replace(getattr(self, name), seed=self.seed, **changes))


def run(config: Run, out: Path | str, echo: Callable[[str], None] = print, tensorboard: bool = False) -> records.Record:
    """Search, shrink, finetune and merge; measure; write everything to `out`; return the record.

    `out` gets config.json, original, shrunk and merged (with `calibrate`, calibrated too; each .json and .safetensors),
    cost.json, search.json, mask.json and record.json, and a .csv of each training. A stage whose file stands is not
    done again; a stage that was stopped goes on from its last state. Started by `torchrun` or `accelerate launch`,
    all processes train together, and the first does the rest.

    Args:
        config: the settings.
        out: folder; on a disk that all processes see.
        echo: is told of stages and epochs.
        tensorboard: whether `out`/tensorboard gets curves.
    Raises:
        BadConfig: if `out` holds a run with other settings, cannot be written, or is being written by another run.
    """
    out = Path(out)
    device = processes.start(pick_device(config.device))
    with claimed(out, folder=True):
        return _run(config, out, device, Log(out, tensorboard, echo))


def _run(config: Run, out: Path, device: torch.device, log: Log) -> records.Record:
    processes.agreed(lambda: _claim(out, config))
    tune_allocator()
    torch.manual_seed(config.seed)
    data = processes.in_turns(lambda: load_data(config.data, config.image_size, config.skip_corrupt))
    stage = Stages(out, log.say, config.model)
    model, recipe = stage.network("original", lambda: _original(config, data, device, out, log), together=True)
    model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    sites = find_sites(model, data.image_size, config.single)
    sites.check_k(config.k)
    boundary = activation(config.boundary)
    cost = stage.file("cost", CostTable.load, lambda: profile(model, sites, config.batch_size, boundary))
    settings = Calibrate(seed=config.seed)

    def stage1() -> Found:
        if config.calibrate:
            images = data.train.first(RANKED_IMAGES, config.seed)
            log.say(f"ranking {len(sites.mergeable)} sites on {len(images)} images, one calibration each")
            return rank(model, sites, images, settings)
        return search(model, data, sites, cost, config.search, out / "search.partial.safetensors", log)

    found = stage.file("search", Found.load, stage1, together=not config.calibrate)
    mask = found.mask(config.k)
    processes.agreed(lambda: mask.save(out / "mask.json"))
    log.say(repr(mask))
    shrunk_recipe = replace(recipe, mask=dict(mask), boundary=config.boundary)
    blocks = {site.name for site in sites if site.convolutions}
    merging = tuple(n for n in (mask.removed if config.calibrate else cost.worth_merging(mask)) if n in blocks)
    shrunk_recipe = replace(shrunk_recipe, merged=merging if config.calibrate else ())

    def calibrated() -> tuple[nn.Module, Recipe]:
        images = data.train.first(CALIBRATION_IMAGES, config.seed)
        log.say(f"calibrating on {len(images)} images")
        return calibrate(model, mask, images, settings).model, shrunk_recipe

    start = stage.network("calibrated", calibrated)[0] if config.calibrate else None

    def stage2() -> tuple[nn.Module, Recipe]:
        small = fade(model, mask, boundary, data.image_size) if start is None else start.to(device)
        done = finetune(small, data, model, config.finetune, out / "finetune.partial.safetensors", log)
        processes.agreed(lambda: records.write_json(out / "finetune.json", {"history": done.history}))
        return done.model, shrunk_recipe

    small, _ = stage.network("shrunk", stage2, together=True)
    merged, _ = stage.network(
        "merged", lambda: (small, shrunk_recipe) if config.calibrate else shrunk_recipe.merge_into(small, merging)
    )
    networks = {"original": model, "shrunk": small.to(device), "merged": merged.to(device)}

    def judged() -> records.Record:
        values = {
            "k": mask.k, "removed": list(mask.removed), "merged": list(merging), "processes": processes.started(),
            "seconds": stage.seconds(),
            **compare(networks, data, config.batch_size, config.rounds), "cost": asdict(cost), "found": asdict(found),
            **records.read_json(out / "finetune.json"),
        }  # fmt: skip
        record = records.Record("run", _command(config), asdict(config), values, this_machine(device), records.commit())
        record.save(out / "record.json")
        for name in ("original", "search", "finetune"):
            remove_state(out / f"{name}.partial.safetensors")
        return record

    return processes.agreed(judged)


def _original(config: Run, data: Data, device: torch.device, out: Path, log: Log) -> tuple[nn.Module, Recipe]:
    """The network to shrink, trained as far as its weights are not."""
    loaded = load_model(config.model, data.classes, config.weights, config.options, config.seed)
    model = loaded.model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    find_sites(model, data.image_size, config.single).check_k(config.k)  # before hours of training, not after
    if loaded.trained:
        log.say("the weights are for these classes: nothing is trained before the search")
    else:
        pretrain(
            model,
            data,
            config,
            head_only=config.weights != "none",
            checkpoint=out / "original.partial.safetensors",
            log=log,
        )
    check_teacher(model, data)  # before it is saved as what to search and to learn from
    return model, Recipe(config.model, data.classes, data.image_size, dict(config.options))


def pretrain(
    model: nn.Module, data: Data, config: Run, head_only: bool, checkpoint: Path | None = None, log: Log | None = None
) -> None:
    """Train a network in place from random weights, or only its new head on top of pretrained ones."""
    if head_only:
        model.requires_grad_(False)
        find_head(model)[1].requires_grad_(True)

    def loss(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        if head_only:
            network.eval()  # the statistics of BatchNorm stay those of the pretrained weights
        return F.cross_entropy(network(images), labels, label_smoothing=config.pretrain.label_smoothing)

    def note(_: int) -> dict[str, Any]:
        return {"val_accuracy": evaluate(model, decoded_by(data.val, config.pretrain.workers))}

    title = "train the head" if head_only else "train the original"
    train(model, data, loss, config.pretrain, after_epoch=note, checkpoint=checkpoint, title=title, log=log)
    model.requires_grad_(True)


def _claim(out: Path, config: Run) -> None:
    """Write the settings into `out`, or check that those there are the same (unless that run did nothing yet)."""
    path, own = out / "config.json", asdict(config)
    mine = (path.name, ".lock", f".{path.stem}.")  # the last begins what a kill left of its first write
    others = [found for found in out.iterdir() if not found.name.startswith(mine)] if out.is_dir() else []
    if others and not path.exists():
        raise BadConfig(f"{out} is not empty and holds no run: choose another --out")
    if others:
        found = records.read_json(path)
        measuring = {"rounds", "batch_size", "device"}  # what the stages' weights do not depend on
        other = sorted(
            key for key in {*own, *found} - measuring if _deciding(own.get(key)) != _deciding(found.get(key))
        )
        require(not other, f"{out} holds a run with other settings ({', '.join(other)}): choose another --out")
    else:
        records.write_json(path, own)


def _deciding(value: Any) -> Any:
    """A setting, without what may differ when a training is taken up."""
    return {key: one for key, one in value.items() if key not in FREE} if isinstance(value, dict) else value


def _command(config: Run) -> str:
    """The command line that repeats the run where its data is, settings that are defaults left out."""
    words = ["dslib", "run", "--model", config.model, "--data", config.data, "--k", str(config.k)]
    words += [
        f"--{flag.replace('_', '-')}" for flag in ("skip_corrupt", "single", "calibrate") if getattr(config, flag)
    ]
    default = Run(config.model, config.data, config.k, calibrate=config.calibrate)
    for name in ("weights", "image_size", "boundary", "batch_size", "rounds", "seed"):
        if getattr(config, name) != getattr(default, name):
            words += [f"--{name.replace('_', '-')}", str(getattr(config, name))]
    words += [
        word for key, value in config.options.items() for word in ("--model-option", f"{key}={json.dumps(value)}")
    ]
    for stage in ("pretrain", "search", "finetune"):
        own, usual = asdict(getattr(config, stage)), asdict(getattr(default, stage))
        changed = {key: value for key, value in own.items() if value != usual[key] and key not in ("k", "seed")}
        for key, value in changed.items():
            flag = f"{stage}-{key.replace('_', '-')}"
            words += [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return shlex.join([*words, "--out", "runs/x"])
