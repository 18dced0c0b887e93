"""Writing GGUF files: complete or not at all."""

import glob
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nalora_mlx.core.errors import InputError
from nalora_mlx.core.storage import flush


def check_output(output: Path, overwrite: bool) -> None:
    """Raise InputError if the output is a directory, or a file that must not be overwritten."""
    if output.is_dir():
        raise InputError(f"{output}: is a directory; give the name of the file to write")
    if output.exists() and not overwrite:
        raise InputError(f"{output}: exists; choose another name or overwrite it explicitly")


def write_gguf(
    writer: Any,
    output: Path,
    data: Iterator[np.ndarray],
    size: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Write a GGUF file under a temporary name, flush it to disk and rename it; remove it on any failure."""
    output.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(output.parent).free
    if free < size:
        raise InputError(f"{output}: needs {size / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are free")
    _remove_stale_files(output)
    temporary = output.with_name(f".{output.name}.{os.getpid()}.part")
    try:
        writer.write_header_to_file(temporary)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        done = 0
        for array in data:
            writer.write_tensor_data(np.ascontiguousarray(array))
            done += array.nbytes
            del array  # frees it before the next one is converted
            if progress:
                progress(done, size)
        writer.flush()
        writer.close()
        flush(temporary)
        os.replace(temporary, output)
        flush(output.parent)
    except BaseException:
        writer.close()
        temporary.unlink(missing_ok=True)
        raise


def _remove_stale_files(output: Path) -> None:
    """Remove temporary files of killed exports to the same name, but not those of running processes."""
    for file in output.parent.glob(f".{glob.escape(output.name)}.*.part"):
        pid = file.name.split(".")[-2]
        if pid.isdigit() and not _is_running(int(pid)):
            file.unlink(missing_ok=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True
