"""Planning: the best plan under a latency, against every possible plan; bad tables and budgets."""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dslib
from dslib import planning
from dslib.errors import BadConfig, BadRecord, DslibError, MaskMismatch
from dslib.measuring.latency import Timing
from dslib.models.weights import save_tensors
from dslib.planning import for_speedup, joint, pareto, plan
from dslib.profiling import CostTable
from dslib.ranking import Importances


def tables(losses, savings, run_losses=(), run_savings=(), run_length=2, always=(), drops=()):
    """An importance and a cost table of sites s0, s1, ...; run i begins at site i; some blocks may be dropped."""
    names = [f"s{i}" for i in range(len(losses))]
    free = [name for name in names if name not in always]
    kept, total = 10.0, 10.0 * len(names) + 5
    runs = {
        "+".join(names[i : i + run_length]): i
        for i in range(len(run_losses))
        if set(names[i : i + run_length]) <= set(free)
    }
    cost = CostTable(
        dict.fromkeys(free, kept),
        {n: kept - savings[names.index(n)] + 1 for n in free},
        {n: kept - savings[names.index(n)] for n in free},
        total,
        1,
        32,
        "cpu",
        "eager",
        runs={run: run_length * kept - run_savings[i] for run, i in runs.items()},
    )
    found = Importances(
        {n: losses[names.index(n)] for n in free},
        tuple(always),
        tuple(names),
        unit="nats of cross-entropy",
        runs={run: run_losses[i] for run, i in runs.items()},
        dropped={name: loss for name, loss in zip(names, drops, strict=False) if name in free},
    )
    return found, cost


def every_plan(found, cost):
    """(latency, loss) of each way to keep, remove, drop or join the sites."""
    order, results = found.sites, []

    def extend(place, latency, loss):
        if place == len(order):
            results.append((latency, loss))
            return
        name = order[place]
        extend(place + 1, latency, loss)
        if name in found.scores:
            extend(place + 1, latency - cost.kept[name] + cost.merged[name], loss + found.scores[name])
        if name in found.dropped:
            extend(place + 1, latency - cost.kept[name], loss + found.dropped[name])
        for run in found.runs:
            names = run.split("+")
            if names[0] == name and run in cost.runs:
                saved = sum(cost.kept[n] for n in names) - cost.runs[run]
                extend(place + len(names), latency - saved, loss + found.runs[run])

    extend(0, cost.total, 0.0)
    return results


numbers = st.lists(st.floats(-0.5, 3, allow_nan=False), min_size=12, max_size=12)


@settings(deadline=None, max_examples=200)
@given(
    st.integers(1, 12),
    numbers,
    numbers,
    numbers,
    numbers,
    st.integers(2, 3),
    st.booleans(),
    numbers,
    st.integers(0, 7),
    st.floats(0, 1),
)
def test_the_plan_is_the_best_of_all(n, losses, savings, run_losses, run_savings, length, runs, drops, some, share):
    count = max(n - length + 1, 0) if runs and n <= 10 else 0
    always = ("s1",) if n > 3 else ()
    found, cost = tables(
        losses[:n],
        savings[:n],
        run_losses[:count],
        [2 * s for s in run_savings[:count]],
        length,
        always,
        drops[: min(n, some)] if n <= 8 else (),
    )
    ways = every_plan(found, cost)
    quickest = min(latency for latency, _ in ways)
    budget = quickest + share * (cost.total - quickest) + 1e-6
    best = plan(found, cost, budget)
    loss = sum(found.scores[g[0]] if len(g) == 1 else found.runs["+".join(g)] for g in best.groups)
    loss += sum(found.dropped[name] for name in best.dropped)
    assert cost.predict(best, merged=True) <= budget + 1e-9
    assert loss == pytest.approx(min(loss for latency, loss in ways if latency <= budget), abs=1e-9)
    assert all(best.mask[name] for name in always)
    front = pareto(found, cost)
    assert all(a.latency > b.latency and a.loss < b.loss for a, b in itertools.pairwise(front))
    for latency, loss in ways:
        assert any(p.latency <= latency + 1e-9 and p.loss <= loss + 1e-9 for p in front)


def test_what_no_other_beats():
    speed, accuracy = np.array([10, 20, 15, 30, 5, 10, 30]), np.array([0.9, 0.8, 0.7, 0.8, 0.95, 0.9, 0.7])
    assert planning.unbeaten(speed, -accuracy).tolist() == [3, 0, 4]
    assert planning.unbeaten([], []).tolist() == []


