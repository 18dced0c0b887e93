"""Interrupted saves: all checkpoints stay complete, and at most the new one or the oldest is missing."""

import fcntl
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import pytest

from nalora_mlx.core import storage
from nalora_mlx.core.errors import InputError
from nalora_mlx.core.locks import is_locked, lock_directory
from nalora_mlx.runs import checkpoints
from nalora_mlx.runs.directory import remove_partial_files
from tests.core.failpoints import WRITES, Operations, adapter_files, checkpoint_files, disk_full, save


# The tests with this parameter start a process for each place where a save can be interrupted.
@pytest.fixture(params=[pytest.param(8, id="every-8th"), pytest.param(1, id="all", marks=pytest.mark.slow)])
def stride(request):
    return request.param


def every(places, stride):
    """Every n-th item of a sequence, and the last one."""
    return [*places[:-1:stride], places[-1]]


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    """A run that has saved two checkpoints. The second has the best adapter."""
    directory = tmp_path_factory.mktemp("run") / "adapters"
    for value in (1, 2):
        assert save(directory, value) == []
    return directory


def value_of(path):
    """Return the value with which an adapter or checkpoint was made; fail if it is damaged."""
    found = {json.loads((path / "adapter_config.json").read_text())["value"]}
    for file in path.glob("*.safetensors"):
        if file.name.startswith((".", "best")):
            continue
        (array,) = storage.read_arrays(file).values()
        found |= set(array.tolist())
    (value,) = found
    return value


def check(directory):
    """Check that everything under a final name is complete; return the steps of the checkpoints."""
    steps = checkpoints.steps(directory / "checkpoints")
    for step, path in steps.items():
        assert value_of(path) == step
        assert {p.name for p in path.iterdir()} == {*checkpoint_files(step, Path("x"))}
        best = storage.read_arrays(path / "best.safetensors")["a"].tolist()
        assert len(set(best)) == 1
        assert best[0] <= step
    for place in (directory, directory / "best"):
        # Each file is complete. The config may be older than the weights, which is harmless: a run never changes it.
        assert set(storage.read_arrays(place / "adapters.safetensors")["a"].tolist()) in ({2}, {3})
        assert json.loads((place / "adapter_config.json").read_text())["value"] in (2, 3)
    assert set(steps) in ({1, 2}, {1, 2, 3}, {2, 3})
    return set(steps)


def check_next_start(directory):
    """Check that the next start can remove partial files and save; return the steps that it found."""
    check(directory)
    remove_partial_files(directory)
    steps = check(directory)
    assert not [p for p in directory.rglob("*") if p.name.startswith(".")]
    assert save(directory, 3) == []
    assert check(directory) == {2, 3}
    return steps


def in_threads(function, items):
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(function, items))


# Transformers imports PyTorch if it is installed, which takes most of the time of such a short process.
CHILD = """
import runpy, sys
sys.modules["torch"] = None
runpy.run_module("tests.core.failpoints", run_name="__main__")
"""


