"""Plans: runs of sites that become one convolution."""

import copy

import pytest
import torch
from conftest import Tiny, network, relative, removing
from torch import nn

import dslib
from dslib.algebra.graphs import is_activation
from dslib.bench.exact import without_activations
from dslib.errors import BadConfig, BadRecord, MaskMismatch, NotMergeable
from dslib.shrinking import set_fade, settle

# network -> runs, and the kernel and stride of each; two of them go on after a stride
RUNS = {
    "mobilenet_v2": {
        ("features.4", "features.5"): ((7, 7), (2, 2)),
        ("features.8", "features.9", "features.10"): ((7, 7), (1, 1)),
    },
    "resnet18": {("layer2.0", "layer2.1"): ((15, 15), (2, 2))},
    "timm/efficientnet_lite0": {("blocks.1.1", "blocks.2.0", "blocks.2.1"): ((15, 15), (2, 2))},
}


@pytest.mark.parametrize("name", RUNS)
@torch.no_grad()
def test_a_run_becomes_one_convolution(name):
    model, sites = network(name)
    plan = dslib.Plan(removing(sites, *(site for run in RUNS[name] for site in run)), tuple(RUNS[name]))
    small = dslib.shrink(model, plan, nn.ReLU6)
    merged = dslib.merge(small, plan)
    x = torch.randn(2, 3, 75, 75, dtype=torch.float64)
    assert small(x).shape == model(x).shape
    assert relative(merged(x), small(x)) < 1e-11
    assert set(small.state_dict()) == set(model.state_dict())
    predicted = dslib.unmerged(dslib.shrink(copy.deepcopy(model).to("meta"), plan))
    for run, (kernel, stride) in RUNS[name].items():
        conv = merged.get_submodule(run[0]).conv
        assert (conv.kernel_size, conv.stride) == (kernel, stride)
        assert all(isinstance(merged.get_submodule(n), nn.Identity) for n in run[1:])
        cost = predicted["+".join(run)]
        assert (cost.kernel, cost.weights_merged) == (kernel, conv.weight.numel())


@torch.no_grad()
def test_a_run_has_one_activation_at_its_end():
    model, sites = network("resnet18")
    small = dslib.shrink(model, dslib.Plan(sites.mask([]), (("layer1.0", "layer1.1"),)))
    acts = [
        sum(is_activation(b, n) for n in b.graph.nodes) for b in (small.layer1[0], small.layer1[1], small.layer2[0])
    ]
    assert acts == [0, 1, 1]


@torch.no_grad()
def test_inside_a_run_equals_its_blocks_without_activations():
    """Against the network's own code: only the border differs, as wide as half the merged kernel."""
    model, sites = network()
    names = ("features.8", "features.9")
    plan = dslib.Plan(removing(sites, *names), (names,))
    small = dslib.shrink(model, plan)
    x = torch.randn(1, 64, 14, 14, dtype=torch.float64)
    torn = without_activations(model, names)
    expected, found = x, x
    for name in names:
        expected, found = torn.get_submodule(name)(expected), small.get_submodule(name)(found)
    assert relative(found[..., 2:-2, 2:-2], expected[..., 2:-2, 2:-2]) < 1e-12
    assert relative(found, expected) > 1e-3


def test_training_through_a_run_counts_the_interior_only():
    """Batch statistics of the first block equal those without hoisting, also where its output goes on for the next."""
    model, sites = network()
    names = ("features.8", "features.9")
    small = dslib.shrink(model, dslib.Plan(removing(sites, *names), (names,))).train()
    torn = without_activations(model, ("features.8",)).train()
    x = torch.randn(4, 64, 14, 14, dtype=torch.float64)
    small.features[8](x), torn.features[8](x)
    first, second = (small.features[8].get_submodule(key) for key in ("conv.0.1", "conv.1.1"))
    assert first.num_batches_tracked == second.num_batches_tracked == 1
    # after it the two differ at the border, where hoisting pads the input in place of the map
    torch.testing.assert_close(first.running_var, torn.features[8].get_submodule("conv.0.1").running_var)


