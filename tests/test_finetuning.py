"""Stage 2: distillation, the teacher, feature statistics, fading; taken up again, compiled, in mixed precision."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import Tiny, randomise_batchnorm, same, wide
from torch import nn

import dslib
from dslib.errors import BadConfig, BadModel
from dslib.finetuning import Maps, check_teacher, distillation, feature_distance
from dslib.shrinking import set_fade
from dslib.training.loop import cross_entropy, train
from dslib.training.settings import Train


@pytest.fixture
def any_teacher(monkeypatch):
    """Teachers need not be trained."""
    monkeypatch.setattr("dslib.finetuning.check_teacher", lambda *_: None)


@pytest.mark.parametrize(("alpha", "labels_matter"), [(1.0, False), (0.5, True)])
def test_alpha_weighs_the_teacher_against_the_labels(digits, any_teacher, alpha, labels_matter):
    teacher, small = Tiny(), Tiny()
    config = dslib.Finetune(epochs=1, lr=0.1, batch_size=32, alpha=alpha)
    wrong = replace(digits, train=replace(digits.train, labels=(digits.train.labels + 1) % 10))
    a, b = (dslib.finetune(small, data, teacher, config).model.head.weight for data in (digits, wrong))
    assert torch.equal(a, b) != labels_matter
    other = dslib.finetune(small, digits, Tiny(), config).model.head.weight
    assert not torch.equal(a, other)  # the teacher matters in both


def test_distillation_is_least_for_the_teacher_itself():
    teacher = torch.randn(8, 5)
    own, other = distillation(teacher, teacher), distillation(torch.randn(8, 5), teacher)
    entropy = -(teacher.softmax(1) * teacher.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(own, entropy)
    assert other > own


def test_finetuning_recovers_and_leaves_its_arguments(digits):
    teacher = Tiny()
    train(teacher, digits, cross_entropy(), Train(epochs=15, lr=0.5, batch_size=32))
    mask = dslib.find_sites(teacher, 16).mask([])
    config = dslib.Finetune(epochs=10, lr=0.5, batch_size=32)
    for make in (dslib.shrink, dslib.fade):
        small = make(teacher, mask, torch.nn.ReLU6)
        before = {name: value.clone() for name, value in small.state_dict().items()}
        done = dslib.finetune(small, digits, teacher, config)
        assert all(torch.equal(value, before[name]) for name, value in small.state_dict().items())
        start = dslib.evaluate(dslib.shrink(teacher, mask, torch.nn.ReLU6), digits.val)
        assert dslib.evaluate(done.model, digits.val) > max(start, 0.3)
        x = torch.randn(2, 3, 16, 16)
        torch.testing.assert_close(dslib.merge(done.model)(x), done.model(x), rtol=1e-4, atol=1e-4)
        assert not done.model.training


def test_a_fading_stopped_in_an_evaluation_ends_as_one_that_was_not(digits, tmp_path, any_teacher, monkeypatch):
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
    assert same(again.model, whole.model)


def test_an_untrained_teacher_is_refused(digits):
    with pytest.raises(BadModel, match="chance is 10.0%: its head is not trained for these 10 classes"):
        check_teacher(Tiny(), digits)


def test_a_fading_network_is_compiled_once_and_trains_alike(digits, any_teacher, monkeypatch):
    from torch._dynamo.utils import counters

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


def test_features_and_the_teacher_in_mixed_precision(digits, any_teacher):
    teacher = randomise_batchnorm(Tiny())
    seen = []
    teacher.head.register_forward_hook(lambda module, given, output: seen.append(output.dtype))
    small = dslib.shrink(teacher, dslib.find_sites(teacher, 16).mask([]), nn.ReLU6, 16)
    config = dslib.Finetune(epochs=1, lr=0.1, batch_size=32, features=1.0, precision="bfloat16")
    seen.clear()
    done = dslib.finetune(small, digits, teacher, config)
    assert math.isfinite(done.history[0]["loss"])
    assert torch.bfloat16 in seen


def test_features_of_another_network_are_refused(digits, any_teacher):
    model = randomise_batchnorm(Tiny())
    small = dslib.shrink(model, dslib.find_sites(model, 16).mask([]), None, 16)
    config = dslib.Finetune(epochs=1, batch_size=32, features=1.0)
    with pytest.raises(BadModel, match=r"features: the teacher has no blocks\.0, blocks\.1, blocks\.2: give"):
        dslib.finetune(small, digits, wide(), config)
    other = Tiny()
    other.blocks[2] = nn.Sequential(nn.Conv2d(6, 8, 1), nn.Conv2d(8, 6, 1, 2))
    with pytest.raises(BadModel, match=r"features: blocks\.2 gives \(32, 6, 4, 4\), the teacher's \(32, 6, 2, 2\)"):
        dslib.finetune(small, digits, other, config)


def test_features_are_compared_after_the_boundary_activation(digits, any_teacher):
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
