"""A narrower network with more activations, or a wider one with fewer? `dslib bench joint`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from ..calibrating import Calibrate
from ..data import Data, Split, load_data
from ..errors import BadConfig, BadModel
from ..measuring import pick_device, this_machine
from ..models import load_model, save_tensors
from ..planning import plan
from ..profiling import CostTable, profile
from ..ranking import Importance, Importances, importance
from ..records import Record, as_options, as_words, commit
from ..running import CALIBRATED, Run, pretrain
from ..sites import Plan, find_sites
from ..training import evaluate
from .judging import hold_back, judge, quiet, timed
from .rows import Rows


@dataclass(frozen=True)
class Widths:
    """What is compared.

    Args:
        model, options: as for `load_model`; each width is given as the option `width_mult`.
        data, image_size: as for `load_data`.
        widths: of the networks, which are trained from nothing.
        shares: latency budgets, of the widest network's latency.
        seeds: of importances, calibration and finetuning; each network is trained once, so that their spread says
            nothing of what another training would give.
        pretrain_epochs, epochs: of the training from nothing, and of the finetuning from a calibrated start.
        count: images to calibrate on, to take importances on, and to hold back for the losses.
        batch_size, runtime: that latencies are measured at.
    """

    model: str = "mobilenet_v2"
    options: dict[str, Any] | None = None
    data: str = "cifar10"
    image_size: int | None = None
    widths: tuple[float, ...] = (1.0, 0.75, 0.5, 0.35)
    shares: tuple[float, ...] = (0.8, 0.6, 0.45, 0.3)
    seeds: int = 3
    pretrain_epochs: int = 10
    epochs: int = 1
    count: int = 1024
    batch_size: int = 32
    runtime: str = "eager"
    device: str = "auto"

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not min(self.seeds, self.count, self.batch_size) > 0:
            raise BadConfig("expected one or more of each")
        if not (bool(self.widths) and min(self.widths) > 0):
            raise BadConfig(f"widths: expected more than 0, found {self.widths}")
        good = bool(self.shares) and all(0 < share <= 1 for share in self.shares)
        if not good:
            raise BadConfig(f"shares: expected more than 0, 1 at most, found {self.shares}")


def record_joint(
    widths: Widths | None = None,
    hours: float | None = None,
    out: Path | None = None,
    echo: Callable[[str], object] = print,
) -> Record:
    """Each width's best plan at each budget; which width to take is chosen on training images (`chosen`).

    Args:
        widths: what is compared.
        hours: no row is begun after so many; those that are missing are told.
        out: the record's file; rows that stand there are not made again. Weights stand in a folder beside it.
        echo: is told each row.
    """
    config = widths or Widths()
    data, held = hold_back(load_data(config.data, config.image_size), config.count)
    where = pick_device(config.device)
    settings = {
        **asdict(config),
        "image_size": data.image_size,
        "device": str(where),
        "options": as_options(config.options),
    }
    blank = Record("joint", _command(settings), settings, {}, this_machine(where), commit())
    rows = Rows(blank, out, idle=True, selecting=("shares", "seeds"), hours=hours)
    with tempfile.TemporaryDirectory() as beside:
        folder = Path(beside) if out is None else out.with_suffix("")
        paths = {width: folder / f"width-{width:g}.safetensors" for width in config.widths}
        for width, path in paths.items():
            rows.add({"trained": width}, partial(_train, config, width, data, where, path))
        begun = {} if rows.missing else paths
        networks = {
            width: _Network(config, width, data, held, where, rows, path, echo) for width, path in begun.items()
        }
        for seed in range(config.seeds):
            for network in networks.values():
                network.rank(seed)
            for share in config.shares:
                for width in config.widths:
                    if width in networks:
                        echo(networks[width].judge(share, seed, networks[max(config.widths)]))
                    else:
                        rows.miss({"width": width, "share": share, "seed": seed})
    for missing in rows.missing:
        echo(f"missing: {missing} (the same command with the same --out makes it)")
    return rows.record


def chosen(rows: pd.DataFrame, by: str = "held_finetuned") -> pd.DataFrame:
    """For each budget and seed the best width.

    Args:
        rows: from `results`.
        by: on training images that were held back from everything `held_finetuned`, the finetuned network's accuracy,
            or `held_accuracy` and `held_loss` of the calibrated one; or `predicted_loss`, the network's own and the sum
            of importances, on images that it was trained on.
    """
    better = -rows[by] if by.endswith("loss") else rows[by]
    return rows.loc[better.groupby([rows["share"], rows["seed"]]).idxmax()]


def behind(rows: pd.DataFrame, by: str = "held_finetuned") -> pd.DataFrame:
    """For each budget: accuracy of what was chosen, of the best single width, and by how much the choice is behind it.

    Args:
        rows, by: as for `chosen`.
    Returns:
        Means over seeds; `spread` is the larger standard deviation of the two.
    """
    own = chosen(rows, by).groupby("share")["accuracy"].agg(["mean", "std"])
    each = rows.groupby(["share", "width"])["accuracy"].agg(["mean", "std"])
    best = each.loc[each.groupby("share")["mean"].idxmax()].reset_index("width")
    return pd.DataFrame(
        {
            "chosen": own["mean"],
            "best width": best["width"],
            "best": best["mean"],
            "behind": best["mean"] - own["mean"],
            "spread": pd.concat([own["std"], best["std"]], axis=1).max(axis=1),
        }
    )


def results(record: Record) -> pd.DataFrame:
    """A record's rows of accuracies, each with its plan's timing."""
    rows = record.values["rows"]
    timings = {(row["width"], row["timed"]): row for row in rows if "measured_speedup" in row}
    found = [row for row in rows if "accuracy" in row and "share" in row and (row["width"], row["plan"]) in timings]
    return pd.DataFrame([{**timings[row["width"], row["plan"]], **row} for row in found])


def _command(config: dict[str, Any]) -> str:
    names = {"widths": "width", "shares": "share", "options": "model_option"}
    return f"dslib bench joint {as_words({names.get(key, key): value for key, value in config.items()})}"


def _options(config: Widths, width: float) -> dict[str, Any]:
    return {**(config.options or {}), "width_mult": width}


def _train(config: Widths, width: float, data: Data, where: torch.device, path: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    options = _options(config, width)
    model = load_model(config.model, data.classes, "none", options).model.to(where)
    run = Run(config.model, config.data, 1, weights="none", options=options)
    pretrain(model, data, replace(run, pretrain=replace(run.pretrain, epochs=config.pretrain_epochs)), head_only=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(path, model.state_dict())
    return {"accuracy": evaluate(model, data.val), "val_images": len(data.val)}


class _Network:
    """A trained network of one width: profiled and ranked."""

    def __init__(
        self,
        config: Widths,
        width: float,
        data: Data,
        held: Split,
        where: torch.device,
        rows: Rows,
        path: Path,
        echo: Callable[[str], object],
    ) -> None:
        self.config, self.width, self.data, self.held, self.rows = config, width, data, held, rows
        if not path.is_file():
            raise BadModel(
                f"{path}: expected the weights that the record's row is of, found none: remove the "
                "record, or give another file"
            )
        self.network = load_model(config.model, data.classes, str(path), _options(config, width)).model.to(where).eval()
        self.sites = find_sites(self.network, data.image_size)
        profiled = partial(profile, self.network, self.sites, config.batch_size, runtime=config.runtime)
        row = rows.add({"cost": width}, lambda: {"table": asdict(quiet(profiled, echo))}, short=True)
        self.cost = CostTable(**row["table"])
        self.found: dict[int, Importances] = {}

    def rank(self, seed: int) -> None:
        """The importances, by calibrating each site away."""
        settings = Importance(count=self.config.count, calibrate=Calibrate(seed=seed), seed=seed)
        key = {"importance": self.width, "seed": seed}
        row = self.rows.add(key, lambda: {"table": importance(self.network, self.data, self.sites, settings).as_json()})
        if "table" in row:
            self.found[seed] = Importances.of(row["table"])

    def judge(self, share: float, seed: int, widest: _Network) -> str:
        """The best plan at a budget, measured; one line about it."""
        point = {"width": self.width, "share": share, "seed": seed}

        def make() -> dict[str, Any]:
            found, config = self.found[seed], self.config
            best = plan(found, self.cost, share * widest.cost.total)
            images = self.data.train.first(config.count, seed)
            loss = found.base_loss + sum(found.scores[name] for name in best.mask.removed)
            settings = replace(CALIBRATED, epochs=config.epochs, seed=seed)
            row = judge(self.network, best, self.data, self.cost, settings, images, self.held)
            return {"predicted_loss": loss, **row}

        row = self.rows.add(point, make, keep_errors=True)
        what = f"width {self.width:g}, {share:g} of the latency, seed {seed}"
        if "accuracy" not in row:
            return f"{what}: {row.get('error', 'not begun')}"
        best = Plan(self.sites.mask(set(self.sites.names) - set(row["removed"])), row["runs"], row.get("dropped", ()))
        time = partial(timed, self.network, best, self.cost, self.config.runtime, widest.network)
        row = {**self.rows.add({"timed": row["plan"], "width": self.width}, time, short=True), **row}
        return (
            f"{what}: {row['k']} of {len(self.sites)} sites kept, {row['measured_speedup']:.2f} times as fast, "
            f"accuracy {row['accuracy_before']:.2%}, finetuned {row['accuracy']:.2%}"
        )
