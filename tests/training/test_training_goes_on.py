"""Stopped and taken up: signals, states, evaluations; what is left ends as one that was never stopped."""

import copy
import os
import signal
import time
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import Tiny, cross_entropy, same

from dslib.data.augmenting import Shifts
from dslib.models.weights import load_tensors
from dslib.training.loop import train
from dslib.training.settings import Train

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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("settings", [{}, {"ema": 0.9, "accumulate": 2, "freeze_batchnorm": True, "mixup": 0.2}])
def test_a_signal_in_the_middle_of_an_epoch_leaves_no_trace(digits, tmp_path, number, settings):
    data = replace(digits, train=replace(digits.train, augment=Shifts()))
    config, start, steps = replace(QUICK, **settings), Dropping().to(memory_format=torch.channels_last), []
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
        train(
            copy.deepcopy(start),
            digits,
            cross_entropy,
            QUICK,
            before_step=interrupt,
            checkpoint=path,
            after_epoch=lambda epoch: evaluated.append(epoch) or {},
        )
    assert evaluated == list(range(1, step // 6))
    again = train(copy.deepcopy(start), digits, cross_entropy, QUICK, checkpoint=path)
    assert [row["loss"] for row in again] == [row["loss"] for row in expected]


def test_signals_while_it_saves_are_heeded_afterwards(digits, tmp_path, monkeypatch):
    from dslib.training import state

    saved, write = [], state.save_state

    def save(path, tensors, meta):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        write(path, tensors, meta)
        saved.append(meta["place"]["step"])

    monkeypatch.setattr("dslib.training.state.save_state", save)
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
    again = train(
        copy.deepcopy(start), digits, cross_entropy, QUICK, after_epoch=stop, checkpoint=path, before_step=steps.append
    )
    assert steps[:2] == [11 / 18, 12 / 18]  # told where it stands, then the third epoch's steps
    assert len(steps) == 7
    assert [row["loss"] for row in again] == [row["loss"] for row in expected]
    assert [row["n"] for row in again] == [1, 2, 3]


def test_the_state_is_saved_every_so_many_minutes(digits, tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(
        "dslib.training.state.save_state", lambda path, tensors, meta: saved.append(meta["place"]["step"])
    )
    config = replace(QUICK, epochs=1, save_minutes=1e-6)
    train(Tiny(), digits, cross_entropy, config, checkpoint=tmp_path / "x.safetensors")
    assert saved == [1, 2, 3, 4, 5, 6, 6, 0]
    saved.clear()
    train(Tiny(), digits, cross_entropy, replace(config, save_minutes=60), checkpoint=tmp_path / "y.safetensors")
    assert saved == [6, 0]
