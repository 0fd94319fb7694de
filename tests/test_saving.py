"""Recipes rebuild networks; of an exported file other runtimes compute what the network computes, or none is left."""

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
from conftest import Tiny, randomise_batchnorm

import dslib
from dslib import records
from dslib import saving as exporting
from dslib.errors import BadConfig, BadModel, BadRecord, DslibError

SMALL = {"width_mult": 0.1, "inverted_residual_setting": [[1, 8, 1, 1], [2, 16, 3, 2]]}


@pytest.fixture
def merged():
    model = randomise_batchnorm(Tiny()).eval()
    return dslib.merge(dslib.shrink(model, dslib.find_sites(model, 32).mask(["blocks.1"])))


@torch.no_grad()
def test_onnx_runs_elsewhere_at_any_batch_size(merged, tmp_path):
    path = dslib.export(merged, tmp_path / "net.onnx", 32)
    assert [file.name for file in tmp_path.iterdir()] == ["net.onnx"]  # one file, nothing beside it
    graph = onnx.load(path)
    assert graph.opset_import[0].version == 18
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for n in (1, 5):
        x = torch.randn(n, 3, 32, 32)
        np.testing.assert_allclose(session.run(None, {"images": x.numpy()})[0], merged(x), rtol=0, atol=1e-5)
        np.testing.assert_allclose(compiled(x.numpy())[0], merged(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [32, None])
@torch.no_grad()
def test_exact_borders_are_exported_too(size, tmp_path):
    model = randomise_batchnorm(Tiny()).eval()
    small = dslib.shrink(model, dslib.find_sites(model, 32).mask(["blocks.1"]), hoist=False)
    network = dslib.merge(small, image_size=size)
    assert dslib.export(network, tmp_path / "net.onnx", 32).stat().st_size > 0
    program = torch.export.load(dslib.export(network, tmp_path / "net.pt2", 32)).module()
    x = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(program(x), small(x))


def test_a_file_that_computes_something_else_is_not_kept(merged, tmp_path, monkeypatch):
    write = exporting.WRITERS[".pt2"]
    monkeypatch.setitem(exporting.WRITERS, ".pt2", lambda *args: write(*args) + 0.1)
    with pytest.raises(DslibError, match=r"net\.pt2 was not kept: what it computes differs by"):
        dslib.export(merged, tmp_path / "net.pt2", 32)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "size", "text"),
    [
        ("net.txt", 32, "ending in .onnx or .pt2, found net.txt"),
        ("net.onnx", 0, "image_size is in pixels"),
        ("net.pt2", "a", "image_size is in pixels"),
    ],
)
def test_bad_arguments(merged, tmp_path, name, size, text):
    with pytest.raises(BadConfig, match=text):
        dslib.export(merged, tmp_path / name, size)


def test_what_cannot_be_exported_is_one_line(merged, tmp_path):
    with pytest.raises(BadConfig, match=r"no bfloat16 .*export model\.float"):
        dslib.export(merged.bfloat16(), tmp_path / "net.onnx", 32)

    class Dynamic(Tiny):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else x

    with pytest.raises(DslibError, match="Dynamic cannot be exported to .pt2"):
        dslib.export(Dynamic(), tmp_path / "net.pt2", 32)
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named(merged, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(BadConfig, match=r"needs the package onnxruntime: pip install 'dslib\[export\]'"):
        dslib.export(merged, tmp_path / "net.onnx", 32)


@torch.no_grad()
def test_recipes_rebuild_networks_without_running_code(tmp_path):
    model, _ = dslib.load_model("mobilenet_v2", list("abc"), options=SMALL)
    mask = dslib.find_sites(model, 32).mask(["features.2"])
    recipe = dslib.Recipe("mobilenet_v2", tuple("abc"), 32, SMALL, dict(mask), "ReLU6")
    small = dslib.shrink(model, mask, torch.nn.ReLU6, 32).eval()
    merged, merged_recipe = recipe.merge_into(small)
    x = torch.randn(2, 3, 32, 32)
    for network, written in ((small, recipe), (merged, merged_recipe)):
        dslib.save(tmp_path / "net.json", network, written)
        found, read = dslib.load(tmp_path / "net.json")
        assert read == written
        assert torch.equal(found(x), network(x))
    part, part_recipe = recipe.merge_into(small, ["features.3"])
    whole, whole_recipe = part_recipe.merge_into(part)
    assert set(whole_recipe.merged) == set(merged_recipe.merged)
    dslib.save(tmp_path / "whole.json", whole, whole_recipe)
    assert torch.equal(dslib.load(tmp_path / "whole.json")[0](x), merged(x))
    (tmp_path / "other.json").write_text('{"nothing": 1}')
    code = {
        "model": "os:system",
        "classes": ["a", "b"],
        "image_size": 32,
        "options": {"command": f"touch {tmp_path}/x"},
    }
    records.write_json(tmp_path / "code.json", code)
    for trust in (None, "os:popen"):
        with pytest.raises(BadModel, match=r"code\.json would import and call os:system: if that is your own code"):
            dslib.load(tmp_path / "code", trust)
    assert not (tmp_path / "x").exists()
    with pytest.raises(BadRecord, match="is not a recipe"):
        dslib.load(tmp_path / "other")
    for name in ("Linear", "GLU", "MultiheadAttention", "Threshold"):
        with pytest.raises(BadConfig, match=f"unknown boundary activation '{name}'"):
            dslib.saving.activation(name)


def test_a_partly_merged_network_goes_on_with_the_same_borders():
    model = dslib.load_model("mobilenet_v2", options=SMALL).model
    mask = dslib.find_sites(model, 64).mask([])
    recipe = dslib.Recipe("mobilenet_v2", tuple("abc"), 64, SMALL, dict(mask), hoist=False)
    small = dslib.shrink(model, mask, image_size=64, hoist=False)
    part, part_recipe = recipe.merge_into(small, ["features.3"], border_size=64)
    with pytest.raises(BadConfig, match="part of it was merged with borders for image size 64, found None"):
        part_recipe.merge_into(part)
