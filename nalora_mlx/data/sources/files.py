"""Files as bytes and lines: compressed or not, bounded in memory, with errors that name the file."""

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from nalora_mlx.core.errors import InputError, first_line
from nalora_mlx.core.optional_dependencies import install_command

RawRow = tuple[str, dict[str, Any]]  # source and content
LONGEST_LINE = 32 * 2**20  # bytes; a longer line is a whole file, and would be cut to a few thousand tokens
LFS_POINTER = b"version https://git-lfs"


@dataclass
class Remarks:
    """What readers found, one sentence each.

    Attributes:
        problems: what makes rows unusable.
        notices: what is odd.
    """

    problems: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)


def _open_zstandard(path: Path) -> BinaryIO:
    try:
        from pyarrow import input_stream
    except ImportError:
        raise InputError(
            f"{path}: reading .zst needs pyarrow; {install_command('data')}, or decompress the file"
        ) from None
    return io.BufferedReader(input_stream(str(path), compression="zstd"))


COMPRESSIONS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstandard,
}


def open_file(path: Path) -> BinaryIO:
    """Open a file for reading, decompressed if its name says that it is compressed."""
    return COMPRESSIONS.get(path.suffix.lower(), lambda plain: plain.open("rb"))(path)


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn errors of reading a file into InputError.

    Raises:
        InputError: the file cannot be read, is damaged, or is only a pointer of Git LFS.
    """
    try:
        with path.open("rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise InputError(f"{path}: is a Git LFS pointer, not the data; run git lfs pull")
        yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise InputError(
            f"cannot read {path}: {getattr(error, 'strerror', '') or first_line(error)}"
        ) from None


def read_lines(file: BinaryIO) -> Iterator[bytes]:
    """Yield the lines of a file; only the first LONGEST_LINE + 1 bytes of a line that is too long."""
    while line := file.readline(LONGEST_LINE + 1):
        yield line
        too_long, ended = len(line) > LONGEST_LINE, line.endswith(b"\n")
        del line  # it may be large
        while too_long and not ended:
            rest = file.readline(2**20)
            ended = not rest or rest.endswith(b"\n")


def decode_line(line: bytes, number: int) -> str:
    """Return the text of a line, without a byte order mark if it is the first.

    Raises:
        InputError: the line is too long, or not UTF-8.
    """
    if len(line) > LONGEST_LINE:
        raise InputError(f"longer than {LONGEST_LINE >> 20} MB; each line must be one row, split it")
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        is_utf16 = number == 1 and line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        found = "UTF-16" if is_utf16 else f"not UTF-8 at byte {error.start}"
        raise InputError(f"{found}; save the file as UTF-8 (in Excel: CSV UTF-8)") from None
