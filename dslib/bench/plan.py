"""How long the planner takes: `dslib bench plan`."""

from __future__ import annotations

import random
import time
from itertools import pairwise

import numpy as np

from ..errors import BadConfig
from ..measuring import this_machine
from ..planning import pareto, plan
from ..profiling import CostTable
from ..ranking import Importances
from ..records import Record, as_words, commit


def record_planner(sites: int = 50, budgets: int = 1000, instances: int = 20, seed: int = 0) -> Record:
    """Random importances and costs, of runs of two neighbours too; all plans that no other beats, and one for a budget.

    Args:
        sites: of each network.
        budgets: latencies that the plans are looked up for, evenly over what can be reached.
        instances: how many random networks.
        seed: of them.
    """
    if not min(sites, budgets, instances) > 0:
        raise BadConfig("expected one or more of each")
    rng, rows = random.Random(seed), []
    for _ in range(instances):
        found, cost = _random(sites, rng)
        began = time.perf_counter()
        front = pareto(found, cost)
        latencies = np.linspace(front[-1].latency, cost.total, budgets)
        within = np.searchsorted([-one.latency for one in front], -latencies - 1e-9)  # the slowest that is quick enough
        all_budgets = time.perf_counter() - began
        began = time.perf_counter()
        one = plan(found, cost, float(latencies[budgets // 2]))
        rows.append(
            {
                "plans": len(front),
                "distinct": len(set(within.tolist())),
                "all_budgets_s": all_budgets,
                "one_budget_s": time.perf_counter() - began,
                "removed": len(one.mask.removed),
            }
        )
    settings = {"sites": sites, "budgets": budgets, "instances": instances, "seed": seed}
    seconds = np.percentile([row["all_budgets_s"] for row in rows], [0, 50, 100]).tolist()
    values = {"all_budgets_s": dict(zip(("least", "median", "most"), seconds, strict=True)), "rows": rows}
    return Record("plan", f"dslib bench plan {as_words(settings)}", settings, values, this_machine(), commit())


def _random(sites: int, rng: random.Random) -> tuple[Importances, CostTable]:
    names = [f"site{i}" for i in range(sites)]
    runs = ["+".join(pair) for pair in pairwise(names)]
    found = Importances(
        {name: rng.random() for name in names},
        (),
        tuple(names),
        unit="nats of cross-entropy",
        runs={run: 2 * rng.random() for run in runs},
    )
    kept = {name: 1 + rng.random() for name in names}
    merged = {name: kept[name] * rng.uniform(0.3, 1.1) for name in names}
    joined = {run: sum(merged[name] for name in run.split("+")) * rng.uniform(0.4, 1.0) for run in runs}
    return found, CostTable(kept, kept, merged, sum(kept.values()), 1, 32, "cpu", "eager", runs=joined)
