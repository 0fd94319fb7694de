"""The loop's other promises: moving average, micro-batches, precision, compiling, features, what it tells."""

import copy
import csv
import math
import time
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import Tiny, cross_entropy, randomise_batchnorm, wide
from torch import nn

import dslib
from dslib.data.augmenting import Shifts
from dslib.errors import BadConfig, BadModel, DslibError
from dslib.finetuning import Maps, feature_distance
from dslib.shrinking import set_fade
from dslib.training.engine import Average
from dslib.training.loop import train
from dslib.training.settings import Train
from dslib.training.watching import Enough, Log

QUICK = Train(epochs=3, lr=0.5, batch_size=32)


def test_the_moving_average_is_evaluated_and_kept(digits):
    model, seen, evaluated = Tiny(), [], []
    names = [name for name, tensor in model.state_dict().items() if tensor.is_floating_point()]
    average = {name: model.state_dict()[name].clone() for name in names}

    def follow():
        for n, tensor in enumerate(seen, start=len(followed) + 1):
            decay = min(0.9, (1 + n) / (10 + n))
            for name in names:
                average[name] = decay * average[name] + (1 - decay) * tensor[name]
            followed.append(n)
        seen.clear()

    followed = []

    def note(_):
        evaluated.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return {}

    step = torch.optim.SGD.step

    def stepped(self, *given):
        step(self, *given)
        seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})

    torch.optim.SGD.step = stepped
    try:
        train(model, digits, cross_entropy, replace(QUICK, epochs=1, ema=0.9), after_epoch=note)
    finally:
        torch.optim.SGD.step = step
    last = seen[-1]
    follow()
    for name in names:
        torch.testing.assert_close(model.state_dict()[name], average[name])
        assert torch.equal(evaluated[0][name], model.state_dict()[name])
    assert any(not torch.equal(last[name], model.state_dict()[name]) for name in names)


