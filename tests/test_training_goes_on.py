"""The loop's other promises: signals, moving average, micro-batches, precision, compiling, what it tells."""

import copy
import csv
import math
import os
import signal
import time
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import Tiny, randomise_batchnorm
from torch import nn

import dslib
from dslib.augmenting import Shifts
from dslib.checkpoints import load_tensors
from dslib.engine import Average
from dslib.errors import BadConfig, DslibError
from dslib.finetuning import Maps, feature_distance
from dslib.schedules import Train
from dslib.shrinking import set_fade
from dslib.training import train
from dslib.watching import Enough, Log

QUICK = Train(epochs=3, lr=0.5, batch_size=32)


@pytest.fixture(autouse=True)
def _hears_ctrl_c():
    """Also where the tests run in the background, and a shell made them ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Dropping(Tiny):
    """Tiny with dropout: its chance must be taken up too."""

    def forward(self, x):
        return self.head(F.dropout(self.blocks(self.stem(x)).mean((2, 3)), 0.3, self.training))


def cross_entropy(model, images, labels):
    return F.cross_entropy(model(images), labels)


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("settings", [{}, {"ema": 0.9, "accumulate": 2, "freeze_batchnorm": True, "mixup": 0.2}])
def test_a_signal_in_the_middle_of_an_epoch_leaves_no_trace(digits, tmp_path, number, settings):
    data = replace(digits, train=replace(digits.train, augment=Shifts()))
    config, start, steps = replace(QUICK, **settings), Dropping(), []
    straight, stopped, again = (copy.deepcopy(start) for _ in range(3))
    expected = train(straight, data, cross_entropy, config)

    def interrupt(progress):
        steps.append(progress)
        if len(steps) == 9:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    path = tmp_path / "x.safetensors"
    with pytest.raises(KeyboardInterrupt):
        train(stopped, data, cross_entropy, config, before_step=interrupt, checkpoint=path)
    assert signal.getsignal(number) is before
    place = load_tensors(path)[1]["place"]
    assert (place["epoch"], place["step"]) == (1, 3)  # six steps an epoch: the ninth was still done
    history = train(again, data, cross_entropy, config, checkpoint=path)
    assert [row["loss"] for row in history] == [row["loss"] for row in expected]
    assert same(again, straight)


@pytest.mark.parametrize("step", [6, 18])
def test_a_signal_in_the_last_step_of_an_epoch_is_heeded_before_the_evaluation(digits, tmp_path, step):
    start, path, steps, evaluated = Tiny(), tmp_path / "x.safetensors", [], []

    def interrupt(progress):
        steps.append(progress)
        if len(steps) == step:
            os.kill(os.getpid(), signal.SIGTERM)

    expected = train(copy.deepcopy(start), digits, cross_entropy, QUICK)
    with pytest.raises(KeyboardInterrupt):
        train(copy.deepcopy(start), digits, cross_entropy, QUICK, before_step=interrupt, checkpoint=path,
              after_epoch=lambda epoch: evaluated.append(epoch) or {})  # fmt: skip
    assert evaluated == list(range(1, step // 6))
    again = train(copy.deepcopy(start), digits, cross_entropy, QUICK, checkpoint=path)
    assert [row["loss"] for row in again] == [row["loss"] for row in expected]


def test_signals_while_it_saves_are_heeded_afterwards(digits, tmp_path, monkeypatch):
    from dslib import snapshots

    saved, write = [], snapshots.save_state

    def save(path, tensors, meta):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        write(path, tensors, meta)
        saved.append(meta["place"]["step"])

    monkeypatch.setattr("dslib.snapshots.save_state", save)
    start, path = Tiny(), tmp_path / "x.safetensors"
    with pytest.raises(KeyboardInterrupt):
        train(copy.deepcopy(start), digits, cross_entropy, QUICK, checkpoint=path)
    assert saved == [6]
    assert load_tensors(path)[1]["place"]["step"] == 6


def test_each_row_has_the_seconds_of_its_own_epoch(digits, tmp_path):
    def slow(epoch):
        time.sleep(0.3)
        return {}

    history = train(Tiny(), digits, cross_entropy, QUICK, after_epoch=slow, checkpoint=tmp_path / "x.safetensors")
    steps = [row["seconds"] for row in history]
    assert max(steps) < 0.25 + 2 * min(steps)  # neither the evaluation nor the epochs before are counted


def test_an_evaluation_taken_up_is_of_the_same_network(digits, tmp_path, monkeypatch):
    monkeypatch.setattr("dslib.finetuning.check_teacher", lambda *_: None)
    teacher = randomise_batchnorm(Tiny())
    faded = dslib.fade(teacher, dslib.find_sites(teacher, 16).mask([]), nn.ReLU6)
    config, path, calls = dslib.Finetune(epochs=3, lr=0.1, batch_size=32), tmp_path / "x.safetensors", []
    whole = dslib.finetune(faded, digits, teacher, config)

    def stop(*given):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return dslib.evaluate(*given)

    monkeypatch.setattr("dslib.finetuning.evaluate", stop)
    with pytest.raises(KeyboardInterrupt):
        dslib.finetune(faded, digits, teacher, config, path)
    again = dslib.finetune(faded, digits, teacher, config, path)
    assert [row["val_accuracy"] for row in again.history] == [row["val_accuracy"] for row in whole.history]


def test_an_interrupted_evaluation_does_not_repeat_the_epoch(digits, tmp_path):
    start, path, seen = Tiny(), tmp_path / "x.safetensors", []

    def stop(epoch):
        if epoch == 2 and not seen:
            seen.append(epoch)
            raise KeyboardInterrupt
        return {"n": epoch}

    expected = train(copy.deepcopy(start), digits, cross_entropy, QUICK)
    with pytest.raises(KeyboardInterrupt):
        train(copy.deepcopy(start), digits, cross_entropy, QUICK, after_epoch=stop, checkpoint=path)
    place = load_tensors(path)[1]["place"]
    assert (place["epoch"], place["step"]) == (1, 6)
    steps = []
    again = train(copy.deepcopy(start), digits, cross_entropy, QUICK, after_epoch=stop, checkpoint=path,
                  before_step=steps.append)  # fmt: skip
    assert steps[:2] == [11 / 18, 12 / 18]  # told where it stands, then the third epoch's steps
    assert len(steps) == 7
    assert [row["loss"] for row in again] == [row["loss"] for row in expected]
    assert [row["n"] for row in again] == [1, 2, 3]


def test_the_state_is_saved_every_so_many_minutes(digits, tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr("dslib.snapshots.save_state", lambda path, tensors, meta: saved.append(meta["place"]["step"]))
    config = replace(QUICK, epochs=1, save_minutes=1e-6)
    train(Tiny(), digits, cross_entropy, config, checkpoint=tmp_path / "x.safetensors")
    assert saved == [1, 2, 3, 4, 5, 6, 6, 0]
    saved.clear()
    train(Tiny(), digits, cross_entropy, replace(config, save_minutes=60), checkpoint=tmp_path / "y.safetensors")
    assert saved == [6, 0]


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

    monkeypatch.setattr("dslib.watching.WINDOW", 0.1)
    monkeypatch.setattr("dslib.watching.STALLED", 0.6)
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


def test_features_are_compared_after_the_boundary_activation(digits, monkeypatch):
    monkeypatch.setattr("dslib.finetuning.check_teacher", lambda *_: None)
    teacher = randomise_batchnorm(Tiny()).eval()
    mask = dslib.find_sites(teacher, 16).mask([])
    small = dslib.shrink(teacher, mask, nn.ReLU6, 16).eval()
    images, names = torch.randn(4, 3, 16, 16), list(mask)
    own, guide = Maps(small, names), Maps(teacher, names)
    small(images), teacher(images)
    found = feature_distance(small, own.last, guide.last)
    wanted = torch.stack([
        (own.last[n] - guide.last[n].clamp(0, 6)).square().mean() / guide.last[n].clamp(0, 6).var() for n in names
    ]).mean()  # fmt: skip
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
    [{"rand_augment": 11}, {"erase": 2}, {"ema": 1}, {"accumulate": 0}, {"precision": "half"}, {"save_minutes": 0},
     {"mixup": -1}, {"workers": -1}, {"lr": math.nan}],
)  # fmt: skip
def test_more_settings_out_of_range(field):
    with pytest.raises(BadConfig, match=f"{next(iter(field))}: expected"):
        Train(**field)