def test_costs_of_a_run_follow_the_strides():
    """Hand-counted: each convolution's weights times how often it runs per output pixel."""
    model, sites = network("resnet18")
    names = ("layer2.0", "layer2.1")
    plan = dslib.Plan(removing(sites, *names), (names,))
    cost = dslib.unmerged(dslib.shrink(model, plan))["layer2.0+layer2.1"]
    convs = 128 * 64 * 9 + 128 * 128 * 9 + 128 * 64 + 2 * 128 * 128 * 9
    assert cost.weights_linear == cost.macs_linear == convs
    assert cost.macs_merged == cost.weights_merged == 128 * 64 * 15 * 15
    alone = dslib.unmerged(dslib.shrink(network()[0], plan_of_mobilenet()))
    # the whole of features.3, and the expand of features.4, run on 4 times the pixels
    run = alone["features.3+features.4"]
    expected = 4 * (24 * 144 + 144 * 9 + 144 * 24 + 24 * 144) + 144 * 9 + 144 * 32
    assert run.macs_linear == expected


def plan_of_mobilenet() -> dslib.Plan:
    return dslib.Plan(network()[1].mask([]), (("features.3", "features.4"),))


def test_a_plan_goes_to_json_and_back(tmp_path):
    plan = plan_of_mobilenet()
    path = plan.save(tmp_path / "plan.json")
    assert dslib.Plan.load(path) == plan
    assert plan.groups[:4] == (("features.1",), ("features.2",), ("features.3", "features.4"), ("features.5",))
    with pytest.raises(BadRecord, match="is a plan, which does more than a mask"):
        dslib.Mask.load(path)
    assert dslib.Plan.load(plan.mask.save(tmp_path / "mask.json")) == dslib.Plan(plan.mask)
    for part, text in (("runs", "expected lists of site names"), ("dropped", "expected a list of site names")):
        (tmp_path / "odd.json").write_text(f'{{"mask": {{"a": true}}, "{part}": "a"}}')
        with pytest.raises(BadRecord, match=text):
            dslib.Plan.load(tmp_path / "odd.json")


MASK = dslib.Mask({"a": True, "b": False, "c": False, "d": False})


@pytest.mark.parametrize(
    ("runs", "text"),
    [
        ((("a", "b"),), "these are kept or unknown: a"),
        ((("b", "x"),), "these are kept or unknown: x"),
        ((("b",),), "two or more sites"),
        (("bc",), "two or more sites"),
        ((("b", "c"), ("c", "d")), "found twice: c"),
    ],
)
def test_runs_that_make_no_sense_are_refused(runs, text):
    with pytest.raises(MaskMismatch, match=text):
        dslib.Plan(MASK, runs)


@torch.no_grad()
def test_dropped_blocks_give_what_they_take():
    """Against the network's own code: the identity in place of two blocks, one of them beside a merged one."""
    (model, sites), gone = network(), ("features.3", "features.6")
    plan = dslib.Plan(removing(sites, "features.3", "features.4", "features.6"), dropped=gone)
    assert plan.groups == (("features.4",),)
    expected = dslib.shrink(model, plan.mask)
    for name in gone:
        expected.set_submodule(name, nn.Identity())
    small = dslib.shrink(model, plan)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    assert torch.equal(small(x), expected(x))
    assert relative(dslib.merge(small)(x), expected(x)) < 1e-11
    assert set(small.state_dict()) == {key for key in model.state_dict() if not key.startswith(gone)}
    faded = dslib.fade(model, plan)
    assert all(isinstance(faded.get_submodule(name), nn.Identity) for name in gone)


def test_a_plan_with_dropped_blocks_is_kept_and_rebuilt(tmp_path):
    mask = removing(network()[1], "features.3", "features.4")
    plan = dslib.Plan(mask, dropped=["features.3"])
    assert dslib.Plan.load(plan.save(tmp_path / "plan.json")) == plan
    with pytest.raises(BadRecord, match="is a plan, which does more than a mask"):
        dslib.Mask.load(tmp_path / "plan.json")
    recipe = dslib.Recipe("mobilenet_v2", tuple("abc"), 32, mask=dict(mask), dropped=plan.dropped)
    small, merged = recipe.merge_into(recipe.build())
    x = torch.randn(1, 3, 32, 32)
    again, found = dslib.load(dslib.save(tmp_path / "net.json", small, merged))
    assert found == merged
    assert torch.equal(again(x), small(x))
    assert isinstance(again.features[3], nn.Identity)


