"""The loop, finetuning, evaluation, checkpoints."""

import copy
import math
import resource
from dataclasses import replace

import pytest
import torch
from conftest import Tiny, cross_entropy, randomise_batchnorm

import dslib
from dslib.errors import BadConfig, BadModel, BadRecord, DslibError
from dslib.finetuning import check_teacher, distillation
from dslib.models.weights import load_state_dict, load_tensors, save_tensors
from dslib.training.evaluating import predict, top1
from dslib.training.loop import train
from dslib.training.settings import Train, lr_at
from dslib.training.state import before_last

QUICK = Train(epochs=3, lr=0.5, batch_size=32)


def test_training_learns(digits):
    model = Tiny()
    history = train(model, digits, cross_entropy, replace(QUICK, epochs=15))
    assert history[-1]["loss"] < 0.7 * history[0]["loss"]
    assert dslib.evaluate(model, digits.val) > 0.3
    assert [row["epoch"] for row in history] == list(range(1, 16))


def test_the_learning_rate_warms_up_and_falls():
    config = Train(epochs=10, lr=0.1, batch_size=512, warmup=1, final_lr=0.0)
    assert lr_at(0, config) == 0
    assert math.isclose(lr_at(0.05, config), 0.1)
    assert math.isclose(lr_at(0.1, config), 0.2)
    assert math.isclose(lr_at(0.55, config), 0.1)
    assert math.isclose(lr_at(1, config), 0, abs_tol=1e-12)


@pytest.mark.parametrize("frozen", [False, True])
def test_batchnorm_may_keep_its_statistics(digits, frozen):
    model = randomise_batchnorm(Tiny())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train(model, digits, cross_entropy, replace(QUICK, epochs=1, freeze_batchnorm=frozen))
    same = {name for name, value in model.state_dict().items() if torch.equal(value, before[name])}
    statistics = {name for name in before if "running" in name}
    assert same & statistics == (statistics if frozen else set())
    assert not {name for name in same if name.endswith("weight")}


@pytest.mark.parametrize("augment", [False, True])
def test_augmentation_may_be_left_out(digits, augment):
    seen = []

    def note(images, numbers):
        assert numbers.shape[0] == len(images)
        assert 0 <= numbers.min() <= numbers.max() < 1
        seen.append(len(images))
        return images

    data = replace(digits, train=replace(digits.train, augment=note))
    train(Tiny(), data, cross_entropy, replace(QUICK, epochs=1, augment=augment))
    assert sum(seen) == (192 if augment else 0)


def test_a_stopped_training_resumes_without_a_trace(digits, tmp_path):
    straight = Tiny()
    stopped, fresh = copy.deepcopy(straight), copy.deepcopy(straight)
    expected = train(straight, digits, cross_entropy, QUICK)

    def stop(epoch):
        if epoch == 3:
            raise KeyboardInterrupt
        return {}

    path = tmp_path / "x.safetensors"
    with pytest.raises(KeyboardInterrupt):
        train(stopped, digits, cross_entropy, QUICK, after_epoch=stop, checkpoint=path)
    history = train(fresh, digits, cross_entropy, QUICK, checkpoint=path)
    assert [row["loss"] for row in history] == [row["loss"] for row in expected]
    assert all(
        torch.equal(a, b) for a, b in zip(fresh.state_dict().values(), straight.state_dict().values(), strict=True)
    )


def test_every_epoch_has_an_order_of_its_own_and_a_seed_repeats_it(digits):
    def orders(seed):
        seen = []

        def loss(model, images, labels):
            seen.extend(labels.tolist())
            return cross_entropy(model, images, labels)

        train(Tiny(), digits, loss, replace(QUICK, epochs=2, seed=seed))
        return seen[:192], seen[192:]

    first, second = orders(0)
    assert first != second
    assert sorted(first) == sorted(second) == sorted(digits.train.labels.tolist())
    assert orders(0) == (first, second)
    assert orders(1)[0] != first


