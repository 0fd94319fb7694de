"""The whole way, from a network and a dataset to a merged network and a record; every stage can be taken up again.

What a stage made is kept in files and loaded ever after. A dry run (`trial`) takes a few real steps of
each training and says what the whole would take; it writes nothing.
"""

from __future__ import annotations

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
from .errors import BadConfig, Settings, ranged
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
from .sites import Mask, Sites, find_sites
from .training import FREE, Enough, Log, Train, claimed, evaluate, predict, processes, remove_state, top1, train

if TYPE_CHECKING:
    import pandas as pd

T = TypeVar("T")


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
class Run(Settings):
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
    batch_size: int = ranged(32, "1 or more")
    rounds: int = ranged(40, "1 or more")
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        """Hand k and seed down to the stages; check what needs no network."""
        super().__post_init__()
        activation(self.boundary)
        if self.calibrate and self.boundary:
            raise BadConfig("a calibrated network has no boundary activation: leave it out")
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
        processes.on_rank_zero(lambda: _claim(out, config))
        job = _Job(config, out, device, Log(out, tensorboard, echo))
        outcome = job.calibrate_first() if config.calibrate else job.train_from_fade()
        return processes.on_rank_zero(lambda: job.judge(*outcome))


Built = tuple[nn.Module, Recipe]
Outcome = tuple[Importances, Mask, tuple[str, ...], nn.Module, nn.Module]  # with sites merged; shrunk, and merged


class _Job:
    """A run in its folder: what a stage made is kept there, and loaded ever after.

    Made, it has the data, the original network, and what each of its sites costs.
    """

    def __init__(self, config: Run, out: Path, device: torch.device, log: Log) -> None:
        self.config, self.out, self.device, self.log = config, out, device, log
        tune_allocator()
        torch.manual_seed(config.seed)
        self.data = _data(config)
        self.model, self.recipe = self.network("original", self._original, together=True)
        self.model = _moved(self.model, device)
        self.sites = find_sites(self.model, self.data.image_size, config.single)
        self.sites.check_k(config.k)
        self.blocks = {site.name for site in self.sites if site.convolutions}  # a single activation has none to merge
        self.boundary = activation(config.boundary)
        self.cost = self.stage("cost", CostTable.load, self._costs)

    def train_from_fade(self) -> Outcome:
        """Search; let the activations of removed sites fade out in the finetuning; merge what is quicker merged."""
        found = self.stage("search", Importances.load, self._searched, together=True)
        mask = self._mask(found)
        merging = tuple(name for name in self.cost.worth_merging(mask) if name in self.blocks)
        recipe = replace(self.recipe, mask=dict(mask), boundary=self.config.boundary)
        small = self._finetuned(fade(self.model, mask, self.boundary, self.data.image_size), recipe)
        merged, _ = self.network("merged", lambda: recipe.merge_into(small, merging))
        return found, mask, merging, small, merged

    def calibrate_first(self) -> Outcome:
        """Rank; calibrate, which merges all that is removed; finetune that."""
        found = self.stage("search", Importances.load, self._ranked)
        mask = self._mask(found)
        merging = tuple(name for name in mask.removed if name in self.blocks)
        recipe = replace(self.recipe, mask=dict(mask), merged=merging)
        start, _ = self.network("calibrated", lambda: (self._calibrated(mask), recipe))
        small = self._finetuned(start.to(self.device), recipe)
        merged, _ = self.network("merged", lambda: (small, recipe))
        return found, mask, merging, small, merged

    def judge(
        self, found: Importances, mask: Mask, merging: tuple[str, ...], shrunk: nn.Module, merged: nn.Module
    ) -> records.Record:
        """Measure the networks and write the record; the states of trainings that ended go."""
        config = self.config
        networks = {"original": self.model, "shrunk": shrunk, "merged": merged.to(self.device)}
        values = {
            "k": mask.k,
            "removed": list(mask.removed),
            "merged": list(merging),
            "processes": processes.started(),
            "seconds": self._seconds(),
            **compare(networks, self.data, config.batch_size, config.rounds),
            "cost": asdict(self.cost),
            "found": found.as_json(),
            **records.read_json(self.out / "finetune.json"),
        }
        machine, commit = this_machine(self.device), records.commit()
        record = records.Record("run", _command(config), asdict(config), values, machine, commit)
        record.save(self.out / "record.json")
        for name in ("original", "search", "finetune"):
            remove_state(self._state(name))
        return record

    def stage(
        self,
        name: str,
        load: Callable[[Path], T],
        make: Callable[[], T],
        together: bool = False,
        save: Callable[[Path, Any], object] = lambda path, made: made.save(path),
    ) -> T:
        """What `load` reads from <name>.json; made and saved if it is not there.

        `together`: all processes make it, and all the same; else the first does, and the others load it.
        """
        path = self.out / f"{name}.json"
        if processes.on_rank_zero(path.exists):
            self.log.say(f"{name}: taken from {path}")
            return load(path)
        self.log.say(f"{name} ...")
        started = time.perf_counter()

        def keep(made: T) -> None:
            records.write_json(self.out / "seconds.json", self._seconds() | {name: time.perf_counter() - started})
            save(path, made)

        if together or processes.count() == 1:
            made = make()
            processes.on_rank_zero(lambda: keep(made))
            return made
        processes.on_rank_zero(lambda: keep(make()))
        return load(path)

    def network(self, name: str, make: Callable[[], Built], together: bool = False) -> Built:
        """The same for a network, which is in eval then, and its recipe."""
        load = partial(saving.load, trust=self.config.model)
        model, recipe = self.stage(name, load, make, together, lambda path, made: saving.save(path, *made))
        return model.eval(), recipe

    def _seconds(self) -> dict[str, float]:
        """Stage -> wall time in seconds of the call that ended it."""
        path = self.out / "seconds.json"
        return records.read_json(path) if path.exists() else {}

    def _state(self, training: str) -> Path:
        return self.out / f"{training}.partial.safetensors"

    def _original(self) -> Built:
        """The network to shrink, trained as far as its weights are not."""
        config, data = self.config, self.data
        model, trained, _ = _load(config, data, self.device)  # refuses a wrong k before hours of training
        if trained:
            self.log.say("the weights are for these classes: nothing is trained before the search")
        else:
            pretrain(model, data, config, config.weights != "none", self._state("original"), self.log)
        check_teacher(model, data)  # before it is saved as what to search and to learn from
        return model, Recipe(config.model, data.classes, data.image_size, dict(config.options))

    def _costs(self) -> CostTable:
        return profile(self.model, self.sites, self.config.batch_size, self.boundary)

    def _searched(self) -> Importances:
        return search(self.model, self.data, self.sites, self.cost, self.config.search, self._state("search"), self.log)

    def _ranked(self) -> Importances:
        images = self.data.train.first(RANKED_IMAGES, self.config.seed)
        self.log.say(f"ranking {len(self.sites.mergeable)} sites on {len(images)} images, one calibration each")
        return rank(self.model, self.sites, images, Calibrate(seed=self.config.seed))

    def _mask(self, found: Importances) -> Mask:
        mask = found.mask(self.config.k)
        processes.on_rank_zero(lambda: mask.save(self.out / "mask.json"))
        self.log.say(repr(mask))
        return mask

    def _calibrated(self, mask: Mask) -> nn.Module:
        images = self.data.train.first(CALIBRATION_IMAGES, self.config.seed)
        self.log.say(f"calibrating on {len(images)} images")
        return calibrate(self.model, mask, images, Calibrate(seed=self.config.seed)).model

    def _finetuned(self, start: nn.Module, recipe: Recipe) -> nn.Module:
        def make() -> Built:
            done = finetune(start, self.data, self.model, self.config.finetune, self._state("finetune"), self.log)
            processes.on_rank_zero(lambda: records.write_json(self.out / "finetune.json", {"history": done.history}))
            return done.model, recipe

        return self.network("shrunk", make, together=True)[0].to(self.device)