@pytest.mark.parametrize(
    ("dropped", "text"),
    [
        ("b", "expected names of sites, found 'b'"),
        (["a"], "merged or dropped, these are kept or unknown: a"),
        (["x"], "these are kept or unknown: x"),
        (["d", "d"], "found twice: d"),
        (["c"], "in one run, or dropped"),
    ],
)
def test_drops_that_make_no_sense_are_refused(dropped, text):
    with pytest.raises(MaskMismatch, match=text):
        dslib.Plan(MASK, [["b", "c"]], dropped)


@pytest.mark.parametrize("name", ["features.2", "features.7"])  # other channels; a stride as well
def test_a_block_of_other_maps_than_it_takes_cannot_be_dropped(name):
    model, sites = network()
    plan = dslib.Plan(removing(sites, name), dropped=[name])
    with pytest.raises(NotMergeable, match=f"{name}: cannot be dropped .only a block of one name"):
        dslib.shrink(model, plan)


def test_a_plan_says_what_it_does_and_which_groups_to_merge():
    plan = dslib.Plan(MASK, [["b", "c"]], ["d"])
    assert str(plan) == "b+c; dropped: d"
    assert str(dslib.Plan(dslib.Mask({"a": True}))) == "nothing"
    model, sites = network()
    plan = dslib.Plan(removing(sites, "features.3", "features.4"), dropped=["features.3"])
    merged = dslib.merge(dslib.shrink(model, plan), only=plan)
    assert dslib.unmerged(merged) == {}
    assert isinstance(merged.features[4].conv, nn.Conv2d)


def test_a_network_with_a_dropped_block_is_finetuned(digits):
    model = Tiny().eval()
    plan = dslib.Plan(dslib.find_sites(model, 16).mask(["blocks.1"]), dropped=["blocks.2"])
    config = dslib.Finetune(epochs=1, lr=0.01, batch_size=32)
    for start in (dslib.shrink, dslib.fade):
        done = dslib.finetune(start(model, plan, None, 16), digits, None, config).model
        assert isinstance(done.blocks[2], nn.Identity)
        assert dslib.unmerged(dslib.merge(done)) == {}


@pytest.mark.parametrize("run", [("features.2", "features.4"), ("features.4", "features.3")])
def test_sites_that_do_not_feed_each_other_are_refused(run):
    model, sites = network()
    plan = dslib.Plan(sites.mask([]), (run,))
    with pytest.raises(BadConfig, match=f"must be neighbours in one nn.Sequential, found {run[0]} and {run[1]}"):
        dslib.shrink(model, plan)


def test_sites_of_two_layers_of_a_resnet_are_not_known_to_feed_each_other():
    model, sites = network("resnet18")
    plan = dslib.Plan(sites.mask([]), (("layer1.1", "layer2.0"),))
    with pytest.raises(BadConfig, match="found layer1.1 and layer2.0"):
        dslib.shrink(model, plan)


@torch.no_grad()
def test_a_part_of_a_plan_is_merged_and_the_rest_says_why():
    model, sites = network()
    plan = dslib.Plan(removing(sites, *(f"features.{i}" for i in range(1, 6))), (("features.3", "features.4"),))
    small = dslib.shrink(model, plan)
    merged = dslib.merge(small, only=["features.4", "features.1"])  # any site of a run stands for it
    left = dslib.unmerged(merged)
    assert "features.3+features.4" not in left
    assert {cost.left for cost in left.values()} == {"not named"}
    rest = dslib.merge(merged, only=lambda cost: cost.site == "features.2")
    assert {cost.left for cost in dslib.unmerged(rest).values()} == {"declined by the rule"}
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    assert relative(rest(x), small(x)) < 1e-11
    assert {cost.left for cost in dslib.unmerged(small).values()} == {""}


def test_a_run_fades_and_settles():
    model, sites = network("resnet18")
    plan = dslib.Plan(removing(sites, "layer1.0", "layer1.1", "layer2.0"), (("layer1.0", "layer1.1"),))
    faded, small = dslib.fade(model, plan), dslib.shrink(model, plan)
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    set_fade(faded, 1.0)
    with torch.no_grad():
        assert torch.equal(settle(faded)(x), small(x))
        assert relative(dslib.merge(settle(faded))(x), small(x)) < 1e-11
