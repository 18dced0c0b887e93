"""Write files so that each is there whole or not at all: temporary name, flush, rename."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx

Writer = Callable[[Path], None]


def arrays_writer(arrays: Mapping[str, mx.array]) -> Writer:
    """A writer of arrays as safetensors."""
    return lambda path: mx.save_safetensors(str(path), dict(arrays), metadata={"format": "mlx"})


def json_writer(content: Any) -> Writer:
    """A writer of JSON with sorted keys, for people to read."""
    text = json.dumps(content, indent=2, sort_keys=True) + "\n"

    def write(path: Path) -> None:
        path.write_text(text, encoding="utf-8")

    return write


def write_file(path: Path, write: Writer) -> None:
    """Write one file beside its target, flush it, and move it into place.

    Raises:
        OSError: the disk is full or the target cannot be written; the old file stays as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays last: mlx appends one of its own otherwise.
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        write(temporary)
        _flush(temporary)
        os.replace(temporary, path)
        _flush(path.parent)
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
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    retired = path.with_name(f".{path.name}.{os.getpid()}.old")
    try:
        temporary.mkdir()
        yield temporary
        for file in temporary.iterdir():
            _flush(file)
        _flush(temporary)
        if path.exists():
            path.rename(retired)
        temporary.rename(path)
        _flush(path.parent)
    finally:
        if retired.exists() and not path.exists():
            retired.rename(path)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(retired, ignore_errors=True)


def set_aside(directory: Path, names: Sequence[str]) -> Path | None:
    """Move an earlier run's files to directory/previous/N, so that a new run overwrites nothing.

    Returns:
        Where they are now, or None if there were none.
    """
    present = [directory / name for name in names if (directory / name).exists()]
    if not present:
        return None
    number = 1
    while (target := directory / "previous" / str(number)).exists():
        number += 1
    target.mkdir(parents=True)
    for path in present:
        path.rename(target / path.name)
    return target


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