def test_the_average_goes_in_and_out_of_the_network():
    model = Tiny()
    average = Average(model, 0.5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        model.head.weight += 1
    average.update()
    with average.inside():
        torch.testing.assert_close(model.head.weight, before["head.weight"] + 1 - 2 / 11)
    torch.testing.assert_close(model.head.weight, before["head.weight"] + 1)


@pytest.mark.parametrize("accumulate", [2, 4])
def test_micro_batches_without_batch_statistics_equal_one_batch(digits, accumulate):
    start = randomise_batchnorm(Tiny())
    config = replace(QUICK, lr=0.05, freeze_batchnorm=True)
    whole, parts = copy.deepcopy(start), copy.deepcopy(start)
    one = train(whole, digits, cross_entropy, config)
    other = train(parts, digits, cross_entropy, replace(config, accumulate=accumulate))
    for a, b in zip(one, other, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)


def test_mixed_precision_learns_and_keeps_float32_weights(digits):
    model = Tiny()
    history = train(model, digits, cross_entropy, replace(QUICK, epochs=15, precision="bfloat16"))
    assert history[-1]["loss"] < 0.7 * history[0]["loss"]
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    with pytest.raises(BadConfig, match="precision float16 needs a GPU: use bfloat16"):
        train(model, digits, cross_entropy, replace(QUICK, precision="float16"))


def test_a_fading_network_is_compiled_once_and_trains_alike(digits, monkeypatch):
    from torch._dynamo.utils import counters

    monkeypatch.setattr("dslib.finetuning.check_teacher", lambda *_: None)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    teacher = Tiny()
    faded = dslib.fade(teacher, dslib.find_sites(teacher, 16).mask([]), nn.ReLU6)
    config = dslib.Finetune(epochs=2, lr=0.1, batch_size=32)
    torch._dynamo.reset()
    counters.clear()
    plain = dslib.finetune(faded, digits, None, config)
    compiled = dslib.finetune(faded, digits, None, replace(config, compile=True))
    assert 1 <= counters["stats"]["unique_graphs"] <= 2
    for a, b in zip(plain.history, compiled.history, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    assert list(plain.model.state_dict()) == list(compiled.model.state_dict())


def test_a_gradient_that_is_not_finite_stops_with_its_place(digits):
    calls = []

    def loss(model, images, labels):
        calls.append(1)
        value = cross_entropy(model, images, labels)
        return value + (model(images).sum() * 0).sqrt() if len(calls) == 3 else value  # 0, its gradient is infinite

    model = Tiny()
    with pytest.raises(DslibError, match=r"the gradient's norm is (nan|inf) at epoch 1, batch 3: lower"):
        train(model, digits, loss, QUICK)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_a_loader_that_stalls_is_told_with_the_remedy(digits, monkeypatch):
    class Slow(Shifts):
        def __call__(self, images, numbers):
            time.sleep(0.05)
            return super().__call__(images, numbers)

    monkeypatch.setattr("dslib.training.watching.WINDOW", 0.1)
    monkeypatch.setattr("dslib.training.watching.STALLED", 0.6)
    said = []
    slow = replace(digits, train=replace(digits.train, augment=Slow()))
    train(Tiny(), slow, cross_entropy, QUICK, log=Log(echo=said.append))
    warnings = [line for line in said if line.startswith("warning")]
    assert len(warnings) == 1
    assert "waits for its images" in warnings[0]
    assert "augmented one by one" in warnings[0]  # they are in memory: workers would not help
    said.clear()
    train(Tiny(), digits, cross_entropy, QUICK, log=Log(echo=said.append))
    assert [line.split(":")[0] for line in said] == ["train 1/3", "train 2/3", "train 3/3"]
    assert all("images/s" in line and "minutes left" in line for line in said)


def test_a_history_is_written_as_csv_and_for_tensorboard(digits, tmp_path):
    log = Log(tmp_path, tensorboard=True)
    history = train(
        Tiny(), digits, cross_entropy, QUICK, log=log, after_epoch=lambda _: {"val_accuracy": 0.5, "m": [1]}
    )
    with (tmp_path / "train.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["loss"]) for row in rows] == [row["loss"] for row in history]
    assert list(rows[0]) == ["epoch", "loss", "seconds", "val_accuracy"]
    (events,) = (tmp_path / "tensorboard" / "train").iterdir()
    assert b"val_accuracy" in events.read_bytes()


def test_a_trial_ends_after_its_steps(digits):
    with pytest.raises(Enough) as trial:
        train(Tiny(), digits, cross_entropy, QUICK, log=Log(steps=4))
    assert len(trial.value.ended) == 5
    assert trial.value.steps == 18


def test_features_and_the_teacher_in_mixed_precision(digits, monkeypatch):
    monkeypatch.setattr("dslib.finetuning.check_teacher", lambda *_: None)
    teacher = randomise_batchnorm(Tiny())
    seen = []
    teacher.head.register_forward_hook(lambda module, given, output: seen.append(output.dtype))
    small = dslib.shrink(teacher, dslib.find_sites(teacher, 16).mask([]), nn.ReLU6, 16)
    config = dslib.Finetune(epochs=1, lr=0.1, batch_size=32, features=1.0, precision="bfloat16")
    seen.clear()
    done = dslib.finetune(small, digits, teacher, config)
    assert math.isfinite(done.history[0]["loss"])
    assert torch.bfloat16 in seen


def test_features_of_another_network_are_refused(digits, monkeypatch):
    monkeypatch.setattr("dslib.finetuning.check_teacher", lambda *_: None)
    model = randomise_batchnorm(Tiny())
    small = dslib.shrink(model, dslib.find_sites(model, 16).mask([]), None, 16)
    config = dslib.Finetune(epochs=1, batch_size=32, features=1.0)
    with pytest.raises(BadModel, match=r"features: the teacher has no blocks\.0, blocks\.1, blocks\.2: give"):
        dslib.finetune(small, digits, wide(), config)
    other = Tiny()
    other.blocks[2] = nn.Sequential(nn.Conv2d(6, 8, 1), nn.Conv2d(8, 6, 1, 2))
    with pytest.raises(BadModel, match=r"features: blocks\.2 gives \(32, 6, 4, 4\), the teacher's \(32, 6, 2, 2\)"):
        dslib.finetune(small, digits, other, config)


def test_features_are_compared_after_the_boundary_activation(digits, monkeypatch):
    monkeypatch.setattr("dslib.finetuning.check_teacher", lambda *_: None)
    teacher = randomise_batchnorm(Tiny()).eval()
    mask = dslib.find_sites(teacher, 16).mask([])
    small = dslib.shrink(teacher, mask, nn.ReLU6, 16).eval()
    images, names = torch.randn(4, 3, 16, 16), list(mask)
    own, guide = Maps(small, names), Maps(teacher, names)
    small(images), teacher(images)
    found = feature_distance(small, own.last, guide.last)
    wanted = torch.stack(
        [(own.last[n] - guide.last[n].clamp(0, 6)).square().mean() / guide.last[n].clamp(0, 6).var() for n in names]
    ).mean()
    torch.testing.assert_close(found, wanted)
    own.forget(), guide.forget()
    before = dict(own.last)
    small(torch.zeros_like(images))
    assert all(own.last[n] is before[n] for n in names)
    config = dslib.Finetune(epochs=4, lr=0.1, batch_size=32, features=1.0)
    done = {w: dslib.finetune(small, digits, teacher, replace(config, features=w)).model for w in (0.0, 5.0)}
    distances = {}
    for weight, model in done.items():
        own, guide = Maps(model, names), Maps(teacher, names)
        model(images), teacher(images)
        distances[weight] = feature_distance(model, own.last, guide.last).item()
        guide.forget()
    assert distances[5.0] < distances[0.0]
    for teacher_given, network in ((None, small), (teacher, teacher)):
        with pytest.raises(BadConfig, match="features: expected a teacher, and a network from shrink or fade"):
            dslib.finetune(network, digits, teacher_given, config)


def test_set_fade_reaches_compiled_networks(tiny):
    faded = dslib.fade(tiny.float(), dslib.find_sites(tiny, 16).mask([])).eval()
    compiled, x = torch.compile(faded, backend="eager"), torch.randn(2, 3, 16, 16)
    for t in (0.0, 0.3, 1.0):
        set_fade(faded, t)
        torch.testing.assert_close(compiled(x), faded(x))


@pytest.mark.parametrize(
    "field",
    [
        {"rand_augment": 11},
        {"erase": 2},
        {"ema": 1},
        {"accumulate": 0},
        {"precision": "half"},
        {"save_minutes": 0},
        {"mixup": -1},
        {"workers": -1},
        {"lr": math.nan},
    ],
)
def test_more_settings_out_of_range(field):
    with pytest.raises(BadConfig, match=f"{next(iter(field))}: expected"):
        Train(**field)
