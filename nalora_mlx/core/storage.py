"""Atomic reads and writes: a file or directory is either complete or absent, even if the process or machine dies.

A new file or directory is written under a temporary name, flushed to disk, and renamed. A process that dies leaves
at most something with a temporary name, which `remove_partial` removes.
"""

import errno
import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import mlx.core as mx

from nalora_mlx.core.errors import InputError
from nalora_mlx.core.trees import nbytes

Writer = Callable[[Path], None]
MAX_JSON_BYTES = 64 * 2**20  # ours have a few thousand
# Temporary names. A file: .STEM.PID.SUFFIX. A directory: .NAME.PID.new (incomplete), .NAME.PID.old (complete, about to
# be replaced) or .NAME.PID.gone (being removed).
_TEMPORARY_NAME = re.compile(
    r"\.(?P<name>adapters|adapter_config|metrics|run|samples|best|step-[0-9]+|[0-9a-f]{32}-[0-9a-f]{16})\.[0-9]+"
    r"\.(?P<kind>new|old|gone|safetensors|jsonl?)"
)

# --- what to write ------------------------------------------------------------------------------------------


def arrays_writer(arrays: Mapping[str, mx.array]) -> Writer:
    """Return a writer of arrays in safetensors format."""

    def write(path: Path) -> None:
        try:
            mx.save_safetensors(str(path), dict(arrays), metadata={"format": "mlx"})
        except RuntimeError as error:  # MLX does not say which system error it was
            if shutil.disk_usage(path.parent).free < nbytes(arrays):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from None
            raise OSError(errno.EIO, f"{os.strerror(errno.EIO)}: {error}", str(path)) from None

    return write


def json_writer(content: Any) -> Writer:
    """Return a writer of indented JSON with sorted keys."""
    text = json.dumps(content, indent=2, sort_keys=True) + "\n"

    def write(path: Path) -> None:
        path.write_text(text, encoding="utf-8")

    return write


def copy_writer(source: Path) -> Writer:
    """Return a writer that copies a file."""

    def write(path: Path) -> None:
        # Not a hard link, because mlx-lm overwrites adapters in place.
        shutil.copyfile(source, path)

    return write


def bytes_writer(content: bytes) -> Writer:
    """Return a writer of bytes."""

    def write(path: Path) -> None:
        path.write_bytes(content)

    return write


# --- writing ------------------------------------------------------------------------------------------------