@pytest.mark.parametrize(("alpha", "labels_matter"), [(1.0, False), (0.5, True)])
def test_alpha_weighs_the_teacher_against_the_labels(digits, monkeypatch, alpha, labels_matter):
    monkeypatch.setattr("dslib.finetuning.check_teacher", lambda *_: None)
    teacher, small = Tiny(), Tiny()
    config = dslib.Finetune(epochs=1, lr=0.1, batch_size=32, alpha=alpha)
    wrong = replace(digits, train=replace(digits.train, labels=(digits.train.labels + 1) % 10))
    a, b = (dslib.finetune(small, data, teacher, config).model.head.weight for data in (digits, wrong))
    assert torch.equal(a, b) != labels_matter
    other = dslib.finetune(small, digits, Tiny(), config).model.head.weight
    assert not torch.equal(a, other)  # the teacher matters in both


def test_a_damaged_state_is_passed_over_and_a_foreign_one_refused(digits, tmp_path, capsys):
    path, start = tmp_path / "x.safetensors", Tiny()
    expected = train(copy.deepcopy(start), digits, cross_entropy, QUICK)
    train(copy.deepcopy(start), digits, cross_entropy, QUICK, checkpoint=path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    again = train(copy.deepcopy(start), digits, cross_entropy, QUICK, checkpoint=path)
    said = capsys.readouterr().out
    assert "corrupt or truncated" in said
    assert "the one before is used" in said
    assert [row["loss"] for row in again] == [row["loss"] for row in expected]
    for other, settings, about, found in (
        (start, replace(QUICK, lr=0.1), "", "lr 0.5 there, 0.1 here"),
        (Tiny(), QUICK, "", "another network"),
        (start, QUICK, "a teacher", "another network, dataset, teacher or cost table"),
    ):
        with pytest.raises(BadConfig, match=f"is of a training with other settings .*{found}"):
            train(copy.deepcopy(other), digits, cross_entropy, settings, checkpoint=path, about=about)
    free = replace(QUICK, workers=1, save_minutes=5)
    assert len(train(copy.deepcopy(start), digits, cross_entropy, free, checkpoint=path)) == 3
    for one in (path, before_last(path)):
        one.write_bytes(b"nothing")
    capsys.readouterr()
    last = train(copy.deepcopy(start), digits, cross_entropy, QUICK, checkpoint=path)
    assert capsys.readouterr().out.count("warning") == 2
    assert [row["loss"] for row in last] == [row["loss"] for row in expected]


def test_a_loss_that_is_not_finite_stops_with_its_place(digits):
    with pytest.raises(DslibError, match=r"the loss is nan at epoch 1, batch 2: lower the learning rate"):
        calls = iter([1.0, math.nan])
        train(Tiny(), digits, lambda m, x, y: cross_entropy(m, x, y) * next(calls), QUICK)


def test_evaluation_counts_every_image_once(digits):
    model = Tiny()
    logits = predict(model, digits.val, batch_size=50)  # 96 is no multiple of 50
    assert logits.shape == (96, 10)
    assert top1(logits, digits.val) == (logits.argmax(1) == digits.val.labels).sum().item() / 96
    assert model.training


@pytest.mark.parametrize(
    "field",
    [
        {"epochs": -1},
        {"batch_size": 1},
        {"lr": 0},
        {"label_smoothing": 1},
        {"clip": 0},
        {"momentum": 1},
        {"warmup": -1},
    ],
)
def test_settings_out_of_range(field):
    with pytest.raises(BadConfig, match=f"{next(iter(field))}: expected"):
        Train(**field)


def test_a_batch_larger_than_the_data(digits):
    with pytest.raises(BadConfig, match="batch_size 500 is larger than the split of 192 images"):
        train(Tiny(), digits, cross_entropy, replace(QUICK, batch_size=500))


def test_distillation_is_least_for_the_teacher_itself():
    teacher = torch.randn(8, 5)
    own, other = distillation(teacher, teacher), distillation(torch.randn(8, 5), teacher)
    entropy = -(teacher.softmax(1) * teacher.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(own, entropy)
    assert other > own


def test_finetuning_recovers_and_leaves_its_arguments(digits):
    teacher = Tiny()
    train(teacher, digits, cross_entropy, replace(QUICK, epochs=15))
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


def test_a_stopped_fading_resumes_without_a_trace(digits, tmp_path, monkeypatch):
    teacher = Tiny()
    train(teacher, digits, cross_entropy, replace(QUICK, epochs=15))
    faded = dslib.fade(teacher, dslib.find_sites(teacher, 16).mask([]))
    config = dslib.Finetune(epochs=3, lr=0.1, batch_size=32)
    whole = dslib.finetune(faded, digits, teacher, config)
    path, rounds = tmp_path / "x.safetensors", iter([0, 1])

    def stop(*given):
        if next(rounds):
            raise KeyboardInterrupt
        return dslib.evaluate(*given)

    monkeypatch.setattr("dslib.finetuning.check_teacher", lambda *_: None)
    monkeypatch.setattr("dslib.finetuning.evaluate", stop)
    with pytest.raises(KeyboardInterrupt):
        dslib.finetune(faded, digits, teacher, config, path)
    monkeypatch.setattr("dslib.finetuning.evaluate", dslib.evaluate)
    again = dslib.finetune(faded, digits, teacher, config, path)
    expected = whole.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in again.model.state_dict().items())


def test_an_untrained_teacher_is_refused(digits):
    with pytest.raises(BadModel, match="chance is 10.0%: its head is not trained for these 10 classes"):
        check_teacher(Tiny(), digits)


def test_settings_of_finetuning_out_of_range():
    for field in ({"alpha": 2}, {"temperature": 0}, {"fade": 1}):
        with pytest.raises(BadConfig, match=f"{next(iter(field))}: expected"):
            dslib.Finetune(**field)


def test_tensors_round_trip_with_their_meta(tmp_path):
    tensors = {"a": torch.randn(2, 3), "b": torch.tensor(3), "c": torch.empty(0)}
    path = save_tensors(tmp_path / "x.safetensors", tensors, {"epoch": 3})
    found, meta = load_tensors(path)
    assert meta == {"epoch": 3}
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_a_changed_byte_is_noticed(tmp_path):
    path = save_tensors(tmp_path / "x.safetensors", {"a": torch.randn(20, 30)})
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(BadRecord, match="does not match its checksum"):
        load_tensors(path)
    with pytest.raises(BadRecord, match="no file"):
        load_tensors(tmp_path / "y.safetensors")


def test_a_full_disk_is_one_clear_error(tmp_path):
    path = save_tensors(tmp_path / "x.safetensors", {"a": torch.ones(3)})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(BadConfig, match="cannot write .*File too large.*: choose another folder"):
            save_tensors(path, {"a": torch.ones(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert torch.equal(load_tensors(path)[0]["a"], torch.ones(3))
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_loading_never_runs_code(tmp_path):
    class Trap:
        def __reduce__(self):
            return (print, ("executed",))

    torch.save({"a": Trap()}, tmp_path / "x.pt")
    with pytest.raises(BadModel, match="no readable checkpoint of plain tensors"):
        load_state_dict(tmp_path / "x.pt")
    torch.save([1, 2], tmp_path / "y.pt")
    with pytest.raises(BadModel, match="expected a state dict"):
        load_state_dict(tmp_path / "y.pt")
    (tmp_path / "empty.pt").write_bytes(b"")
    with pytest.raises(BadModel, match=r"empty\.pt is no readable checkpoint of plain tensors: EOFError"):
        load_state_dict(tmp_path / "empty.pt")
    torch.save({"state_dict": {"module.a": torch.ones(2)}}, tmp_path / "z.pt")
    assert list(load_state_dict(tmp_path / "z.pt")) == ["a"]
