"""A save that is cut off anywhere leaves every checkpoint whole, and one more or one less of them."""

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
from nalora_mlx.runs import checkpoints
from nalora_mlx.runs.directory import remove_partial_files
from tests.core.failpoints import WRITES, Operations, files, full, save, whole


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    """A run that has saved two checkpoints; the second is its best."""
    directory = tmp_path_factory.mktemp("run") / "adapters"
    for value in (1, 2):
        assert save(directory, value) == []
    return directory


def value_of(path):
    """The value that a whole adapter or checkpoint was made with; any damage raises."""
    found = {json.loads((path / "adapter_config.json").read_text())["value"]}
    for file in path.glob("*.safetensors"):
        if file.name.startswith((".", "best")):
            continue
        (array,) = storage.read_arrays(file).values()
        found |= set(array.tolist())
    (value,) = found
    return value


def check(directory, pairs=True):
    """Whatever has its name is whole; returns which steps there are."""
    steps = checkpoints.steps(directory / "checkpoints")
    for step, path in steps.items():
        assert value_of(path) == step
        assert {p.name for p in path.iterdir()} == {*whole(step, Path("x"))}
        best = storage.read_arrays(path / "best.safetensors")["a"].tolist()
        assert len(set(best)) == 1
        assert best[0] <= step
    for place in (directory, directory / "best"):
        # two files, each whole: their contents belong together in a run, where the configuration never changes
        assert set(storage.read_arrays(place / "adapters.safetensors")["a"].tolist()) in ({2}, {3})
        assert json.loads((place / "adapter_config.json").read_text())["value"] in (2, 3)
    assert set(steps) in ({1, 2}, {1, 2, 3}, {2, 3})
    return set(steps)


def check_after_death(directory):
    """What the next start finds, tidies up, and can save."""
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


def child(directory, stop, *wrapper):
    return subprocess.run(
        [*wrapper, sys.executable, "-B", "-m", "tests.core.failpoints", str(directory), str(stop)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )


def test_a_process_that_ends_at_any_operation_leaves_whole_checkpoints(before, tmp_path):
    shutil.copytree(before, tmp_path / "all")
    done = child(tmp_path / "all", -1)
    assert done.returncode == 0, done.stderr
    assert check(tmp_path / "all") == {2, 3}

    def cut(stop):
        directory = tmp_path / str(stop)
        shutil.copytree(before, directory)
        assert child(directory, stop).returncode == 9
        return check_after_death(directory)

    found = in_threads(cut, range(int(done.stdout)))
    # the new checkpoint appears at one moment, the oldest one goes after that
    order = [{1, 2}, {1, 2, 3}, {2, 3}]
    assert [order.index(steps) for steps in found] == sorted(order.index(steps) for steps in found)
    assert {1, 2} in found
    assert {2, 3} in found


def test_a_full_disk_at_any_operation_leaves_what_was_there(before, tmp_path):
    """The same operations, each failing in turn while the process lives on; the next save succeeds."""
    stop, finished = 0, False
    while not finished:
        directory = tmp_path / str(stop)
        shutil.copytree(before, directory)
        with Operations(stop, full) as operations:
            notices = save(directory, 3)
        finished = operations.count <= stop
        assert check(directory) >= {2}
        if not finished and operations.names[stop] not in ("unlink", "rmdir"):
            assert any("No space left" in notice for notice in notices), (operations.names[stop], notices)
            assert not [p for p in directory.glob("checkpoints/.*.new")]
        check_after_death(directory)
        stop += 1
    assert stop > 20


def check_order(events):
    """Data is flushed before it is renamed, a new name's directory after, before anything else; counts the renames.

    `events` are writes, fsyncs and renames in their order, with their paths.
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
    with Operations(-1, full) as operations:
        assert save(directory, 3) == []
    kinds = dict.fromkeys(WRITES, "write") | {"replace": "rename", "rename": "rename", "fsync": "fsync"}
    assert check_order([(kinds[n], paths) for n, paths in operations.events if n in kinds]) == RENAMES


def test_a_limit_on_the_size_of_files_at_any_byte_leaves_what_was_there(before, tmp_path):
    """Whatever writes, Python or mlx, meets the limit in the middle of a file; the next save succeeds."""
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


def test_a_small_disk_that_is_full(tmp_path):
    """A file system of its own, which saves fill; where none may be mounted there is nothing to see."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system may be mounted here")
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
            if 3 in checkpoints.steps(
                directory / "checkpoints"
            ):  # what did not fit was the adapter beside it
                shutil.rmtree(directory / "checkpoints" / "step-0000003")
        assert save(directory, 3) == []
        assert check(directory) == {2, 3}
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_mlx_that_cannot_write_is_an_error_of_the_disk(tmp_path):
    """A limit on the size of files, which mlx meets in the middle of an array; it does not say why it stopped."""
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
    """strace, which sees what mlx does in C++ as well; where it is not, the operations above are all there is."""
    path = tmp_path_factory.mktemp("strace") / "out"
    if shutil.which("strace") is None or subprocess.run(["strace", "-o", path, "true"]).returncode:
        pytest.skip("strace is not installed, or may not trace here")
    return "strace"


def traced(output):
    """The traced calls of the process that saves, in order: (name, number among its name, all of the line)."""
    counts, found = {}, []
    for line in output.read_text().splitlines():
        if match := re.match(r"(?:\d+ +)?(\w+)\((.*)", line):
            name = match[1]
            counts[name] = counts.get(name, 0) + 1
            found.append((name, counts[name], match[2]))
    return found


