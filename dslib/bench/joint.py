"""Is a narrower network with more activations better, or a wider one with fewer, within one predicted latency?"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from ..calibrating import Calibrate
from ..data import Data, Split
from ..errors import BadModel
from ..models import load_model, save_tensors
from ..planning import plan
from ..profiling import CostTable, profile
from ..ranking import Importance, Importances, importance
from ..records import Record
from ..running import CALIBRATED, Run, pretrain
from ..sites import find_sites
from ..training import evaluate
from .benchmark import Benchmark, Context, Row, Steps, Values
from .plans import judge, outcome, point, quiet
from .settings import ON_RUNTIMES, BenchSettings, setting


@dataclass(frozen=True)
class Widths(BenchSettings):
    """Each width's best plan at each budget; which width to take is chosen on training images.

    Args:
        model: its name; each width is given as the option `width_mult`.
        widths: of the networks, which are trained from nothing.
        shares: budgets, of the widest network's latency.
        seeds: of importances, calibration and finetuning; each network is trained once, so that their spread says
            nothing of what another training would give.
        pretrain_epochs: of each network from nothing.
        epochs: of the finetuning, from a calibrated start.
        count: images to calibrate on, to take importances on, and to hold back for the losses.
        batch_size: that latencies are measured at.
    """

    model: str = "mobilenet_v2"
    options: dict[str, Any] | None = setting(None, option="model_option")
    data: str = "cifar10"
    image_size: int | None = None
    widths: tuple[float, ...] = setting((1.0, 0.75, 0.5, 0.35), "more than 0", option="width", least=1)
    shares: tuple[float, ...] = setting((0.8, 0.6, 0.45, 0.3), "more than 0, 1 at most", option="share", least=1)
    seeds: int = setting(3, "1 or more")
    pretrain_epochs: int = 10
    epochs: int = 1
    count: int = setting(1024, "1 or more")
    batch_size: int = setting(32, "1 or more")
    runtime: str = setting("eager", ON_RUNTIMES)
    device: str = "auto"


def answer(config: Widths, context: Context[Widths]) -> Steps:
    """Each width's training, costs and importances; its plan at each budget; how quick each plan is.

    Weights stand in a folder beside the record.
    """
    data, held = context.data.hold_back(config.count)
    with _beside(context.out) as folder:
        networks: dict[float, _Network] = {}
        for width in config.widths:
            networks[width] = _Network(width, context, data, held, folder / f"width-{width:g}.safetensors")
            begun = yield Row({"trained": width}, networks[width].train)
            if "accuracy" not in begun:
                del networks[width]
        if len(networks) < len(config.widths):
            networks = {}
        for network in networks.values():
            yield from network.prepare()
        for seed in range(config.seeds):
            for network in networks.values():
                yield from network.rank(seed)
            for share in config.shares:
                for width in config.widths:
                    if width in networks:
                        yield from networks[width].judge(share, seed, networks[max(config.widths)])
                    else:
                        yield Row({"width": width, "share": share, "seed": seed}, None)


@contextmanager
def _beside(out: Path | None) -> Iterator[Path]:
    """The folder of the weights: beside the record, or for this run alone."""
    if out is not None:
        yield out.with_suffix("")
    else:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)


class _Network:
    """A trained network of one width: profiled and ranked."""

    def __init__(self, width: float, context: Context[Widths], data: Data, held: Split, path: Path) -> None:
        self.width, self.context, self.data, self.held, self.path = width, context, data, held, path
        self.config = context.config
        self.options = {**(self.config.options or {}), "width_mult": width}
        self.found: dict[int, Importances] = {}

    def train(self) -> Values:
        """From nothing; the weights are kept."""
        torch.manual_seed(0)
        config = self.config
        model = load_model(config.model, self.data.classes, "none", self.options).model.to(self.context.device)
        run = Run(config.model, config.data, 1, weights="none", options=self.options)
        run = replace(run, pretrain=replace(run.pretrain, epochs=config.pretrain_epochs))
        pretrain(model, self.data, run, head_only=False)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(self.path, model.state_dict())
        return {"accuracy": evaluate(model, self.data.val), "val_images": len(self.data.val)}

    def prepare(self) -> Steps:
        """The network, its sites and their costs."""
        if not self.path.is_file():
            raise BadModel(
                f"{self.path}: expected the weights that the record's row is of, found none: remove the "
                "record, or give another file"
            )
        config = self.config
        model = load_model(config.model, self.data.classes, str(self.path), self.options).model
        self.network = model.to(self.context.device).eval()
        self.sites = find_sites(self.network, self.data.image_size)
        profiled = partial(profile, self.network, self.sites, config.batch_size, runtime=config.runtime)
        costs = yield Row(
            {"cost": self.width}, lambda: {"table": asdict(quiet(profiled, self.context.echo))}, short=True
        )
        self.cost = CostTable(**costs["table"])

    def rank(self, seed: int) -> Steps:
        """The importances, by calibrating each site away."""
        settings = Importance(count=self.config.count, calibrate=Calibrate(seed=seed), seed=seed)
        ranked = partial(importance, self.network, self.data, self.sites, settings)
        row = yield Row({"importance": self.width, "seed": seed}, lambda: {"table": ranked().as_json()})
        if "table" in row:
            self.found[seed] = Importances.of(row["table"])

    def judge(self, share: float, seed: int, widest: _Network) -> Steps:
        """The best plan at a budget, measured."""
        budget = share * widest.cost.total
        planned = (self.network, self.sites, self.cost, self.config.runtime)
        key, make = {"width": self.width, "share": share, "seed": seed}, partial(self._judged, budget, seed)
        row = yield from point(key, make, planned, {"width": self.width}, widest.network)
        kept = f"{row['k']} of {len(self.sites)} sites kept, " if "accuracy" in row else ""
        told = f"width {self.width:g}, {share:g} of the latency, seed {seed}"
        self.context.echo(f"{told}: {kept}{outcome(row)}")

    def _judged(self, budget: float, seed: int) -> Values:
        found, config = self.found[seed], self.config
        best = plan(found, self.cost, budget)
        loss = found.base_loss + sum(found.scores[name] for name in best.mask.removed)
        settings, images = (
            replace(CALIBRATED, epochs=config.epochs, seed=seed),
            self.data.train.first(config.count, seed),
        )
        row = judge(self.network, best, self.data, self.cost, settings, images, self.held)
        return {"predicted_loss": loss, **row}


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


BENCHMARK = Benchmark("Which activations?", Widths, answer, selecting=("shares", "seeds"), idle=True)
