"""Tensors in files: whole, checked, and nobody's code is run."""

import pytest
import torch

from dslib.errors import BadModel, BadRecord
from dslib.models.weights import load_state_dict, load_tensors, save_tensors


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
