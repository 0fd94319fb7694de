"""Stage 1: gates, straight-through top-k, the sign of the latency term, resuming."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from conftest import photos, wide
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import dslib
from dslib.errors import BadConfig, BadRecord, MaskMismatch
from dslib.searching import Gate, Gates, add_gates, k_at, latency_decay
from dslib.sites import Sites
from dslib.training.state import TrainingState

QUICK = dslib.Search(epochs=2, lr=0.1, batch_size=32, k=1, anneal=0.5)


@pytest.mark.parametrize("act", [nn.ReLU6(), nn.SiLU(), nn.Hardswish()])
def test_a_closed_gate_is_the_identity_bit_for_bit(act):
    gates = Gates(["a", "b"])
    gates.keep(1)
    x = torch.randn(2, 3, 4, 4) * 5
    assert torch.equal(Gate(act, gates, 1)(x), x)
    assert torch.equal(Gate(act, gates, 0)(x), act(x))


@pytest.mark.parametrize("k", [0, 1])
def test_the_gradient_of_m_is_straight_through(k):
    """sum(grad * (act(x) - x)), whether the gate is open or closed; x's gradient follows the gate."""
    gates = Gates(["a"])
    gates.keep(k)
    x = (torch.randn(2, 3, 4, 4, dtype=torch.float64) * 5).requires_grad_()
    upstream = torch.randn_like(x)
    (Gate(nn.ReLU6(), gates, 0)(x) * upstream).sum().backward()
    act = nn.functional.relu6(x.detach())
    torch.testing.assert_close(gates.m.grad[0].double(), (upstream * (act - x.detach())).sum())
    inside = (x.detach() > 0) & (x.detach() < 6)
    torch.testing.assert_close(x.grad, upstream * inside if k else upstream)


def test_an_in_place_activation_does_not_leak_through_its_gate():
    model = dslib.load_model("mobilenet_v2", options={"width_mult": 0.25}).model.eval()
    gated, gates = add_gates(model, dslib.find_sites(model, 32))
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(gated(x), model(x), rtol=0, atol=0)
    gates.keep(0)
    block = gated.features[3]
    y = torch.randn(1, model.features[3].conv[0][0].in_channels, 8, 8)
    plain = block(y)
    assert torch.equal(block(y), plain)
    more = set(gated.state_dict()) - set(model.state_dict())
    assert [name.rpartition("dslib_gates")[1:] for name in more] == [("dslib_gates", ".m")]


@given(st.lists(st.floats(-2, 2), min_size=1, max_size=12), st.data())
def test_exactly_k_gates_are_open(values, data):
    gates = Gates([str(i) for i in range(len(values))])
    gates.m.data = torch.tensor(values)
    k = data.draw(st.integers(0, len(values)))
    gates.keep(k)
    assert sum(gates.open) == k == len(gates.kept)
    on, off = gates.m[gates.open].tolist(), gates.m[[not o for o in gates.open]].tolist()
    assert not on or not off or min(on) >= max(off)


@settings(deadline=None)
@given(st.lists(st.floats(-3, 10), min_size=2, max_size=8), st.data())
def test_predicted_latency_never_rises_with_the_latency_weight(savings, data):
    """With task gradients held fixed, after one step from any m: the theorem about the term's sign."""
    n = len(savings)
    start = torch.tensor(data.draw(st.lists(st.floats(-1, 1), min_size=n, max_size=n)), dtype=torch.float64)
    task = torch.tensor(data.draw(st.lists(st.floats(-1, 1), min_size=n, max_size=n)), dtype=torch.float64)
    k, saved = data.draw(st.integers(0, n)), torch.tensor(savings, dtype=torch.float64)
    latencies = []
    for weight in (0.0, 0.1, 1.0, 10.0):
        m = start.clone().requires_grad_()
        (task @ m + weight * latency_decay(m, saved)).backward()
        kept = (m.detach() - m.grad).argsort(descending=True, stable=True)[:k]
        latencies.append(saved[kept].sum().item())  # what the kept sites cost above their merged selves
    assert all(b <= a + 1e-9 for a, b in pairwise(latencies))


def test_k_falls_from_all_to_k():
    config = replace(QUICK, k=3, anneal=0.5)
    assert [k_at(p, config, 10) for p in (0, 0.25, 0.5, 1)] == [10, 7, 3, 3]
    assert k_at(0, replace(config, anneal=0.0), 10) == 3


def test_one_search_gives_nested_masks_for_every_k(tiny, digits):
    model = tiny.float()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sites = dslib.find_sites(model, 16)
    found = dslib.search(model, digits, sites, config=QUICK)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    masks = [found.mask(k) for k in range(4)]
    assert [mask.k for mask in masks] == [0, 1, 2, 3]
    assert all(set(a.kept) < set(b.kept) for a, b in pairwise(masks))
    assert [len(row["kept"]) for row in found.history] == [1, 1]
    assert list(found.frame["rank"].sort_values()) == [1, 2, 3]
    for k in (-1, 4):
        with pytest.raises(MaskMismatch, match=f"expected 0 to 3, found {k}"):
            found.mask(k)


def test_exactly_k_at_every_step_of_a_search(tiny, digits, monkeypatch):
    seen = []
    forward = Gate.forward
    monkeypatch.setattr(Gate, "forward", lambda self, x: seen.append(sum(self._gates[0].open)) or forward(self, x))
    dslib.search(tiny.float(), digits, dslib.find_sites(tiny, 16), config=replace(QUICK, anneal=0.0))
    assert set(seen) == {1}