def test_data_is_on_the_disk_before_its_name(strace, before, tmp_path):
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


def test_a_kill_at_any_system_call_leaves_whole_checkpoints(strace, before, tmp_path):
    directory, out = tmp_path / "all", tmp_path / "out"
    shutil.copytree(before, directory)
    done = child(directory, -1, strace, "-y", "-e", f"trace={','.join(CALLS)}", "-o", str(out))
    assert done.returncode == 0, done.stderr
    calls = [(name, number) for name, number, text in traced(out) if str(directory) in text]
    assert sum(name == "write" for name, _ in calls) > 12
    assert sum(name == "fsync" for name, _ in calls) > 10

    def cut(call):
        name, number = call
        copy = tmp_path / f"{name}-{number}"
        shutil.copytree(before, copy)
        inject = f"inject={name}:signal=KILL:when={number}"
        killed = child(copy, -1, strace, "-e", f"trace={name}", "-e", inject, "-o", "/dev/null")
        assert killed.returncode in (-9, 137), (call, killed.stdout, killed.stderr)
        return check_after_death(copy)

    assert {1, 2} in in_threads(cut, calls)


def test_a_full_disk_at_any_write_of_mlx(strace, before, tmp_path):
    """The system says that the disk is full in the middle of an array; Python never sees that call."""
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
        check_after_death(copy)

    in_threads(fill, writes)


# --- the target ---------------------------------------------------------------------------------------------


def test_leftovers_of_others_stay(tmp_path):
    keep = (".notes.2024.md", ".git", "step-x", "x.new", ".best.txt")
    for name in keep:
        (tmp_path / name).mkdir()
    for name in (".adapters.12.safetensors", ".adapter_config.7.json", ".metrics.3.jsonl"):
        (tmp_path / name).write_text("x")
    (tmp_path / ".step-0000004.12.new").mkdir()
    (tmp_path / ".best.12.old").mkdir()
    (tmp_path / ".best.12.old" / "a").write_text("the only one")
    storage.clean(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*keep, "best"])
    assert (tmp_path / "best" / "a").read_text() == "the only one"


def test_a_directory_has_one_run_at_a_time(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from nalora_mlx.core import storage\n"
        "with storage.lock_directory(Path(sys.argv[1])): print('mine', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "mine\n"
    with pytest.raises(InputError, match="another run is writing there"), storage.lock_directory(tmp_path):
        pass
    process.kill()
    process.communicate()
    with storage.lock_directory(tmp_path):
        pass


def test_a_look_at_the_lock_is_no_run(tmp_path):
    """A report that watches takes the lock for an instant, shared, to see whether a run has it."""
    descriptor = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    threading.Timer(0.2, os.close, (descriptor,)).start()
    with storage.lock_directory(tmp_path):
        pass


def test_places_that_cannot_be_written_are_found_before_training(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "a" / "b"):
        with pytest.raises(InputError, match="file is a file; give a directory"):
            storage.check_writable(path)
    storage.check_writable(tmp_path / "new" / "deep")
    assert not (tmp_path / "new").exists()

    if Path("/proc/self").exists():  # nobody makes files there, not even root
        with pytest.raises(InputError, match=r"/proc/nalora: cannot be written \(.*\); choose another"):
            storage.check_writable(Path("/proc/nalora"))
    if os.geteuid() != 0:
        (tmp_path / "read-only").mkdir(mode=0o500)
        with pytest.raises(InputError, match=r"cannot be written \(Permission denied\)"):
            storage.check_writable(tmp_path / "read-only" / "new")

    def refuse(**_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(storage.tempfile, "TemporaryFile", refuse)
    with pytest.raises(InputError, match=r"cannot be written \(Read-only file system\)"):
        storage.check_writable(tmp_path / "new")


def test_arrays_are_read_only_if_the_header_fits_the_file(tmp_path):
    path = tmp_path / "x.safetensors"
    mx.save_safetensors(str(path), {"a": mx.ones(10)})
    whole_file = path.read_bytes()
    assert storage.read_arrays(path)["a"].size == 10
    for content in (b"", whole_file[:-1], whole_file + b"x", (2**60).to_bytes(8, "little") + whole_file[8:]):
        path.write_bytes(content)
        with pytest.raises(InputError, match="no readable safetensors file"):
            storage.read_arrays(path)
    with pytest.raises(InputError, match="no file"):
        storage.read_arrays(tmp_path / "none")


def test_json_is_an_object_of_some_size(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    for content in (b"", b"[1]", b"{", b'{"a": \xff}', b"[" * 100000):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"x.json (cannot be read|must hold a JSON object)"):
            storage.read_json(path)
    monkeypatch.setattr(storage, "LARGEST_JSON", 10)
    path.write_text('{"a": "too long"}')
    with pytest.raises(InputError, match="it is not what its name says"):
        storage.read_json(path)


def test_one_file_is_written_beside_its_place(tmp_path):
    assert set(files(1)) == {"adapters.safetensors", "adapter_config.json"}
    storage.write_file(tmp_path / "a" / "b" / "x.json", storage.json_writer({"a": 1}))
    assert json.loads((tmp_path / "a" / "b" / "x.json").read_text()) == {"a": 1}


def test_killed_runs_go_on_bit_for_bit():
    """A few kills of the fifty, two of them twice, and half of them in a save."""
    script = Path(__file__).parents[2] / "scripts" / "crash_test.py"
    done = subprocess.run(
        [sys.executable, script, "--kills", "4", "--jobs", "2"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 of 4 bit-identical" in done.stdout
    assert done.stdout.count(" and again, ") >= 2
