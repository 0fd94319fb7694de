"""Records and other JSON files: written whole or not at all."""

import json
import os
import shlex

import pytest

from dslib import records
from dslib.errors import BadConfig, BadRecord


def test_a_record_round_trips(tmp_path):
    record = records.Record("run", "dslib run", {"seed": 0}, {"x": 1.5}, records.machine(device="cpu"), "abc")
    assert records.Record.load(record.save(tmp_path / "r.json")) == record
    assert {"processor", "torch", "python", "device"} <= set(record.machine)
    (tmp_path / "x.json").write_text('{"name": 1}')
    with pytest.raises(BadRecord, match="is not a result record"):
        records.Record.load(tmp_path / "x.json")


def test_a_records_command_can_be_given_to_a_shell():
    words = records.as_words({"seed": 0, "model_option": ("width_mult=0.5", "setting=[[1, 16]]")})
    assert shlex.split(words) == [
        "--seed",
        "0",
        "--model-option",
        "width_mult=0.5",
        "--model-option",
        "setting=[[1, 16]]",
    ]


@pytest.mark.parametrize(
    ("content", "text"), [("{", "not readable JSON"), ("[1]", "expected a JSON object, found list")]
)
def test_json_that_is_none(tmp_path, content, text):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(BadRecord, match=text):
        records.read_json(tmp_path / "x.json")
    with pytest.raises(BadRecord, match="no file"):
        records.read_json(tmp_path / "y.json")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x.json"
    records.write_json(path, {"old": True})
    with pytest.raises(TypeError):
        records.write_json(path, {"new": object()})
    with pytest.raises(BadConfig, match=r"cannot write .*No space left"), records.whole_file(path) as partial:
        partial.write_text("half")
        raise OSError(28, os.strerror(28))
    assert json.loads(path.read_text()) == {"old": True}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadConfig, match="cannot write .*: choose another folder"):
        records.write_json(tmp_path / "file" / "x.json", {})