def test_a_search_is_deterministic_and_resumes_without_a_trace(tiny, digits, tmp_path, monkeypatch):
    model, sites = tiny.float(), dslib.find_sites(tiny, 16)
    whole = dslib.search(model, digits, sites, config=QUICK)
    assert dslib.search(model, digits, sites, config=QUICK).scores == whole.scores

    save = TrainingState.save
    monkeypatch.setattr(
        TrainingState, "save", lambda *given: (save(*given), (_ for _ in ()).throw(KeyboardInterrupt))[0]
    )
    with pytest.raises(KeyboardInterrupt):
        dslib.search(model, digits, sites, config=QUICK, checkpoint=tmp_path / "s.safetensors")
    monkeypatch.setattr(TrainingState, "save", save)
    again = dslib.search(model, digits, sites, config=QUICK, checkpoint=tmp_path / "s.safetensors")
    assert again.scores == whole.scores
    assert [row["m"] for row in again.history] == [row["m"] for row in whole.history]


def test_a_large_latency_weight_removes_the_costliest_site_first(tiny, digits):
    sites = dslib.find_sites(tiny, 16)
    cost = {"blocks.0": 0.1, "blocks.1": 5.0, "blocks.2": 0.1}
    found = dslib.search(tiny.float(), digits, sites, cost, replace(QUICK, latency_weight=100.0))
    assert found.mask(2).removed == ("blocks.1",)


def test_sites_that_cannot_be_merged_are_always_kept():
    found = dslib.Importances({"a": 0.1, "b": 0.9}, ("c",), ("a", "c", "b"))
    assert found.mask(1).kept == ("c",)
    assert found.mask(2).kept == ("c", "b")
    with pytest.raises(MaskMismatch, match="expected 1 to 3"):
        found.mask(0)


def test_gates_compute_the_same_where_the_network_is_compiled(tiny):
    gated, gates = add_gates(tiny.float(), dslib.find_sites(tiny, 32))
    compiled, x = torch.compile(gated, backend="eager"), photos(2).float()
    for k in (3, 1, 0):
        gates.keep(k)
        found = []
        for network in (gated, compiled):
            gates.m.grad = None
            y = network(x)
            y.square().sum().backward()
            found.append((y.detach(), gates.m.grad.clone()))
        torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"kept": {f"blocks.{i}": float("nan") for i in range(3)}}, "costs are milliseconds, 0 or more, found"),
        ({"merged": {"blocks.0": 1.0}}, "kept, linear and merged differ: profile again"),
        ({"network": "0123456789ab"}, "the costs are of another network: profile this one"),
    ],
)
def test_search_refuses_costs_that_make_no_sense(tiny, digits, change, text):
    sites = dslib.find_sites(tiny, 16)
    cost = dslib.profile(tiny.float(), sites, 2, rounds=1)
    with pytest.raises(MaskMismatch, match=text):
        dslib.search(tiny.float(), digits, sites, replace(cost, **change), QUICK)
    savings = {"blocks.0": 1.0, "blocks.1": float("nan"), "blocks.2": -1.0}
    with pytest.raises(MaskMismatch, match=r"savings are milliseconds, found {'blocks.1': nan}"):
        dslib.search(tiny.float(), digits, sites, savings, QUICK)


def test_search_refuses_bad_settings(tiny, digits, tmp_path):
    sites = dslib.find_sites(tiny, 16)
    with pytest.raises(MaskMismatch, match="expected 0 to 3 for this network, found 4"):
        dslib.search(tiny, digits, sites, config=replace(QUICK, k=4))
    with pytest.raises(BadConfig, match="needs cost"):
        dslib.search(tiny, digits, sites, config=replace(QUICK, latency_weight=1.0))
    with pytest.raises(BadConfig, match="anneal: expected 0 to 1, found 2"):
        dslib.Search(anneal=2)
    with pytest.raises(MaskMismatch, match="cost has no saving for blocks.0, blocks.1"):
        dslib.search(tiny, digits, sites, {"features.1": 1.0}, QUICK)
    whole = {"m": {"a": 1.0}, "always_kept": [], "order": ["a"]}
    (tmp_path / "x.json").write_text(json.dumps(whole))
    assert dslib.Importances.load(tmp_path / "x.json").dropped == {}
    for bad in (
        {"m": {}},
        {**whole, "dropped": {"a": "x"}},
        {**whole, "dropped": ["a"]},
        {**whole, "runs": {"a": None}},
    ):
        (tmp_path / "x.json").write_text(json.dumps(bad))
        with pytest.raises(BadRecord, match="is not a search result"):
            dslib.Importances.load(tmp_path / "x.json")


def test_a_search_result_round_trips(tmp_path):
    found = dslib.Importances({"a": 0.1}, (), ("a",), [{"epoch": 1, "kept": ["a"]}], base_loss=0.5)
    path = found.save(tmp_path / "s.json")
    assert dslib.Importances.load(path) == found
    content = json.loads(path.read_text())
    assert (content["m"], content["own"], content["order"]) == ({"a": 0.1}, 0.5, ["a"])  # as files have always said


def test_a_sequential_network_is_searched(digits):
    """It would call whatever is added to it."""
    model, config = wide(), dslib.Search(k=1, epochs=1, lr=0.01, batch_size=64)
    found = dslib.search(model, digits, dslib.find_sites(model, 16), None, config)
    assert found.mask(1).k == 1
    assert len(found.history) == 1


def test_no_gates_without_a_site(tiny):
    with pytest.raises(MaskMismatch, match="no mergeable site"):
        add_gates(tiny, Sites([], [], 16))