def write_file(path: Path, write: Writer) -> None:
    """Write or replace a file atomically.

    1. Write a temporary file in the same directory and flush it.
    2. Rename it to `path`. This replaces an old file in one step.
    3. Flush the directory, so that the new name survives a crash of the machine.

    Raises:
        OSError: the disk is full, or the path is not writable. An old file is unchanged.
    """
    make_directory(path.parent)
    # The temporary name keeps the suffix, because MLX appends .safetensors to other names.
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        write(temporary)
        flush(temporary)
        os.replace(temporary, path)
        flush(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_directory(path: Path, files: Mapping[str, Writer]) -> None:
    """Write or replace a directory of files atomically, see `new_directory`."""
    with new_directory(path) as temporary:
        for name, write in files.items():
            write(temporary / name)


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary directory to fill, then move it to `path`, replacing an old directory.

    1. Make PATH.new, let the caller fill it, and flush its files and their names.
    2. Rename an old directory to PATH.old. A non-empty directory cannot be replaced in one step.
    3. Rename PATH.new to PATH, flush the parent directory, and remove PATH.old.

    If the caller or a step fails, the old directory is moved back. If the process dies between the two renames, the
    next `new_directory` or `remove_partial` moves it back.

    Raises:
        OSError: the disk is full, or the path is not writable. An old directory is unchanged.
    """
    make_directory(path.parent)
    temporary, old = _temporary_name(path, "new"), _temporary_name(path, "old")
    # A dead process with the same PID may have left these. In containers PIDs start over.
    _restore_or_remove(old, path)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        yield temporary
        for inner in temporary.rglob("*"):
            flush(inner)
        flush(temporary)
        if path.exists():
            path.rename(old)
        temporary.rename(path)
        flush(path.parent)
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _temporary_name(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.{kind}")


def _restore_or_remove(old: Path, path: Path) -> None:
    """Rename `old` to `path` if a process died between the two renames of `new_directory`; otherwise remove it."""
    if old.exists() and not path.exists():
        old.rename(path)
        flush(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def make_directory(path: Path) -> None:
    """Make a directory and its missing parents, and flush their names."""
    for missing in reversed([p for p in (path, *path.parents) if not p.exists()]):
        missing.mkdir(exist_ok=True)
        flush(missing.parent)


def flush(path: Path) -> None:
    """Wait until the content of a file, or the names in a directory, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        if hasattr(fcntl, "F_FULLFSYNC"):  # on macOS, fsync does not flush the cache of the disk itself
            with suppress(OSError):  # some file systems lack it
                fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
    finally:
        os.close(descriptor)


# --- reading ------------------------------------------------------------------------------------------------


def read_arrays(path: Path) -> dict[str, mx.array]:
    """Read the arrays of a safetensors file, after checking its header against its size.

    Raises:
        InputError: the file is missing or damaged.
    """
    array_shapes(path)
    try:
        return dict(mx.load(str(path)))  # type: ignore[arg-type]
    except Exception as error:
        raise InputError(f"{path} is not a valid safetensors file ({error})") from None


def array_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a safetensors file's arrays by name, after checking its header against its size.

    Raises:
        InputError: the file is missing or damaged.
    """
    from safetensors import safe_open

    if not path.is_file():
        raise InputError(f"no file {path}")
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise InputError(f"{path} is not a valid safetensors file ({error})") from None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        InputError: the file is missing, too large, or does not hold a JSON object.
    """
    if not path.is_file():
        raise InputError(f"no file {path}")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise InputError(
            f"{path} is larger than {MAX_JSON_BYTES >> 20} MB, too large to be the expected JSON file"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold a JSON object")
    return content


# --- removing and moving ------------------------------------------------------------------------------------


def remove_directory(path: Path) -> None:
    """Remove a directory. Its name disappears in one step, even if the process dies during the removal."""
    gone = _temporary_name(path, "gone")
    shutil.rmtree(gone, ignore_errors=True)
    path.rename(gone)
    flush(path.parent)
    shutil.rmtree(gone, ignore_errors=True)


def remove_partial(directory: Path) -> None:
    """Remove what a killed process left under temporary names; no other process may be writing there."""
    for path in directory.iterdir() if directory.is_dir() else ():
        if not (match := _TEMPORARY_NAME.fullmatch(path.name)):
            continue
        if match["kind"] == "old" and path.is_dir():
            _restore_or_remove(path, path.with_name(match["name"]))
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def move_aside(directory: Path, paths: Sequence[str | Path]) -> Path | None:
    """Move files and directories of an earlier run to directory/previous/N, with the next free number N.

    Args:
        directory: the run's directory.
        paths: relative to it; missing ones are skipped.

    Returns:
        The new directory, or None if there was nothing to move.
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
    for parent in {p for path in present for p in ((directory / path).parent, (target / path).parent)}:
        flush(parent)
    return target


# --- space and permissions ----------------------------------------------------------------------------------


def check_writable(directory: Path) -> None:
    """Check that files can be created in a directory, which need not exist yet. Leave nothing behind.

    Raises:
        InputError: it is a file, or not writable.
    """
    existing = _nearest_existing(directory)
    if not existing.is_dir():
        raise InputError(f"{directory}: {existing} is a file; give a directory")
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise InputError(
            f"{directory} is not writable ({error.strerror}); choose another directory"
        ) from None


def free_space(directory: Path) -> int:
    """Return the free bytes on the disk of a directory, which need not exist yet."""
    return shutil.disk_usage(_nearest_existing(directory)).free


def _nearest_existing(path: Path) -> Path:
    """Return the path itself, or else its nearest parent that exists."""
    return next((p for p in (path, *path.parents) if p.exists()), path)