def _data(config: Run) -> Data:
    return processes.first_per_machine(lambda: load_data(config.data, config.image_size, config.skip_corrupt))


def _load(config: Run, data: Data, device: torch.device) -> tuple[nn.Module, bool, Sites]:
    """The network on its device, whether it is trained for the data's classes, and its sites."""
    loaded = load_model(config.model, data.classes, config.weights, config.options, config.seed)
    model = _moved(loaded.model, device)
    sites = find_sites(model, data.image_size, config.single)
    sites.check_k(config.k)
    return model, loaded.trained, sites


def _moved(model: nn.Module, device: torch.device) -> nn.Module:
    moved: nn.Module = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return moved


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
    if not out.is_dir() or all(found.name.startswith(mine) for found in out.iterdir()):
        records.write_json(path, own)
        return
    if not path.exists():
        raise BadConfig(f"{out} is not empty and holds no run: choose another --out")
    found = records.read_json(path)
    measuring = {"rounds", "batch_size", "device"}  # what the stages' weights do not depend on
    other = sorted(key for key in {*own, *found} - measuring if _deciding(own.get(key)) != _deciding(found.get(key)))
    if other:
        raise BadConfig(f"{out} holds a run with other settings ({', '.join(other)}): choose another --out")


def _deciding(value: Any) -> Any:
    """A setting, without what may differ when a training is taken up."""
    return {key: one for key, one in value.items() if key not in FREE} if isinstance(value, dict) else value


