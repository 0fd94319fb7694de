"""The one training loop: what it promises of steps, precision, averages, random numbers, and what it tells."""

import copy
import csv
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import Tiny, cross_entropy, randomise_batchnorm

import dslib
from dslib.errors import BadConfig, DslibError
from dslib.training.engine import Average
from dslib.training.evaluating import predict, top1
from dslib.training.expanding import Boost
from dslib.training.loop import groups, train
from dslib.training.settings import Train, lr_at
from dslib.training.watching import Enough, Log, Reporter

QUICK = Train(epochs=2, lr=0.5, batch_size=32)


def test_training_learns(digits):
    model = Tiny()
    history = train(model, digits, cross_entropy, replace(QUICK, epochs=15))
    assert history[-1]["loss"] < 0.7 * history[0]["loss"]
    assert dslib.evaluate(model, digits.val) > 0.3
    assert [row["epoch"] for row in history] == list(range(1, 16))


def test_the_learning_rate_warms_up_and_falls():
    config = Train(epochs=10, lr=0.1, batch_size=512, warmup=1, final_lr=0.02)
    assert lr_at(0, config) == 0
    assert math.isclose(lr_at(0.05, config), 0.1)
    assert math.isclose(lr_at(0.1, config), 0.2)
    assert math.isclose(lr_at(0.55, config), (0.2 + 0.02) / 2)
    assert math.isclose(lr_at(1, config), 0.02)


def test_a_groups_learning_rate_is_scaled(digits):
    """One plain step moves a weight by its rate times its gradient."""
    config = Train(epochs=1, lr=0.1, batch_size=192, momentum=0, clip=1e9, augment=False)
    start, moved = Tiny(), []
    for scale in (1.0, 0.25):
        model = copy.deepcopy(start)
        before = model.head.weight.detach().clone()
        groups = [{"params": list(model.blocks.parameters())}, {"params": [model.head.weight], "lr_scale": scale}]
        train(model, digits, cross_entropy, config, parameters=groups)
        moved.append(model.head.weight.detach() - before)
    torch.testing.assert_close(moved[1], 0.25 * moved[0], rtol=1e-3, atol=1e-7)
    assert moved[0].abs().max() > 0


def test_a_steps_gradient_is_no_longer_than_the_clip(digits):
    """One plain step moves all weights together by the rate times the clip, where the gradient is longer."""
    config = Train(epochs=1, lr=0.1, batch_size=192, momentum=0, weight_decay=0, clip=0.01, augment=False)
    model = Tiny()
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    train(model, digits, cross_entropy, config)
    moved = torch.cat([p.detach().flatten() for p in model.parameters()]) - before
    assert math.isclose(float(moved.norm()), lr_at(0, config) * config.clip, rel_tol=1e-3)


def test_weights_of_two_dimensions_decay_and_no_others():
    model = Tiny()
    decay = {id(p): group["weight_decay"] for group in groups(model, QUICK) for p in group["params"]}
    assert {name: decay[id(p)] for name, p in model.named_parameters()} == {
        name: QUICK.weight_decay if p.ndim > 1 else 0.0 for name, p in model.named_parameters()
    }


def test_chance_differs_from_step_to_step(digits):
    drawn = []

    def loss(model, images, labels):
        drawn.append(float(torch.rand(())))
        return cross_entropy(model, images, labels)

    train(Tiny(), digits, loss, QUICK)
    assert len(set(drawn)) == len(drawn) == QUICK.epochs * len(digits.train) // QUICK.batch_size


def test_the_callers_random_numbers_go_on_as_if_nothing_was_trained(digits):
    model = Tiny()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train(model, digits, cross_entropy, replace(QUICK, mixup=0.2))
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(5)
    with pytest.raises(DslibError):
        train(model, digits, lambda *given: cross_entropy(*given) * math.nan, QUICK)
    assert torch.equal(torch.rand(3), expected)


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


def test_the_moving_average_is_evaluated_and_kept(digits):
    config, start, weights, evaluated = replace(QUICK, epochs=1), Tiny(), [], []

    def note(network):
        weights.append({name: tensor.clone() for name, tensor in network.state_dict().items()})

    plain, model = copy.deepcopy(start), copy.deepcopy(start)
    train(plain, digits, cross_entropy, config, before_step=lambda _: note(plain))
    note(plain)
    average, *steps = weights
    for n, step in enumerate(steps, 1):
        decay = min(0.9, (1 + n) / (10 + n))
        average = {
            k: decay * average[k] + (1 - decay) * step[k] if t.is_floating_point() else t for k, t in step.items()
        }

    def keep(_):
        evaluated.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return {}

    train(model, digits, cross_entropy, replace(config, ema=0.9), after_epoch=keep)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, average[name])
        assert torch.equal(evaluated[0][name], tensor)
    assert not torch.equal(steps[-1]["head.weight"], model.head.weight)


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


