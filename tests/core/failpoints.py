"""One save of a run whose process dies, or whose disk is disk_full, at a given operation.

python -m tests.core.failpoints DIRECTORY STOP

DIRECTORY holds checkpoints 1 and 2. The program saves checkpoint 3, which removes checkpoint 1. The process dies before
operation STOP (counted from 0) or, if that operation writes a file, in the middle of it. With STOP -1 it completes. It
prints the number of operations. A file that mlx writes counts as one operation; the tests with strace look inside.
"""

import errno
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx

from nalora_mlx.adapters.files import ADAPTER_CONFIG, ADAPTER_FILE
from nalora_mlx.core import storage
from nalora_mlx.core.storage import arrays_writer, copy_writer, json_writer
from nalora_mlx.runs.checkpoints import BEST_FILE, CheckpointWriter


def adapter_files(value: int) -> dict[str, storage.Writer]:
    array = {"a": mx.full((600,), value)}
    mx.eval(array)
    return {ADAPTER_FILE: arrays_writer(array), ADAPTER_CONFIG: json_writer({"value": value})}


def checkpoint_files(value: int, best: Path | None) -> dict[str, storage.Writer]:
    extra = {} if best is None else {BEST_FILE: copy_writer(best)}
    array = {"b": mx.full((900,), value)}
    mx.eval(array)
    return {**adapter_files(value), **extra, "state.safetensors": arrays_writer(array)}


def save(directory: Path, value: int) -> list[str]:
    """Save iteration `value` as a run does after its best validation; return the notices."""
    notices: list[str] = []
    saver = CheckpointWriter(
        directory,
        2,
        lambda: adapter_files(value),
        lambda best: checkpoint_files(value, best),
        lambda event, **content: notices.append(content["text"]) if event == "notice" else None,
    )
    saver.save_best()
    saver.save(value)
    return notices


WRITES = ("save_safetensors", "write_text", "copyfile")


class Operations:
    """Counts operations that change the disk, and calls `instead` in place of one of them.

    `events` are the operations in order, each with its name and paths.
    """

    def __init__(self, stop: int, instead: Callable[[], None]):
        self.stop, self.instead, self.count = stop, instead, 0
        self.events: list[tuple[str, list[str]]] = []
        self.opened: dict[int, str] = {}

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.events]

    def __enter__(self) -> "Operations":
        self.before = [(os, "open", os.open)]
        os.open = self.remembered(os.open)
        for home, names in (
            (os, ("mkdir", "fsync", "rename", "replace", "unlink", "rmdir")),
            (mx, ("save_safetensors",)),
            (Path, ("write_text",)),
            (shutil, ("copyfile",)),
        ):
            for name in names:
                self.before.append((home, name, getattr(home, name)))
                setattr(home, name, self.counted(name, getattr(home, name)))
        return self

    def __exit__(self, *_: object) -> None:
        for home, name, function in self.before:
            setattr(home, name, function)

    def remembered(self, function: Callable) -> Callable:
        def call(path, *args, **kwargs):
            descriptor = function(path, *args, **kwargs)
            self.opened[descriptor] = str(path)
            return descriptor

        return call

    def paths(self, name: str, args: tuple) -> list[str]:
        if name == "fsync":
            return [self.opened.get(args[0], "")]
        if name in ("rename", "replace"):
            return [str(args[0]), str(args[1])]
        return [str(args[1] if name == "copyfile" else args[0])]

    def counted(self, name: str, function: Callable) -> Callable:
        def call(*args, **kwargs):
            number, self.count = self.count, self.count + 1
            self.events.append((name, self.paths(name, args)))
            if number != self.stop:
                return function(*args, **kwargs)
            if name in WRITES:  # write half of the file
                path = Path(args[1] if name == "copyfile" else args[0])
                function(*args, **kwargs)
                os.truncate(path, path.stat().st_size // 2)
            self.instead()

        return call


def disk_full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


if __name__ == "__main__":
    mx.set_default_device(mx.cpu)
    with Operations(int(sys.argv[2]), lambda: os._exit(9)) as operations:
        save(Path(sys.argv[1]), 3)
    print(operations.count)
