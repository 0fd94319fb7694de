"""How long does the planner take, for all budgets and for one?"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ..planning import pareto, plan
from ..profiling import CostTable
from ..ranking import Importances
from ..records import Record
from .benchmark import Benchmark, Context, Values
from .settings import BenchSettings, setting


@dataclass(frozen=True)
class Planner(BenchSettings):
    """Random importances and costs, of runs of two neighbours too; all plans that no other beats, and one for a budget.

    Args:
        sites: of each random network.
        budgets: latencies that the plans are looked up for, evenly over what can be reached.
        instances: random networks.
        seed: of them.
    """

    sites: int = setting(50, "1 or more")
    budgets: int = setting(1000, "1 or more")
    instances: int = setting(20, "1 or more")
    seed: int = 0


def answer(config: Planner, _: Context[Planner]) -> Values:
    """Seconds to plan for all budgets, least, median and most; a row for each network."""
    rng, rows = random.Random(config.seed), []
    for _number in range(config.instances):
        found, cost = _random(config.sites, rng)
        began = time.perf_counter()
        front = pareto(found, cost)
        latencies = np.linspace(front[-1].latency, cost.total, config.budgets)
        within = np.searchsorted([-one.latency for one in front], -latencies - 1e-9)  # the slowest that is quick enough
        all_budgets = time.perf_counter() - began
        began = time.perf_counter()
        one = plan(found, cost, float(latencies[config.budgets // 2]))
        rows.append(
            {
                "plans": len(front),
                "distinct": len(set(within.tolist())),
                "all_budgets_s": all_budgets,
                "one_budget_s": time.perf_counter() - began,
                "removed": len(one.mask.removed),
            }
        )
    seconds = np.percentile([row["all_budgets_s"] for row in rows], [0, 50, 100]).tolist()
    return {"all_budgets_s": dict(zip(("least", "median", "most"), seconds, strict=True)), "rows": rows}


def _random(sites: int, rng: random.Random) -> tuple[Importances, CostTable]:
    names = [f"site{i}" for i in range(sites)]
    runs = ["+".join(pair) for pair in pairwise(names)]
    scores = {name: rng.random() for name in names}
    joint = {run: 2 * rng.random() for run in runs}
    found = Importances(scores, (), tuple(names), unit="nats of cross-entropy", runs=joint)
    kept = {name: 1 + rng.random() for name in names}
    merged = {name: kept[name] * rng.uniform(0.3, 1.1) for name in names}
    joined = {run: sum(merged[name] for name in run.split("+")) * rng.uniform(0.4, 1.0) for run in runs}
    return found, CostTable(kept, kept, merged, sum(kept.values()), 1, 32, "cpu", "eager", runs=joined)


def _told(record: Record) -> Iterator[str]:
    seconds, plans = record.values["all_budgets_s"], [row["plans"] for row in record.values["rows"]]
    yield (
        f"all budgets of a network: {seconds['median']:.2f} s (at most {seconds['most']:.2f}), "
        f"{min(plans)} to {max(plans)} plans that no other beats"
    )


BENCHMARK = Benchmark("Which activations?", Planner, answer, _told)