def test_a_plan_is_predicted_as_it_was_planned():
    found, cost = tables([1.0, 2.0], [1.0, 2.0])
    cost = replace(cost, linear=dict.fromkeys(cost.kept, 0.5))  # quicker than merged
    assert cost.predict(plan(found, cost, 22.0)) == pytest.approx(pareto(found, cost)[-1].latency) == 22.0


def test_many_plans_of_a_deep_network_are_thinned(monkeypatch):
    """Where the plans to keep in mind would be too many, what is found is still within the budget, and hardly worse."""
    values = [float(2.0**i) for i in range(12)]
    found, cost = tables(values, [v / 1000 for v in values])
    budget, least = cost.total - 2.0485, cost.total - sum(values) / 1000
    exact = plan(found, cost, budget)
    monkeypatch.setattr(planning, "MOST", 64)
    thinned = plan(found, cost, budget)
    assert cost.predict(thinned, merged=True) <= budget
    losses = [sum(found.scores[name] for name in p.mask.removed) for p in (exact, thinned)]
    assert losses[0] <= losses[1] <= losses[0] + len(values) * sum(values) / 64
    assert len(pareto(found, cost)) <= 64 + 2  # bins, the quickest
    assert pareto(found, cost)[-1].latency == pytest.approx(least)  # the quickest stays
    assert plan(found, cost, least + 1e-9).mask.k == 0


def test_a_site_may_stay_linear_where_that_is_quicker():
    found = Importances({"a": 1.0, "b": 2.0}, (), ("a", "b"), unit="nats")
    cost = CostTable({"a": 5.0, "b": 5.0}, {"a": 2.0, "b": 4.0}, {"a": 6.0, "b": 3.0}, 12.0, 1, 32, "cpu", "eager")
    assert plan(found, cost, 10.0, merged=False).mask.removed == ("a",)
    assert plan(found, cost, 10.0).mask.removed == ("b",)
    assert plan(found, cost, 99.0).mask.removed == ()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"kept": {"s0": -1.0, "s1": 10.0}}, "0 or more, found {'s0': -1.0}"),
        ({"merged": {"s0": math.nan, "s1": 8.0}}, "found {'s0': nan}"),
        ({"total": math.inf}, "found {'the whole network': inf}"),
        ({"kept": {"s0": 10.0}}, "no measured cost for \\['s1'\\]: profile the network"),
    ],
)
def test_bad_costs_are_named(change, text):
    found, cost = tables([1.0, 2.0], [1.0, 2.0])
    with pytest.raises(MaskMismatch, match=text):
        plan(found, replace(cost, **change), 20.0)


def test_tables_that_do_not_belong_together():
    found, cost = tables([1.0, 2.0], [1.0, 2.0])
    with pytest.raises(MaskMismatch, match="only order the sites, their sums mean nothing"):
        plan(replace(found, unit=""), cost, 24.0)
    with pytest.raises(MaskMismatch, match="are of different networks"):
        plan(replace(found, network="a"), replace(cost, network="b"), 24.0)
    assert plan(replace(found, network="a"), replace(cost, network="a"), 24.0).mask.k == 1


def test_importances_of_other_images_are_refused():
    found, cost = tables([1.0, 2.0], [3.0, 4.0])
    assert plan(replace(found, image_size=32), cost, 22.0).mask.removed == ("s0",)
    with pytest.raises(MaskMismatch, match="importances are of images of 64 px, costs of 32 px: give both the same"):
        plan(replace(found, image_size=64), cost, 22.0)


def test_budgets_that_cannot_be_met_name_the_nearest():
    found, cost = tables([1.0, 2.0], [1.0, 2.0])
    with pytest.raises(MaskMismatch, match="the least that can be reached is 22.00 ms per batch, found 3"):
        plan(found, cost, 3.0)
    with pytest.raises(BadConfig, match="found NaN"):
        plan(found, cost, math.nan)
    with pytest.raises(MaskMismatch, match="importance is NaN"):
        plan(replace(found, scores={"s0": math.nan, "s1": 1.0}), cost, 24.0)
    with pytest.raises(MaskMismatch, match=r"no measured cost for the runs \['s0\+s1'\]"):
        cost.predict(dslib.Plan(dslib.Mask({"s0": False, "s1": False}), [("s0", "s1")]))


