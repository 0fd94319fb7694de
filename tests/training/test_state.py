"""A training's state on disk: damaged files, a full disk, a kill between two writes, two runs in one folder."""

import copy
import json
import random
import resource
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from conftest import Tiny, cross_entropy
from safetensors.torch import save_file

from dslib.errors import BadConfig
from dslib.models.weights import digest, load_tensors, save_tensors
from dslib.training.loop import train
from dslib.training.settings import Train
from dslib.training.state import before_last, claimed, load_state, remove_state, save_state

QUICK = Train(epochs=2, lr=0.5, batch_size=32)
ONE, TWO = {"a": torch.ones(3)}, {"a": torch.zeros(3)}


def anything(tensors, meta):
    """Takes every state."""


def test_the_newest_whole_state_is_taken(tmp_path, capsys):
    path = tmp_path / "x.partial.safetensors"
    assert load_state(path, anything) is None
    save_state(path, ONE, {"n": 1})
    save_state(path, TWO, {"n": 2})
    tensors, meta = load_state(path, anything)
    assert torch.equal(tensors["a"], TWO["a"])
    assert meta == {"n": 2}
    path.write_bytes(path.read_bytes()[:-1])
    assert load_state(path, anything)[1] == {"n": 1}
    assert "the one before is used" in capsys.readouterr().out
    assert not path.exists()  # or the next save would put it in the place of the whole one
    assert load_state(path, anything)[1] == {"n": 1}
    save_state(path, TWO, {"n": 2})
    path.replace(path.with_name("x.partial.new.safetensors"))  # killed between the two renames
    (tmp_path / ".x.partial.new.abc.partial.safetensors").write_bytes(b"half")  # killed in the middle of a write
    assert load_state(path, anything)[1] == {"n": 2}
    assert sorted(one.name for one in tmp_path.iterdir()) == [
        "x.partial.before.safetensors",
        "x.partial.new.safetensors",
    ]
    save_state(path, TWO, {"n": 3})
    assert load_tensors(before_last(path))[1] == {"n": 1}
    assert load_state(path, anything)[1] == {"n": 3}
    remove_state(path)
    assert not list(tmp_path.iterdir())


def test_a_whole_new_state_is_taken_before_the_last(tmp_path):
    """Killed after the new state was written, before it took the last one's place."""
    path = tmp_path / "x.partial.safetensors"
    save_state(path, ONE, {"n": 1})
    save_tensors(path.with_name("x.partial.new.safetensors"), TWO, {"n": 2})
    assert load_state(path, anything)[1] == {"n": 2}


def test_a_state_that_cannot_be_read_just_now_is_not_taken_for_damaged(tmp_path):
    path = tmp_path / "x.safetensors"
    save_state(path, ONE, {})
    save_state(path, TWO, {})
    path.unlink()
    path.mkdir()
    with pytest.raises(BadConfig, match="cannot be read .*: mend that, or remove it"):
        load_state(path, anything)
    assert before_last(path).exists()