def child(directory, stop, *wrapper):
    return subprocess.run(
        [*wrapper, sys.executable, "-B", "-c", CHILD, str(directory), str(stop)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )


def test_checkpoints_are_complete_if_the_process_dies_at_any_operation(before, tmp_path, stride):
    shutil.copytree(before, tmp_path / "all")
    done = child(tmp_path / "all", -1)
    assert done.returncode == 0, done.stderr
    assert check(tmp_path / "all") == {2, 3}

    def interrupt(stop):
        directory = tmp_path / str(stop)
        shutil.copytree(before, directory)
        assert child(directory, stop).returncode == 9
        return check_next_start(directory)

    found = in_threads(interrupt, every(range(int(done.stdout)), stride))
    # The new checkpoint appears in one step, and the oldest is removed after that.
    order = [{1, 2}, {1, 2, 3}, {2, 3}]
    assert [order.index(steps) for steps in found] == sorted(order.index(steps) for steps in found)
    assert {1, 2} in found
    assert {2, 3} in found


def test_a_full_disk_at_any_operation_leaves_old_files_intact(before, tmp_path):
    """The same operations fail one by one, and the process survives. The next save succeeds."""
    stop, finished = 0, False
    while not finished:
        directory = tmp_path / str(stop)
        shutil.copytree(before, directory)
        with Operations(stop, disk_full) as operations:
            notices = save(directory, 3)
        finished = operations.count <= stop
        assert check(directory) >= {2}
        if not finished and operations.names[stop] not in ("unlink", "rmdir"):
            assert any("No space left" in notice for notice in notices), (operations.names[stop], notices)
            assert not [p for p in directory.glob("checkpoints/.*.new")]
        check_next_start(directory)
        stop += 1
    assert stop > 20


def check_order(events):
    """Check that data is flushed before its rename, and the directory directly after it; return the number of renames.

    `events` are writes, fsyncs and renames in order, with their paths.
    """
    written, flushed, renamed, names = set(), set(), 0, set()
    for name, paths in events:
        assert name == "fsync" or not names, f"{name} before the directory of a new name was flushed"
        if name == "write":
            written.add(paths[0])
            flushed.discard(paths[0])
        elif name == "fsync":
            flushed.add(paths[0])
            names.discard(paths[0])
        elif name == "rename":
            source, target = paths
            renamed += 1
            for path in [p for p in written if p == source or p.startswith(f"{source}/")]:
                assert path in flushed, f"{path} was renamed before it was flushed"
                written.discard(path)
            if source.endswith(".new"):
                assert source in flushed, "a new directory's names were not flushed"
            names.add(str(Path(target).parent))
    assert written == set()
    assert names == set()
    return renamed


RENAMES = 6  # two files of best, the checkpoint, two files of the adapter, and the old checkpoint


def test_a_save_flushes_before_and_after_each_rename(before, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(before, directory)
    with Operations(-1, disk_full) as operations:
        assert save(directory, 3) == []
    kinds = dict.fromkeys(WRITES, "write") | {"replace": "rename", "rename": "rename", "fsync": "fsync"}
    assert check_order([(kinds[n], paths) for n, paths in operations.events if n in kinds]) == RENAMES


def test_a_file_size_limit_at_any_byte_leaves_old_files_intact(before, tmp_path):
    """Python and MLX reach the limit in the middle of a file. The next save succeeds."""
    largest = max(p.stat().st_size for p in before.rglob("*") if p.is_file())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    failed = set()
    for limit in range(0, largest + 60, 61):
        directory = tmp_path / str(limit)
        shutil.copytree(before, directory)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            notices = save(directory, 3)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        if 3 not in checkpoints.steps(directory / "checkpoints"):
            assert "iteration 3 could not be saved" in notices[-1], limit
        failed.add(bool(notices))
        assert check(directory) >= {2}
        assert not [p for p in directory.rglob(".*")]
        assert save(directory, 3) == []
        assert check(directory) == {2, 3}
    assert failed == {True, False}


def test_a_small_full_disk(tmp_path):
    """A small file system that saves fill up. Skipped where none can be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount a file system here")
    try:
        directory = disk / "run"
        assert save(directory, 1) == []
        assert save(directory, 2) == []
        free = shutil.disk_usage(disk).free
        for left in range(0, 20480, 4096):
            (disk / "ballast").write_bytes(b"x" * (free - left))
            notices = save(directory, 3)
            assert any("No space left" in notice for notice in notices), left
            assert check(directory) >= {2}
            (disk / "ballast").unlink()
            if 3 in checkpoints.steps(directory / "checkpoints"):  # only the adapter did not fit
                shutil.rmtree(directory / "checkpoints" / "step-0000003")
        assert save(directory, 3) == []
        assert check(directory) == {2, 3}
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_failed_write_of_mlx_is_an_os_error(tmp_path):
    """MLX reaches a file size limit in the middle of an array. Its own error does not say why it failed."""
    code = (
        "import resource, signal, sys; from pathlib import Path\n"
        "import mlx.core as mx; from nalora_mlx.core import storage\n"
        "arrays = {'a': mx.zeros(100000)}; path = Path(sys.argv[1])\n"
        "storage.write_file(path / 'x.safetensors', storage.arrays_writer({'a': mx.ones(3)}))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))\n"
        "try: storage.write_file(path / 'x.safetensors', storage.arrays_writer(arrays))\n"
        "except OSError as error: sys.exit(0 if error.errno and 'Unable to write' in str(error) else 3)\n"
        "sys.exit(4)"
    )
    for limit in (1000, 100_000, 399_999):
        directory = tmp_path / str(limit)
        directory.mkdir()
        done = subprocess.run(
            [sys.executable, "-c", code, directory, str(limit)], capture_output=True, text=True
        )
        assert done.returncode == 0, (limit, done.stderr)
        assert [p.name for p in directory.iterdir()] == ["x.safetensors"]
        assert storage.read_arrays(directory / "x.safetensors")["a"].tolist() == [1, 1, 1]


# --- system calls -------------------------------------------------------------------------------------------

CALLS = ("write", "sendfile", "copy_file_range", "fsync", "rename", "mkdir", "unlinkat")


@pytest.fixture(scope="module")
def strace(tmp_path_factory):
    """strace, which also sees what MLX does in C++. Without it, only the tests above run."""
    path = tmp_path_factory.mktemp("strace") / "out"
    if shutil.which("strace") is None or subprocess.run(["strace", "-o", path, "true"]).returncode:
        pytest.skip("strace is not installed, or cannot trace here")
    return "strace"


def traced(output):
    """Return the traced system calls in order, each as (name, its number among calls of that name, arguments)."""
    counts, found = {}, []
    for line in output.read_text().splitlines():
        if match := re.match(r"(?:\d+ +)?(\w+)\((.*)", line):
            name = match[1]
            counts[name] = counts.get(name, 0) + 1
            found.append((name, counts[name], match[2]))
    return found


def test_data_is_flushed_before_its_rename(strace, before, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(before, directory)
    out = tmp_path / "out"
    done = child(directory, -1, strace, "-y", "-e", f"trace={','.join(CALLS)}", "-o", str(out))
    assert done.returncode == 0, done.stderr
    events = []
    for name, _, text in traced(out):
        paths = re.findall(rf"{re.escape(str(directory))}[^\">]*", text)
        if name == "copy_file_range":
            paths = paths[1:]
        if paths:
            events.append(("write" if name in ("sendfile", "copy_file_range") else name, paths))
    assert check_order(events) == RENAMES


def test_checkpoints_are_complete_if_the_process_is_killed_at_any_system_call(
    strace, before, tmp_path, stride
):
    directory, out = tmp_path / "all", tmp_path / "out"
    shutil.copytree(before, directory)
    done = child(directory, -1, strace, "-y", "-e", f"trace={','.join(CALLS)}", "-o", str(out))
    assert done.returncode == 0, done.stderr
    calls = [(name, number) for name, number, text in traced(out) if str(directory) in text]
    assert sum(name == "write" for name, _ in calls) > 12
    assert sum(name == "fsync" for name, _ in calls) > 10

    def kill(call):
        name, number = call
        copy = tmp_path / f"{name}-{number}"
        shutil.copytree(before, copy)
        inject = f"inject={name}:signal=KILL:when={number}"
        killed = child(copy, -1, strace, "-e", f"trace={name}", "-e", inject, "-o", "/dev/null")
        assert killed.returncode in (-9, 137), (call, killed.stdout, killed.stderr)
        return check_next_start(copy)

    assert {1, 2} in in_threads(kill, every(calls, stride))


def test_a_full_disk_at_any_write_of_mlx(strace, before, tmp_path, stride):
    """The disk is full in the middle of an array, in a system call that Python does not see."""
    directory, out = tmp_path / "all", tmp_path / "out"
    shutil.copytree(before, directory)
    child(directory, -1, strace, "-y", "-e", "trace=write", "-o", str(out))
    writes = [number for name, number, text in traced(out) if str(directory) in text]

    def fill(number):
        copy = tmp_path / str(number)
        shutil.copytree(before, copy)
        inject = f"inject=write:error=ENOSPC:when={number}"
        done = child(copy, -1, strace, "-e", "trace=write", "-e", inject, "-o", "/dev/null")
        assert done.returncode == 0, (number, done.stderr)
        assert check(copy) >= {2}
        check_next_start(copy)

    in_threads(fill, every(writes, stride))


# --- the run's directory ------------------------------------------------------------------------------------


def test_only_our_temporary_files_are_removed(tmp_path):
    keep = (".notes.2024.md", ".git", "step-x", "x.new", ".best.txt")
    for name in keep:
        (tmp_path / name).mkdir()
    for name in (".adapters.12.safetensors", ".adapter_config.7.json", ".metrics.3.jsonl"):
        (tmp_path / name).write_text("x")
    (tmp_path / ".step-0000004.12.new").mkdir()
    (tmp_path / ".best.12.old").mkdir()
    (tmp_path / ".best.12.old" / "a").write_text("the only one")
    storage.remove_partial(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*keep, "best"])
    assert (tmp_path / "best" / "a").read_text() == "the only one"


def test_only_one_run_at_a_time_can_lock_a_directory(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from nalora_mlx.core.locks import lock_directory\n"
        "with lock_directory(Path(sys.argv[1])): print('mine', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "mine\n"
    with pytest.raises(InputError, match="another run is writing there"), lock_directory(tmp_path):
        pass
    process.kill()
    process.communicate()
    assert not is_locked(tmp_path)
    with lock_directory(tmp_path):
        assert is_locked(tmp_path)
    assert not is_locked(tmp_path / "missing")


def test_checking_the_lock_does_not_stop_a_run(tmp_path):
    """A report with --watch holds a shared lock for an instant to check whether a run has the lock."""
    descriptor = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    threading.Timer(0.2, os.close, (descriptor,)).start()
    with lock_directory(tmp_path):
        pass


def test_directories_that_are_not_writable_are_found_before_training(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "a" / "b"):
        with pytest.raises(InputError, match="file is a file; give a directory"):
            storage.check_writable(path)
    storage.check_writable(tmp_path / "new" / "deep")
    assert not (tmp_path / "new").exists()

    if Path("/proc/self").exists():  # not even root can create files there
        with pytest.raises(InputError, match=r"/proc/nalora is not writable \(.*\); choose another"):
            storage.check_writable(Path("/proc/nalora"))
    if os.geteuid() != 0:
        (tmp_path / "read-only").mkdir(mode=0o500)
        with pytest.raises(InputError, match=r"is not writable \(Permission denied\)"):
            storage.check_writable(tmp_path / "read-only" / "new")

    def refuse(**_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(storage.tempfile, "TemporaryFile", refuse)
    with pytest.raises(InputError, match=r"is not writable \(Read-only file system\)"):
        storage.check_writable(tmp_path / "new")


def test_reading_arrays_checks_the_header_against_the_file(tmp_path):
    path = tmp_path / "x.safetensors"
    mx.save_safetensors(str(path), {"a": mx.ones(10)})
    whole_file = path.read_bytes()
    assert storage.read_arrays(path)["a"].size == 10
    for content in (b"", whole_file[:-1], whole_file + b"x", (2**60).to_bytes(8, "little") + whole_file[8:]):
        path.write_bytes(content)
        with pytest.raises(InputError, match="not a valid safetensors file"):
            storage.read_arrays(path)
    with pytest.raises(InputError, match="no file"):
        storage.read_arrays(tmp_path / "none")


def test_json_files_must_hold_an_object_of_limited_size(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    for content in (b"", b"[1]", b"{", b'{"a": \xff}', b"[" * 100000):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"x.json (cannot be read|must hold a JSON object)"):
            storage.read_json(path)
    monkeypatch.setattr(storage, "MAX_JSON_BYTES", 10)
    path.write_text('{"a": "too long"}')
    with pytest.raises(InputError, match="too large to be the expected JSON file"):
        storage.read_json(path)


def test_missing_directories_are_made(tmp_path):
    assert set(adapter_files(1)) == {"adapters.safetensors", "adapter_config.json"}
    storage.write_file(tmp_path / "a" / "b" / "x.json", storage.json_writer({"a": 1}))
    assert json.loads((tmp_path / "a" / "b" / "x.json").read_text()) == {"a": 1}


@pytest.mark.slow
def test_killed_runs_resume_bit_for_bit():
    """Four kills, half of them during a save and two of them repeated. Run the script itself for more."""
    script = Path(__file__).parents[2] / "scripts" / "crash_test.py"
    done = subprocess.run(
        [sys.executable, script, "--kills", "4", "--jobs", "2"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 of 4 bit-identical" in done.stdout
    assert done.stdout.count(" and again, ") >= 2