def test_a_loss_that_is_not_finite_stops_with_its_place(digits):
    with pytest.raises(DslibError, match=r"the loss is nan at epoch 1, batch 2: lower the learning rate"):
        calls = iter([1.0, math.nan])
        train(Tiny(), digits, lambda m, x, y: cross_entropy(m, x, y) * next(calls), QUICK)


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


@pytest.mark.parametrize(
    ("first", "wait", "told"),
    [(1.0, 1.0, True), (0.0, 0.1, False), (9.0, 0.1, False)],  # what an epoch's first images take is not a stall
)
def test_a_training_that_waits_for_its_images_is_told_once_with_the_remedy(monkeypatch, first, wait, told):
    now, said, history = [0.0], [], []
    monkeypatch.setattr("dslib.training.watching.time", SimpleNamespace(perf_counter=lambda: now[0]))
    feed = SimpleNamespace(steps=10, remedy="do this")
    reporter = Reporter(Log(echo=said.append), "train", Train(epochs=5, batch_size=20), feed, history, 0)

    def images():
        for i in range(feed.steps):
            now[0] += wait if i else first
            yield i

    for epoch in range(1, 6):  # epochs are shorter than the time that is judged as a whole
        for _ in reporter.waiting(images()):
            now[0] += 1  # second that a step takes
            reporter.step()
        now[0] += 9  # an evaluation
        history.append({"epoch": epoch, "loss": 0.5})
        reporter.epoch(history)
    reporter.close()
    warnings = [line for line in said if line.startswith("warning")]
    assert len(warnings) == told
    assert all(re.fullmatch("warning: train waits for its images (4|5).% of the time: do this", w) for w in warnings)
    lines = [line for line in said if line not in warnings]
    assert [line.split(":")[0] for line in lines] == [f"train {epoch}/5" for epoch in range(1, 6)]
    assert all("loss 0.5000; " in line and "images/s" in line and "minutes left" in line for line in lines)


def test_a_history_is_written_as_csv_and_for_tensorboard(digits, tmp_path):
    said = []
    log = Log(tmp_path, tensorboard=True, echo=said.append)
    history = train(
        Tiny(), digits, cross_entropy, QUICK, log=log, after_epoch=lambda _: {"val_accuracy": 0.5, "m": [1]}
    )
    with (tmp_path / "train.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["loss"]) for row in rows] == [row["loss"] for row in history]
    assert list(rows[0]) == ["epoch", "loss", "seconds", "val_accuracy"]
    (events,) = (tmp_path / "tensorboard" / "train").iterdir()
    assert b"val_accuracy" in events.read_bytes()
    assert [line.split(":")[0] for line in said] == ["train 1/2", "train 2/2"]


def test_a_trial_ends_after_its_steps(digits):
    with pytest.raises(Enough) as trial:
        train(Tiny(), digits, cross_entropy, QUICK, log=Log(steps=4))
    assert len(trial.value.ended) == 5
    assert trial.value.steps == 12


def test_evaluation_counts_every_image_once(digits):
    model = Tiny()
    logits = predict(model, digits.val, batch_size=50)  # 96 is no multiple of 50
    assert logits.shape == (96, 10)
    assert top1(logits, digits.val) == (logits.argmax(1) == digits.val.labels).sum().item() / 96
    assert model.training


WRONG = """epochs=-1 batch_size=1
lr=0 lr=nan label_smoothing=1 clip=0 momentum=1 warmup=-1 rand_augment=11 erase=2 ema=1
accumulate=0 precision=half save_minutes=0 mixup=-1 workers=-1 alpha=2 temperature=0 fade=1 ratio=0 fade_from=0.8"""


@pytest.mark.parametrize("wrong", WRONG.split())
def test_settings_out_of_range(wrong):
    field, value = wrong.split("=")
    kind = next(kind for kind in (Train, dslib.Finetune, Boost) if hasattr(kind, field))
    with pytest.raises(BadConfig, match=f"^{field}.*: expected"):
        kind(**{field: value if field == "precision" else float(value)})


def test_a_batch_larger_than_the_data(digits):
    with pytest.raises(BadConfig, match="batch_size 500 is larger than the split of 192 images"):
        train(Tiny(), digits, cross_entropy, replace(QUICK, batch_size=500))
