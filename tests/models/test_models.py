"""Networks by name or path, their weights and heads, and everything that can be wrong with them."""

import pytest
import torch
from torch import nn

import dslib
from dslib.errors import BadModel
from dslib.models.networks import find_head, imagenet_indices
from dslib.models.weights import save_tensors


@pytest.mark.parametrize("name", ["mobilenet_v2", "timm/efficientnet_lite0", "torchvision/resnet18", "conftest:Tiny"])
def test_networks_by_name(name):
    model, trained = dslib.load_model(name, ["a", "b", "c"])
    assert not trained
    assert model.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 3)


def test_options_and_seed():
    model = dslib.load_model("mobilenet_v2", options={"width_mult": 0.5}).model
    assert model.features[1].out_channels == 8
    a, b, c = (dslib.load_model("resnet18", seed=seed).model.fc.weight for seed in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_loading_leaves_the_callers_random_numbers_alone():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    dslib.load_model("conftest:Tiny", list("abc"), seed=3)
    assert torch.equal(torch.rand(3), expected)


def test_the_pretrained_heads_rows_are_selected_for_imagenet_classes(tmp_path):
    full = dslib.load_model("resnet18").model
    path = save_tensors(tmp_path / "r.safetensors", full.state_dict())
    model, trained = dslib.load_model("resnet18", ["n01440764", "n02102040"], str(path))
    assert trained
    assert imagenet_indices(["n01440764", "n02102040"]) == [0, 217]
    assert torch.equal(model.fc.weight, full.fc.weight[[0, 217]])
    assert torch.equal(model.fc.bias, full.fc.bias[[0, 217]])
    model, trained = dslib.load_model("resnet18", ["cat", "dog"], str(path))
    assert not trained
    assert find_head(model)[1].out_features == 2
    assert torch.equal(model.conv1.weight, full.conv1.weight)


def test_functions_without_num_classes_get_a_head(tmp_path):
    model, trained = dslib.load_model("conftest:seven", list("abc"))
    assert (find_head(model)[1].out_features, trained) == (3, False)
    path = save_tensors(tmp_path / "x.safetensors", model.state_dict())
    again, trained = dslib.load_model("conftest:seven", list("abc"), str(path))
    assert trained
    assert torch.equal(again.head.weight, model.head.weight)


def test_default_weights_come_from_dslib_data_first(tmp_path, monkeypatch):
    own = dslib.load_model("resnet18", list("abc"), seed=5).model
    save_tensors(tmp_path / "weights" / "resnet18.safetensors", own.state_dict())
    monkeypatch.setenv("DSLIB_DATA", str(tmp_path))
    model, trained = dslib.load_model("resnet18", list("abc"), "default")
    assert trained
    assert torch.equal(model.fc.weight, own.fc.weight)


def test_weights_that_do_not_fit(tmp_path):
    state = dslib.load_model("resnet18").model.state_dict()
    state["conv1.weight"] = torch.zeros(1, 2)
    del state["bn1.bias"]
    state["extra"] = torch.zeros(1)
    path = save_tensors(tmp_path / "r.safetensors", state)
    text = r"does not fit ResNet: missing: bn1\.bias; unknown: extra; wrong shape: conv1\.weight \(1, 2\) for"
    with pytest.raises(BadModel, match=text):
        dslib.load_model("resnet18", None, str(path))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(dslib.DslibError, match="corrupt or truncated"):
        dslib.load_model("resnet18", None, str(path))
    with pytest.raises(BadModel, match="no weights file 'nowhere'"):
        dslib.load_model("resnet18", None, "nowhere")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("mobilenetv2", "unknown model 'mobilenetv2': the nearest known are mobilenet_v2"),
        ("nopackage:f", "no model 'nopackage:f'"),
        ("conftest:nothing", "no model"),
        ("conftest:build", "cannot be built"),
        ("conftest:broken", "cannot be built with .*: integer division"),
        ("builtins:dict", "expected a torch Module"),
    ],
)
def test_functions_that_are_no_model(name, text):
    with pytest.raises(BadModel, match=text):
        dslib.load_model(name)


def test_a_network_without_head():
    with pytest.raises(BadModel, match="expected a classifier"):
        find_head(nn.Conv2d(1, 1, 1))
