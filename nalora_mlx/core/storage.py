"""Files and directories that are there whole or not at all: temporary name, flush, rename, flush what holds them.

A directory of checkpoints holds step-NNNNNNN/ of arrays (safetensors) and JSON; what is in them is other rooms' matter.
"""

import errno
import fcntl
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import mlx.core as mx

from nalora_mlx.core.errors import InputError

Writer = Callable[[Path], None]
PATIENCE = 0.5  # seconds in which a lock may be freed: a report that watches looks at it for an instant
LARGEST_JSON = 64 * 2**20  # bytes that a JSON file may have; ours have some thousand
# What a killed process leaves behind: .STEM.PID.SUFFIX of files, and of directories .NAME.PID.new (half written),
# .NAME.PID.old (moved out of the way of a new one, and whole) and .NAME.PID.gone (half removed).
_LEFT = re.compile(
    r"\.(?P<name>adapters|adapter_config|metrics|run|best|step-[0-9]+)\.[0-9]+"
    r"\.(?P<kind>new|old|gone|safetensors|jsonl?)"
)


def arrays_writer(arrays: Mapping[str, mx.array]) -> Writer:
    """A writer of arrays as safetensors."""

    def write(path: Path) -> None:
        try:
            mx.save_safetensors(str(path), dict(arrays), metadata={"format": "mlx"})
        except RuntimeError as error:  # mlx does not say which of the system's errors it was
            if shutil.disk_usage(path.parent).free < _size(arrays):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from None
            raise OSError(errno.EIO, f"{os.strerror(errno.EIO)}: {error}", str(path)) from None

    return write


def json_writer(content: Any) -> Writer:
    """A writer of JSON with sorted keys, for people to read."""
    text = json.dumps(content, indent=2, sort_keys=True) + "\n"

    def write(path: Path) -> None:
        path.write_text(text, encoding="utf-8")

    return write


def copy_writer(source: Path) -> Writer:
    """A writer of what a file holds when it is written."""

    def write(path: Path) -> None:
        # Never a second name of the same file: mlx-lm writes adapters in place.
        shutil.copyfile(source, path)

    return write


def bytes_writer(content: bytes) -> Writer:
    """A writer of bytes."""

    def write(path: Path) -> None:
        path.write_bytes(content)

    return write


def write_file(path: Path, write: Writer) -> None:
    """Write one file beside its target, flush it, and move it into place.

    Raises:
        OSError: the disk is full or the target cannot be written; the old file stays as it was.
    """
    make_directory(path.parent)
    # The suffix stays last: mlx appends one of its own otherwise.
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        write(temporary)
        flush(temporary)
        os.replace(temporary, path)
        flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_directory(path: Path, files: Mapping[str, Writer]) -> None:
    """Write a directory of files whole, replacing what was there; see `new_directory`."""
    with new_directory(path) as temporary:
        for name, write in files.items():
            write(temporary / name)


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Give a temporary directory to fill; flush it and move it into place if nothing was raised.

    Raises:
        OSError: the disk is full or the target cannot be written; an old directory stays as it was.
    """
    make_directory(path.parent)
    temporary, retired = _beside(path, "new"), _beside(path, "old")
    _restore_or_remove(retired, path)
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that died, and had the same number
    try:
        temporary.mkdir()
        yield temporary
        for file in temporary.iterdir():
            flush(file)
        flush(temporary)
        if path.exists():
            path.rename(retired)
        temporary.rename(path)
        flush(path.parent)
    finally:
        if retired.exists() and not path.exists():
            retired.rename(path)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(retired, ignore_errors=True)


def _beside(path: Path, kind: str) -> Path:
    """Where a directory stands while it is none of its name; see `_LEFT`."""
    return path.with_name(f".{path.name}.{os.getpid()}.{kind}")


def _restore_or_remove(retired: Path, path: Path) -> None:
    """Bring a directory back if its process died between the two renames of a replacement; else remove it."""
    if retired.exists() and not path.exists():
        retired.rename(path)
        flush(path.parent)
    shutil.rmtree(retired, ignore_errors=True)


def make_directory(path: Path) -> None:
    """Make a directory and those above it, and flush the names of the new ones."""
    for missing in reversed([p for p in (path, *path.parents) if not p.exists()]):
        missing.mkdir(exist_ok=True)
        flush(missing.parent)


def flush(path: Path) -> None:
    """Wait until a file's content, or a directory's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        if hasattr(fcntl, "F_FULLFSYNC"):  # on macOS fsync leaves it in the disk's own cache
            with suppress(OSError):  # not every file system has it
                fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
    finally:
        os.close(descriptor)