def test_an_error_of_the_system_destroys_no_state(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    save_state(path, ONE, {})
    save_state(path, TWO, {})

    def fails(*_, **__):
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr("safetensors.safe_open", fails)
    with pytest.raises(BadConfig, match=r"x\.safetensors cannot be read \(Stale file handle\): mend that"):
        load_state(path, anything)
    monkeypatch.undo()
    assert load_state(path, anything)[0].keys() == TWO.keys()
    assert before_last(path).exists()


def test_a_state_whose_checksum_has_lost_its_name_is_damaged(tmp_path, capsys):
    path = tmp_path / "x.safetensors"
    save_state(path, ONE, {})
    path.write_bytes(path.read_bytes().replace(b'"sha256"', b'"sha257"'))
    assert load_state(path, anything) is None
    assert "does not match its checksum" in capsys.readouterr().out


def test_a_full_disk_leaves_the_last_state_whole(digits, tmp_path):
    path = tmp_path / "x.safetensors"
    start = Tiny()
    expected = train(copy.deepcopy(start), digits, cross_entropy, QUICK)

    def fill(epoch):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100 if epoch == 2 else limits[0], limits[1]))
        return {}

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(BadConfig, match=r"cannot write .*File too large"):
            train(copy.deepcopy(start), digits, cross_entropy, QUICK, after_epoch=fill, checkpoint=path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["x.before.safetensors", "x.safetensors"]
    assert len(load_tensors(path)[1]["place"]["history"]) == 1
    again = train(copy.deepcopy(start), digits, cross_entropy, QUICK, checkpoint=path)
    assert [row["loss"] for row in again] == [row["loss"] for row in expected]


class Trap:
    """Tells, if it is unpickled."""

    def __reduce__(self):
        return (open, ("executed", "w"))


def _damaged(whole: bytes, tensors, meta, path, rng) -> None:
    """Write one of many kinds of damage."""
    kind = rng.randrange(8)
    if kind == 0:
        path.write_bytes(whole[: rng.randrange(len(whole))])
    elif kind == 1:
        content = bytearray(whole)
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
    elif kind == 2:
        torch.save({"model": Trap(), "x": torch.ones(2)}, path)
    elif kind == 3:
        path.write_bytes(rng.randbytes(rng.randrange(2000)))
    elif kind == 4:  # whole by its checksum, wrong by its tensors
        gone = rng.choice(sorted(tensors))
        save_tensors(
            path,
            {name: tensor for name, tensor in tensors.items() if name != gone or "momentum" in name},
            meta | ({"place": None} if "momentum" in gone else {}),
        )
    elif kind == 5:
        name = rng.choice([name for name in sorted(tensors) if tensors[name].ndim])
        save_tensors(path, tensors | {name: torch.zeros(*tensors[name].shape, 2)}, meta)
    elif kind == 6:  # whole by its checksum, wrong by what it says of itself
        wrong = rng.choice(
            [
                None,
                3,
                "x",
                [],
                {"epoch": -1},
                {"epoch": "1", "step": None},
                {"history": 5},
                {"epoch": 0, "step": 1, "total": "much", "seconds": 0.0, "history": []},
            ]
        )
        save_tensors(path, tensors, meta | {"place": wrong})
    else:
        text = rng.choice(["", "{", "[1]", "null", '"x"', '{"config": 1}', json.dumps(meta).replace("0.5", "0.6")])
        save_file(tensors, str(path), metadata={"dslib": text, "sha256": digest(tensors)})


def test_of_two_hundred_damaged_states_none_is_loaded_or_run(digits, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config, start, path = replace(QUICK, epochs=1), Tiny(), tmp_path / "x.safetensors"
    train(copy.deepcopy(start), digits, cross_entropy, config, checkpoint=path)
    whole, (tensors, meta) = path.read_bytes(), load_tensors(path)
    rng, loaded = random.Random(0), 0
    for _ in range(200):
        capsys.readouterr()
        for one in tmp_path.glob("*.safetensors"):
            one.unlink()
        _damaged(whole, tensors, meta, path, rng)
        if path.read_bytes() == whole:
            continue
        model = copy.deepcopy(start)
        try:
            train(model, digits, _never, config, checkpoint=path)
            loaded += 1
        except Began:
            assert "warning" in capsys.readouterr().out  # the training began anew, and said why
    assert loaded == 0
    assert not (tmp_path / "executed").exists()


class Began(Exception):
    """The training makes its first step."""


def _never(model, images, labels):
    raise Began


HOLD = (
    "import sys, time; from pathlib import Path; from dslib.training.state import claimed\n"
    "with claimed(Path(sys.argv[1]), folder=True):\n    print('held', flush=True); time.sleep(60)"
)


def test_a_second_run_in_one_folder_is_refused_until_the_first_is_gone(tmp_path):
    out = tmp_path / "run"
    first = subprocess.Popen([sys.executable, "-c", HOLD, str(out)], stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "held\n"
    with pytest.raises(BadConfig, match="is being written by another run"), claimed(out, folder=True):
        pass
    first.kill()
    first.wait()
    first.stdout.close()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            with claimed(out, folder=True):
                break
        except BadConfig:
            time.sleep(0.1)
    else:
        raise AssertionError("a killed run's claim stays")
    with claimed(tmp_path / "a-0.5"), claimed(tmp_path / "a-0.7"):
        assert {".a-0.5.lock", ".a-0.7.lock"} <= {one.name for one in tmp_path.iterdir()}


def test_what_is_written_can_be_read_by_hand(digits, tmp_path):
    train(Tiny(), digits, cross_entropy, replace(QUICK, epochs=1), checkpoint=tmp_path / "x.safetensors")
    meta = load_tensors(tmp_path / "x.safetensors")[1]
    assert meta["config"]["lr"] == 0.5
    assert meta["place"]["epoch"] == 1
    assert json.dumps(meta)


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
    assert len(train(copy.deepcopy(start), digits, cross_entropy, free, checkpoint=path)) == 2
    for one in (path, before_last(path)):
        one.write_bytes(b"nothing")
    capsys.readouterr()
    last = train(copy.deepcopy(start), digits, cross_entropy, QUICK, checkpoint=path)
    assert capsys.readouterr().out.count("warning") == 2
    assert [row["loss"] for row in last] == [row["loss"] for row in expected]