@pytest.mark.parametrize("measured", [[1.5], [1.0, 1.2]])
def test_a_mask_is_as_fast_as_asked_when_measured(tiny, monkeypatch, measured):
    """What falls short when measured is asked for again, with more removed."""
    names = tuple(dslib.find_sites(tiny, 32).names)
    cost = CostTable(*(dict.fromkeys(names, ms) for ms in (5.0, 9.0, 2.0)), 20.0, 4, 32, "cpu", "eager")
    found = Importances(dict(zip(names, (0.1, 0.3, 0.2), strict=True)), (), names, unit="nats")
    times = iter(measured)

    def measured_next(networks, images, *_, **__):
        ms = {"small": np.array([10 / next(times)]), "original": np.array([10.0])}
        return Timing(ms, len(images), "cpu", "eager")

    monkeypatch.setattr(planning, "measure", measured_next)
    best, reached = for_speedup(tiny, found, cost, 1.15)
    assert best.mask.removed == (("blocks.0",) if len(measured) == 1 else ("blocks.0", "blocks.2"))
    assert reached[0] == pytest.approx(measured[0] if len(measured) == 1 else 1.2)
    assert reached[0] == pytest.approx(reached[1]) == pytest.approx(reached[2])
    times = iter([1.1, 1.2, 1.3])
    unreached = "at its quickest, with 3 sites removed, the network is 1.30 times as fast"
    for speedup, text in ((1.0, "speedup: expected more than 1"), (1.4, unreached)):
        with pytest.raises(DslibError, match=text):
            for_speedup(tiny, found, cost, speedup)


def test_the_joint_frontier_of_two_widths():
    narrow, wide = tables([1.0, 2.0], [3.0, 4.0]), tables([0.1, 0.4], [3.0, 4.0])
    narrow = replace(narrow[0], base_loss=2.0), replace(narrow[1], total=15.0)
    front = joint({"narrow": narrow, "wide": wide})
    every = [(p.latency, found.base_loss + p.loss) for found, cost in (narrow, wide) for p in pareto(found, cost)]
    unbeaten = sorted((a, b) for a, b in every if not any((c <= a and d <= b) and (c, d) != (a, b) for c, d in every))
    assert [(one.point.latency, one.loss) for one in front] == unbeaten[::-1]
    assert {one.network for one in front} == {"narrow", "wide"}
    assert front[0].network == "wide"
    with pytest.raises(MaskMismatch, match="costs of different settings"):
        joint({"narrow": narrow, "wide": (wide[0], replace(wide[1], batch_size=8))})
    with pytest.raises(MaskMismatch, match="nats of cross-entropy, to be added"):
        joint({"wide": (replace(wide[0], unit="nats of divergence"), wide[1])})


def test_importances_and_costs_become_a_plan_on_the_command_line(tmp_path, cli, refused):
    found, cost = tables([1.0, 2.0, 0.5], [1.0, 2.0, 3.0], [0.1, 9.0], [4.0, 4.0])
    found.save(tmp_path / "found.json")
    cost.save(tmp_path / "cost.json")
    words = ("plan", "--importance", "found.json", "--cost", "cost.json")
    shown = cli(*words).splitlines()
    assert len(shown) == len(pareto(found, cost))
    assert "removed: nothing" in shown[0]
    done = cli(*words, "--latency", 31, "--out", "plan.json")
    assert "31.00 ms predicted, 1.13 times as fast; k=1, removed: s0+s1" in done
    assert dslib.Plan.load(tmp_path / "plan.json") == plan(found, cost, 31.0)
    assert "removed: s0+s1, s2" in cli(*words, "--speedup", 1.2)
    for wrong in (("--latency", 31, "--speedup", 2), ("--out", "x.json"), ("--speedup", 0), ("--latency", 1)):
        assert refused(*words, *wrong)


def test_what_a_user_measured_becomes_a_plan_whatever_the_number_of_classes(tmp_path, npz, cli):
    """`profile` knows no classes, `importance` has the data's."""
    model = dslib.load_model("conftest:Tiny", ("0", "1")).model
    save_tensors(tmp_path / "w.safetensors", model.state_dict())
    network = ("--model", "conftest:Tiny", "--longest", 2)
    cli("importance", *network, "--weights", "w.safetensors", "--data", npz, "--count", 32, "--out", "importance.json")
    cli("profile", *network, "--image-size", 16, "--batch-size", 2, "--out", "cost.json")
    assert "removed: nothing" in cli("plan", "--importance", "importance.json", "--cost", "cost.json", "--or-linear")
    found = json.loads((tmp_path / "importance.json").read_text())
    found["values"]["m"]["elsewhere"] = 1.0
    (tmp_path / "wrong.json").write_text(json.dumps(found))
    with pytest.raises(BadRecord, match="of other sites than it lists"):
        dslib.Importances.load(tmp_path / "wrong.json")
