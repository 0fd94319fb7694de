"""The whole way, from a network and a dataset to a merged network and a record; every stage can be taken up again.

What was made once is kept in files and loaded ever after (`Stages`). A dry run (`trial`) takes a few real steps of
each training and says what the whole would take; it writes nothing.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import records, saving
from .algebra import fold
from .calibrating import Calibrate, calibrate
from .data import Data, Split, check_batch_size, decoded_by, load_data
from .errors import BadConfig
from .finetuning import Finetune, check_teacher, finetune
from .measuring import (
    count_macs,
    count_parameters,
    measure,
    peak_memory_gib,
    pick_device,
    this_machine,
    tune_allocator,
    use_precision,
)
from .models import find_head, load_model
from .profiling import CostTable, profile
from .ranking import Importances, rank
from .saving import Recipe, activation
from .searching import Search, search
from .shrinking import fade, shrink
from .sites import Mask, find_sites
from .training import FREE, Enough, Log, Train, claimed, evaluate, predict, processes, remove_state, top1, train

if TYPE_CHECKING:
    import pandas as pd

T = TypeVar("T")


class Stages:
    """Results kept in files of a folder.

    Args:
        out: the folder.
        echo: is told of every stage.
        model: name of the network that they are of.
    """

    def __init__(self, out: Path, echo: Callable[[str], None], model: str) -> None:
        self.out, self.echo, self._model = out, echo, model

    def file(self, name: str, load: Callable[[Path], Any], make: Callable[[], Any], together: bool = False) -> Any:
        """What `load` reads from <name>.json; made, and saved by its own `save`, if it is not there.

        `together`: all processes make it, and all the same; else the first does.
        """
        return self._once(name, load, make, lambda path, made: made.save(path), together)

    def network(
        self, name: str, make: Callable[[], tuple[nn.Module, Recipe]], together: bool = False
    ) -> tuple[nn.Module, Recipe]:
        """The same for a network and its recipe."""
        load = partial(saving.load, trust=self._model)
        model, recipe = self._once(name, load, make, lambda path, made: saving.save(path, *made), together)
        return model.eval(), recipe

    def seconds(self) -> dict[str, float]:
        """Stage -> wall time in seconds of the call that ended it."""
        path = self.out / "seconds.json"
        return records.read_json(path) if path.exists() else {}

    def _once(
        self,
        name: str,
        load: Callable[[Path], T],
        make: Callable[[], T],
        save: Callable[[Path, T], Any],
        together: bool,
    ) -> T:
        path = self.out / f"{name}.json"
        if processes.on_rank_zero(path.exists):
            self.echo(f"{name}: taken from {path}")
            return load(path)
        self.echo(f"{name} ...")
        started = time.perf_counter()

        def keep(made: T) -> None:
            records.write_json(self.out / "seconds.json", self.seconds() | {name: time.perf_counter() - started})
            save(path, made)

        if together or processes.count() == 1:
            made = make()
            processes.on_rank_zero(lambda: keep(made))
            return made
        processes.on_rank_zero(lambda: keep(make()))
        return load(path)


def compare(networks: Mapping[str, nn.Module], data: Data, batch_size: int, rounds: int) -> dict[str, Any]:
    """Accuracy, cost and latency of the original and the merged network, and how well merged equals shrunk.

    Latency is measured in turns, with BatchNorm folded on both sides.

    Args:
        networks: named original, shrunk and merged.
        data: its validation split gives the accuracies.
        batch_size: at which latency is measured.
        rounds: measurements of each.
    """
    shape = (3, data.image_size, data.image_size)
    device = next(networks["original"].parameters()).device
    images = torch.randn(batch_size, *shape, device=device).contiguous(memory_format=torch.channels_last)
    with use_precision(None):  # what is called fp32 here is fp32
        logits = {name: predict(network, data.val) for name, network in networks.items()}
        folded = {name: fold(networks[name], images) for name in ("original", "merged")}
        timing = measure(folded, images, rounds)
    rows = {
        name: {
            "accuracy": top1(logits[name], data.val),
            "macs": count_macs(network, shape),
            "parameters": count_parameters(network),
            **timing.frame.loc[name].to_dict(),
        }
        for name, network in folded.items()
    }
    ratio, low, high = timing.speedup("merged", over="original")
    return {
        "networks": rows,
        "speedup": {"ratio_of_medians": ratio, "q25": low, "q75": high, "rounds": rounds},
        "batch_size": timing.batch_size,
        "image_size": data.image_size,
        "runtime": timing.runtime,
        "val_images": len(data.val),
        "shrunk_accuracy": top1(logits["shrunk"], data.val),
        **difference(logits["shrunk"], logits["merged"]),
    }


def difference(a: Tensor, b: Tensor) -> dict[str, float]:
    """How far two networks' logits (N, classes) differ: relative to the largest, and in top-1.

    An image whose two best logits are closer than 1e-4 in `a` has no clear top-1 and is not counted.
    """
    best = a.topk(2, dim=1).values
    clear = best[:, 0] - best[:, 1] >= 1e-4
    return {
        "largest_relative_difference": ((a - b).abs().max() / a.abs().max()).item(),
        "top1_differences": int((a.argmax(1) != b.argmax(1))[clear].sum()),
        "top1_unclear": int((~clear).sum()),
    }


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
        if self.calibrate and self.boundary:
            raise BadConfig("a calibrated network has no boundary activation: leave it out")
        if not self.rounds > 0:
            raise BadConfig(f"rounds: expected 1 or more, found {self.rounds}")
        if not self.batch_size > 0:
            raise BadConfig(f"batch_size: expected 1 or more, found {self.batch_size}")
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
    processes.on_rank_zero(lambda: _claim(out, config))
    tune_allocator()
    torch.manual_seed(config.seed)
    data = processes.first_per_machine(lambda: load_data(config.data, config.image_size, config.skip_corrupt))
    stage = Stages(out, log.say, config.model)
    model, recipe = stage.network("original", lambda: _original(config, data, device, out, log), together=True)
    model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    sites = find_sites(model, data.image_size, config.single)
    sites.check_k(config.k)
    boundary = activation(config.boundary)
    cost = stage.file("cost", CostTable.load, lambda: profile(model, sites, config.batch_size, boundary))
    settings = Calibrate(seed=config.seed)

    def stage1() -> Importances:
        if config.calibrate:
            images = data.train.first(RANKED_IMAGES, config.seed)
            log.say(f"ranking {len(sites.mergeable)} sites on {len(images)} images, one calibration each")
            return rank(model, sites, images, settings)
        return search(model, data, sites, cost, config.search, out / "search.partial.safetensors", log)

    found = stage.file("search", Importances.load, stage1, together=not config.calibrate)
    mask = found.mask(config.k)
    processes.on_rank_zero(lambda: mask.save(out / "mask.json"))
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
        processes.on_rank_zero(lambda: records.write_json(out / "finetune.json", {"history": done.history}))
        return done.model, shrunk_recipe

    small, _ = stage.network("shrunk", stage2, together=True)
    merged, _ = stage.network(
        "merged", lambda: (small, shrunk_recipe) if config.calibrate else shrunk_recipe.merge_into(small, merging)
    )
    networks = {"original": model, "shrunk": small.to(device), "merged": merged.to(device)}

    def judged() -> records.Record:
        values = {
            "k": mask.k,
            "removed": list(mask.removed),
            "merged": list(merging),
            "processes": processes.started(),
            "seconds": stage.seconds(),
            **compare(networks, data, config.batch_size, config.rounds),
            "cost": asdict(cost),
            "found": found.as_json(),
            **records.read_json(out / "finetune.json"),
        }
        record = records.Record("run", _command(config), asdict(config), values, this_machine(device), records.commit())
        record.save(out / "record.json")
        for name in ("original", "search", "finetune"):
            remove_state(out / f"{name}.partial.safetensors")
        return record

    return processes.on_rank_zero(judged)


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
        if other:
            raise BadConfig(f"{out} holds a run with other settings ({', '.join(other)}): choose another --out")
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


STEPS, IMAGES = 6, 512  # real steps of each training; images of the evaluation that is timed


def trial(config: Run) -> pd.DataFrame:
    """One row a training of the run: its steps, and how long it and its evaluations will take on this machine.

    Columns: images (of a step, as shape), steps, s/step (of the later two thirds, the loader's time included),
    images/s, s/evaluation, hours, GPU-hours (on a GPU, of all processes), GiB (the largest memory so far: of the GPU,
    or of this process). With `calibrate`, the ranking and the calibration of the plan have a row each too, a step of
    which is one calibration: the middle site's is timed for the ranking, the plan's on some of its images.

    Raises:
        DslibError: what the run would raise before it trains.
    """
    device = processes.start(pick_device(config.device))
    tune_allocator()
    data = processes.first_per_machine(lambda: load_data(config.data, config.image_size, config.skip_corrupt))
    loaded = load_model(config.model, data.classes, config.weights, config.options, config.seed)
    model = loaded.model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    sites = find_sites(model, data.image_size, config.single)
    sites.check_k(config.k)
    mask = Importances(dict.fromkeys(sites.mergeable, 1.0), sites.always_kept, sites.names).mask(config.k)
    took = _evaluation(model, data)
    rows: dict[str, Any] = {}

    def tried(name: str, stage: Train, evaluations: int, work: Callable[[Log], object]) -> None:
        check_batch_size(stage.batch_size, data.train)
        steps = min(_enough(stage, data), stage.epochs * (len(data.train) // stage.batch_size))
        try:
            if steps:
                work(Log(steps=steps))
        except Enough as trial:
            first = (len(trial.ended) - 1) // 3  # steps in which caches and workers warm up
            step = (trial.ended[-1] - trial.ended[first]) / (len(trial.ended) - 1 - first)
            rows[name] = _row(stage.batch_size, data, trial.steps, step, device, evaluations, took)

    if not loaded.trained:
        head_only = config.weights != "none"
        tried(
            "original",
            config.pretrain,
            config.pretrain.epochs,
            lambda log: pretrain(model, data, config, head_only, log=log),
        )
        model.requires_grad_(True)
    if config.calibrate:
        middle = sites.mergeable[len(sites.mergeable) // 2 :][:1]
        alone = sites.mask([name for name in sites.names if name not in middle])
        for name, plan, count, steps in (
            ("ranking", alone, RANKED_IMAGES, len(sites.mergeable) + 1),
            ("calibration", mask, CALIBRATION_IMAGES, 1),
        ):
            count = min(count, len(data.train))
            rows[name] = _row(count, data, steps, _calibration(model, plan, data, count), device)
    else:
        costs = dict.fromkeys(sites.mergeable, 1.0)
        tried("search", config.search, 0, lambda log: search(model, data, sites, costs, config.search, log=log))
    make = shrink if config.calibrate else fade
    small = make(model, mask, activation(config.boundary), data.image_size)
    assert config.finetune is not None
    stage = config.finetune
    tried("finetune", stage, stage.epochs, lambda log: finetune(small, data, model, stage, log=log))
    import pandas as pd

    return pd.DataFrame(rows).T


def _row(
    images: int, data: Data, steps: int, step: float, device: torch.device, evaluations: int = 0, took: float = 0.0
) -> dict[str, Any]:
    """A row: steps of so many images and seconds each, and evaluations that take `took` seconds."""
    hours = (steps * step + evaluations * took) / 3600
    gpu = device.type == "cuda"
    memory = torch.cuda.max_memory_allocated(device) / 2**30 if gpu else peak_memory_gib()
    return {
        "images": f"{images} x 3 x {data.image_size} x {data.image_size}",
        "steps": steps,
        "s/step": step,
        "images/s": images / step,
        "s/evaluation": took,
        "hours": hours,
        "GPU-hours": hours * processes.started() if gpu else "",
        "GiB": memory,
    }


def _enough(config: Train, data: Data) -> int:
    """Steps that show how quick a training is: with workers that decode ahead, several rounds of all of them."""
    if isinstance(data.train, Split):
        return STEPS
    workers = data.train.workers if config.workers is None else config.workers
    return STEPS * max(1, workers)


def _calibration(model: torch.nn.Module, mask: Mask, data: Data, count: int) -> float:
    """Seconds that a calibration on so many images takes, from one on some of them."""
    some = data.train.first(min(count, IMAGES))
    began = time.perf_counter()
    calibrate(model, mask, some, progress=False)
    return (time.perf_counter() - began) * count / len(some)


@torch.inference_mode()
def _evaluation(model: torch.nn.Module, data: Data) -> float:
    """Seconds that an evaluation takes, from some images."""
    size, device = min(len(data.val), IMAGES), next(model.parameters()).device
    model.eval()
    for _ in range(2):
        began = time.perf_counter()
        for images, _labels in data.val.batches(IMAGES // 8, torch.arange(size)):
            model(images.to(device)).cpu()
    return (time.perf_counter() - began) * len(data.val) / size / processes.started()
