"""Files are there whole or not at all."""

import json

import mlx.core as mx
import pytest

from nalora_mlx import checkpoint


def names(directory):
    return sorted(p.name for p in directory.iterdir())


def test_files_are_written_whole(tmp_path):
    path = tmp_path / "a" / "x.safetensors"
    checkpoint.write_file(path, checkpoint.arrays_writer({"a": mx.arange(3)}))
    assert mx.load(str(path))["a"].tolist() == [0, 1, 2]
    checkpoint.write_file(path.with_name("x.json"), checkpoint.json_writer({"b": 1, "a": "é"}))
    assert json.loads(path.with_name("x.json").read_text()) == {"a": "é", "b": 1}
    assert names(path.parent) == ["x.json", "x.safetensors"]


def fail(path):
    path.write_text("half")
    raise OSError(28, "No space left on device")


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "x.json"
    checkpoint.write_file(path, checkpoint.json_writer(1))
    with pytest.raises(OSError, match="No space"):
        checkpoint.write_file(path, fail)
    assert json.loads(path.read_text()) == 1
    assert names(tmp_path) == ["x.json"]
    directory = tmp_path / "step"
    checkpoint.write_directory(directory, {"a.json": checkpoint.json_writer(1)})
    with pytest.raises(OSError, match="No space"):
        checkpoint.write_directory(directory, {"a.json": checkpoint.json_writer(2), "b": fail})
    assert json.loads((directory / "a.json").read_text()) == 1
    assert names(tmp_path) == ["step", "x.json"]


def test_a_directory_is_replaced_whole(tmp_path):
    directory = tmp_path / "best"
    checkpoint.write_directory(
        directory, {"a.json": checkpoint.json_writer(1), "b.json": checkpoint.json_writer(1)}
    )
    checkpoint.write_directory(directory, {"a.json": checkpoint.json_writer(2)})
    assert names(directory) == ["a.json"]
    assert names(tmp_path) == ["best"]


def test_setting_aside_counts_up(tmp_path):
    assert checkpoint.set_aside(tmp_path, ("a", "b")) is None
    for number in ("1", "2"):
        (tmp_path / "a").write_text(number)
        assert checkpoint.set_aside(tmp_path, ("a", "b")) == tmp_path / "previous" / number
        assert (tmp_path / "previous" / number / "a").read_text() == number
    assert names(tmp_path) == ["previous"]