def read_arrays(path: Path) -> dict[str, mx.array]:
    """Read the arrays of a safetensors file whose header agrees with its size, without trusting either.

    Raises:
        InputError: it is missing, or not such a file.
    """
    check_arrays(path)
    try:
        return dict(mx.load(str(path)))  # type: ignore[arg-type]
    except Exception as error:
        raise InputError(f"{path} is no readable safetensors file ({error})") from None


def check_arrays(path: Path) -> int:
    """Check the header of a safetensors file against its size before anything is allocated; count its arrays.

    Raises:
        InputError: it is missing, or not such a file.
    """
    return len(array_shapes(path))


def array_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of a safetensors file's arrays by name, from a header that agrees with the file's size.

    Raises:
        InputError: it is missing, or not such a file.
    """
    from safetensors import safe_open

    if not path.is_file():
        raise InputError(f"no file {path}")
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise InputError(f"{path} is no readable safetensors file ({error})") from None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        InputError: the file is missing, too large, or holds something else.
    """
    if not path.is_file():
        raise InputError(f"no file {path}")
    if path.stat().st_size > LARGEST_JSON:
        raise InputError(f"{path} has more than {LARGEST_JSON >> 20} MB; it is not what its name says")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold a JSON object")
    return content


def remove_directory(path: Path) -> None:
    """Remove a directory so that its name is gone at once, even if the process dies halfway."""
    gone = _beside(path, "gone")
    shutil.rmtree(gone, ignore_errors=True)
    path.rename(gone)
    flush(path.parent)
    shutil.rmtree(gone, ignore_errors=True)


def clean(directory: Path) -> None:
    """Remove what a process that was killed while writing into a directory left; nobody else may be writing."""
    for path in directory.iterdir() if directory.is_dir() else ():
        if not (match := _LEFT.fullmatch(path.name)):
            continue
        if match["kind"] == "old" and path.is_dir():
            _restore_or_remove(path, path.with_name(match["name"]))
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def move_aside(directory: Path, paths: Sequence[str | Path]) -> Path | None:
    """Move files of an earlier run, named relative to its directory, to directory/previous/N.

    Returns:
        Where they are now, or None if there were none.
    """
    present = [path for path in paths if (directory / path).exists()]
    if not present:
        return None
    number = 1
    while (target := directory / "previous" / str(number)).exists():
        number += 1
    for path in present:
        make_directory((target / path).parent)
        (directory / path).rename(target / path)
    for place in {
        parent for path in present for parent in ((directory / path).parent, (target / path).parent)
    }:
        flush(place)
    return target


@contextmanager
def lock_directory(directory: Path) -> Iterator[None]:
    """Keep a directory for one process at a time; the system ends the claim with the process, however it dies.

    Raises:
        InputError: another process has it.
    """
    make_directory(directory)
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        deadline = time.monotonic() + PATIENCE
        while not _lock(descriptor):
            if time.monotonic() > deadline:
                raise InputError(f"{directory}: another run is writing there; choose another directory")
            time.sleep(PATIENCE / 20)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Lock an open directory; False if another process has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system without locks
    return True


def check_writable(directory: Path) -> None:
    """Try whether files can be made in a directory, or where it would be made; leaves nothing behind.

    Raises:
        InputError: it is a file, or cannot be written.
    """
    place = directory
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise InputError(f"{directory}: {place} is a file; give a directory")
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise InputError(f"{directory}: cannot be written ({error.strerror}); choose another") from None


def free_space(directory: Path) -> int:
    """Bytes free where a directory is, or would be."""
    while not directory.exists() and directory != directory.parent:
        directory = directory.parent
    return shutil.disk_usage(directory).free


def _size(arrays: Mapping[str, mx.array]) -> int:
    return sum(array.nbytes for array in arrays.values())
