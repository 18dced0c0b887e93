"""Files and directories are complete or absent."""

import errno
import fcntl
import json
import os

import mlx.core as mx
import pytest

from nalora_mlx.core import storage
from nalora_mlx.runs import checkpoints


def names(directory):
    return sorted(p.name for p in directory.iterdir())


def test_files_are_written(tmp_path):
    path = tmp_path / "a" / "x.safetensors"
    storage.write_file(path, storage.arrays_writer({"a": mx.arange(3)}))
    assert mx.load(str(path))["a"].tolist() == [0, 1, 2]
    storage.write_file(path.with_name("x.json"), storage.json_writer({"b": 1, "a": "é"}))
    assert json.loads(path.with_name("x.json").read_text()) == {"a": "é", "b": 1}
    assert names(path.parent) == ["x.json", "x.safetensors"]


def fail(path):
    path.write_text("half")
    raise OSError(28, "No space left on device")


def test_a_failed_write_leaves_old_files_intact(tmp_path):
    path = tmp_path / "x.json"
    storage.write_file(path, storage.json_writer(1))
    with pytest.raises(OSError, match="No space"):
        storage.write_file(path, fail)
    assert json.loads(path.read_text()) == 1
    assert names(tmp_path) == ["x.json"]
    directory = tmp_path / "step"
    storage.write_directory(directory, {"a.json": storage.json_writer(1)})
    with pytest.raises(OSError, match="No space"):
        storage.write_directory(directory, {"a.json": storage.json_writer(2), "b": fail})
    assert json.loads((directory / "a.json").read_text()) == 1
    assert names(tmp_path) == ["step", "x.json"]


def test_a_directory_is_replaced_as_a_whole(tmp_path):
    directory = tmp_path / "best"
    storage.write_directory(directory, {"a.json": storage.json_writer(1), "b.json": storage.json_writer(1)})
    storage.write_directory(directory, {"a.json": storage.json_writer(2)})
    assert names(directory) == ["a.json"]
    assert names(tmp_path) == ["best"]


def test_runs_that_are_moved_aside_are_numbered(tmp_path):
    assert storage.move_aside(tmp_path, ("a", "b")) is None
    for number in ("1", "2"):
        (tmp_path / "a").write_text(number)
        assert storage.move_aside(tmp_path, ("a", "b")) == tmp_path / "previous" / number
        assert (tmp_path / "previous" / number / "a").read_text() == number
    assert names(tmp_path) == ["previous"]


def test_temporary_files_of_a_dead_process_with_the_same_pid_do_no_harm(tmp_path):
    """In containers, process IDs start over at every start."""
    content = {"a.json": storage.json_writer(2)}
    for kind in ("new", "old", "gone"):
        stale = tmp_path / f".step-0000004.{os.getpid()}.{kind}"
        stale.mkdir()
        (stale / "stale.json").write_text("1")
    storage.write_directory(tmp_path / "step-0000004", content)
    assert names(tmp_path / "step-0000004") == ["a.json"]
    storage.write_directory(tmp_path / "step-0000005", content)
    (tmp_path / f".step-0000004.{os.getpid()}.gone").mkdir(exist_ok=True)
    (tmp_path / f".step-0000004.{os.getpid()}.gone" / "stale.json").write_text("1")
    checkpoints.prune_checkpoints(tmp_path, 1)
    assert names(tmp_path) == ["step-0000005"]


def test_a_checkpoint_whose_replacement_was_interrupted_is_restored(tmp_path):
    """Removed and incomplete checkpoints are not restored."""
    for step, kind in ((4, "old"), (5, "old"), (6, "gone"), (7, "new")):
        left = tmp_path / f".step-{step:07d}.12.{kind}"
        left.mkdir()
        (left / "a").write_text(str(step))
    (tmp_path / "step-0000005").mkdir()
    (tmp_path / "step-0000005" / "a").write_text("the new one")
    storage.remove_partial(tmp_path)
    assert names(tmp_path) == ["step-0000004", "step-0000005"]
    assert (tmp_path / "step-0000004" / "a").read_text() == "4"
    assert (tmp_path / "step-0000005" / "a").read_text() == "the new one"


def test_moving_aside_flushes_all_directories_involved(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("x")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b").write_text("x")
    flushed = []
    flush = storage.flush
    monkeypatch.setattr(storage, "flush", lambda path: (flushed.append(path), flush(path)))
    target = storage.move_aside(tmp_path, ("a", "deep/b"))
    assert set(flushed) >= {tmp_path, tmp_path / "deep", target.parent, target, target / "deep"}
    last = flushed[-4:]  # after the names were moved
    assert set(last) == {tmp_path, tmp_path / "deep", target, target / "deep"}


F_FULLFSYNC = 51  # on macOS


@pytest.mark.parametrize("fails", [False, True], ids=["supported", "not supported"])
def test_macos_flushes_the_disk_itself(fails, tmp_path, monkeypatch):
    """The other tests flush with fsync only. A file system that lacks the full flush is no error."""
    flushed = []

    def control(descriptor, command):
        assert command == F_FULLFSYNC
        flushed.append(
            os.path.samestat(os.fstat(descriptor), tmp_path.stat())
        )  # the directory, or a file in it
        if fails:
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(fcntl, "F_FULLFSYNC", F_FULLFSYNC, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", control)
    storage.write_file(tmp_path / "x.json", storage.json_writer({}))
    assert flushed == [False, True]
    assert (tmp_path / "x.json").read_text() == "{}\n"