def _command(config: Run) -> str:
    """The command line that repeats the run where its data is, settings that are defaults left out."""
    usual = Run(config.model, config.data, config.k, calibrate=config.calibrate)
    always, flags = ("model", "data", "k"), ("skip_corrupt", "single", "calibrate")
    words = [_option(name, getattr(config, name)) for name in always]
    words += [_option(name, True) for name in flags if getattr(config, name)]
    for name in ("weights", "image_size", "boundary", "batch_size", "rounds", "seed"):
        if getattr(config, name) != getattr(usual, name):
            words.append(_option(name, getattr(config, name)))
    words += [_option("model_option", option) for option in records.as_options(config.options)]
    for stage in ("pretrain", "search", "finetune"):
        default = asdict(getattr(usual, stage))
        changed = {key: value for key, value in asdict(getattr(config, stage)).items() if value != default[key]}
        words += [_option(f"{stage}_{key}", value) for key, value in changed.items() if key not in ("k", "seed")]
    return " ".join(["dslib run", *words, "--out runs/x"])


def _option(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return f"--{'' if value else 'no-'}{name.replace('_', '-')}"
    return records.as_words({name: value})


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
    data = _data(config)
    model, trained, sites = _load(config, data, device)
    mask = Importances(dict.fromkeys(sites.mergeable, 1.0), sites.always_kept, sites.names).mask(config.k)
    rows = _Rows(model, data)
    if not trained:
        head_only, every = config.weights != "none", config.pretrain.epochs
        rows.train("original", config.pretrain, every, lambda log: pretrain(model, data, config, head_only, log=log))
        model.requires_grad_(True)
    if config.calibrate:
        middle = sites.mergeable[len(sites.mergeable) // 2 :][:1]
        alone = sites.mask([name for name in sites.names if name not in middle])
        rows.calibrate("ranking", alone, RANKED_IMAGES, len(sites.mergeable) + 1)
        rows.calibrate("calibration", mask, CALIBRATION_IMAGES, 1)
    else:
        costs = dict.fromkeys(sites.mergeable, 1.0)
        rows.train("search", config.search, 0, lambda log: search(model, data, sites, costs, config.search, log=log))
    make, tuning = shrink if config.calibrate else fade, config.finetune
    assert tuning is not None
    small = make(model, mask, activation(config.boundary), data.image_size)
    rows.train("finetune", tuning, tuning.epochs, lambda log: finetune(small, data, model, tuning, log=log))
    import pandas as pd

    return pd.DataFrame(rows.rows).T


class _Rows:
    """The rows of a trial of a network, on its device."""

    def __init__(self, model: nn.Module, data: Data) -> None:
        self.model, self.data, self.device = model, data, next(model.parameters()).device
        self.rows: dict[str, dict[str, Any]] = {}
        self._evaluation = self._time_evaluation()

    def train(self, name: str, config: Train, evaluations: int, work: Callable[[Log], object]) -> None:
        """A training with so many evaluations, timed by some of its steps; none if it has no step."""
        train = self.data.train
        check_batch_size(config.batch_size, train)
        workers = 0 if isinstance(train, Split) else train.workers if config.workers is None else config.workers
        steps = STEPS * max(1, workers)  # several rounds of all workers, which decode ahead
        try:
            work(Log(steps=min(steps, config.epochs * (len(train) // config.batch_size))))
        except Enough as trial:
            first = (len(trial.ended) - 1) // 3  # steps in which caches and workers warm up
            step = (trial.ended[-1] - trial.ended[first]) / (len(trial.ended) - 1 - first)
            self._add(name, config.batch_size, trial.steps, step, evaluations)

    def calibrate(self, name: str, mask: Mask, images: int, steps: int) -> None:
        """Calibrations on so many images each, timed by one on some of them."""
        images = min(images, len(self.data.train))
        some = self.data.train.first(min(images, IMAGES))
        began = time.perf_counter()
        calibrate(self.model, mask, some, progress=False)
        self._add(name, images, steps, (time.perf_counter() - began) * images / len(some))

    def _add(self, name: str, images: int, steps: int, step: float, evaluations: int | None = None) -> None:
        """A row: steps of so many images and seconds each, and evaluations."""
        took = 0.0 if evaluations is None else self._evaluation
        hours = (steps * step + (evaluations or 0) * took) / 3600
        gpu = self.device.type == "cuda"
        self.rows[name] = {
            "images": f"{images} x 3 x {self.data.image_size} x {self.data.image_size}",
            "steps": steps,
            "s/step": step,
            "images/s": images / step,
            "s/evaluation": took,
            "hours": hours,
            "GPU-hours": hours * processes.started() if gpu else "",
            "GiB": torch.cuda.max_memory_allocated(self.device) / 2**30 if gpu else peak_memory_gib(),
        }

    @torch.inference_mode()
    def _time_evaluation(self) -> float:
        """Seconds that an evaluation takes, from some images."""
        split = self.data.val
        size = min(len(split), IMAGES)
        self.model.eval()
        for _ in range(2):
            began = time.perf_counter()
            for images, _labels in split.batches(IMAGES // 8, torch.arange(size)):
                self.model(images.to(self.device)).cpu()
        return (time.perf_counter() - began) * len(split) / size / processes.started()
