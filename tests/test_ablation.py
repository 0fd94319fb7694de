"""The paper's three accuracies as a benchmark."""

import pytest

import dslib
from dslib.bench import ablation
from dslib.checkpoints import save_tensors
from dslib.errors import BadConfig
from dslib.records import Record
from dslib.running import Run, pretrain


@pytest.fixture
def teacher(tmp_path):
    """Weights of a small MobileNetV2, trained for a moment on the digits."""
    data = dslib.load_data("digits")
    model = dslib.load_model("mobilenet_v2", data.classes, options={"width_mult": 0.1}).model
    config = dslib.Train(epochs=4, lr=0.4, batch_size=64, warmup=1)
    pretrain(model, data, Run("mobilenet_v2", "digits", 8, pretrain=config), head_only=False)
    return save_tensors(tmp_path / "w.safetensors", model.state_dict())


def test_three_accuracies_of_a_mask_resumable(tmp_path, teacher):
    given = {"model": "mobilenet_v2", "weights": str(teacher), "options": {"width_mult": 0.1}, "data": "digits",
             "epochs": 1, "device": "cpu", "out": tmp_path / "r.json"}  # fmt: skip
    said = []
    record = ablation.record_ablation("F", seeds=1, **given, echo=said.append)
    rows = record.values["rows"]
    assert [row.get("way") for row in rows] == ["original", "plain", "boundary", "distilled"]
    plain, boundary, distilled = rows[1:]
    assert plain["before"] != boundary["before"]
    assert boundary["before"] == distilled["before"]
    assert boundary["history"][0]["loss"] != distilled["history"][0]["loss"]
    assert list(ablation.table(record)["count"]) == [1, 1, 1]
    more = ablation.record_ablation("F", seeds=2, **given, echo=said.append)
    assert more.values["rows"][:4] == rows
    assert len(more.values["rows"]) == 7
    assert Record.load(tmp_path / "r.json").values == more.values
    with pytest.raises(BadConfig, match="other settings"):
        ablation.record_ablation("A", seeds=1, **given)


def test_a_mask_that_is_none_of_the_papers(tmp_path):
    with pytest.raises(BadConfig, match="unknown mask 'G'"):
        ablation.record_ablation("G")
    path = save_tensors(tmp_path / "w.safetensors", dslib.load_model("resnet18", list("0123456789")).model.state_dict())
    with pytest.raises(BadConfig, match="17 sites, found 8 in resnet18"):
        ablation.record_ablation("A", model="resnet18", weights=str(path), data="digits")
