"""Where training data comes from: .jsonl files and Hugging Face datasets, read as (source, JSON object) pairs."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from nalora_mlx.core.errors import InputError, first_line, listed
from nalora_mlx.core.parsing import reject_unknown

SPLITS = ("train", "valid", "test")
HUB_KEYS = (  # of an entry of hf_dataset, as in mlx-lm
    "path",
    "config",
    *(f"{split}_split" for split in SPLITS),
    *(f"{part}_feature" for part in ("prompt", "completion", "chat", "text")),
)
LONGEST_LINE = 32 * 2**20  # bytes; a longer line is a whole file, and would be cut to a few thousand tokens
_NAME = re.compile(r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)?")
RawRow = tuple[str, dict[str, Any]]  # source and content


# --- files --------------------------------------------------------------------------------------------------


def read_directory(directory: Path, names: Sequence[str]) -> tuple[dict[str, list[RawRow]], list[str]]:
    """Return the rows of {name}.jsonl for each name, none if there is no such file, and what is wrong with lines.

    Raises:
        InputError: a file cannot be read.
    """
    splits: dict[str, list[RawRow]] = {}
    problems: list[str] = []
    for name in names:
        path = directory / f"{name}.jsonl"
        splits[name], found = read_lines(path) if path.exists() else ([], [])
        problems += found
    return splits, problems


def load_local(directory: Path, names: Sequence[str]) -> dict[str, list[RawRow]]:
    """Read {name}.jsonl for each name from a directory; a missing file gives no rows.

    Raises:
        InputError: a file cannot be read, or has bad lines; the message names them as file:line.
    """
    splits, problems = read_directory(directory, names)
    if problems:
        raise InputError(listed(problems))
    return splits


def read_jsonl(path: Path) -> list[RawRow]:
    """Read (source, row) pairs from a .jsonl file; blank lines are skipped.

    Raises:
        InputError: the file cannot be read, or has bad lines; the message names them as file:line.
    """
    rows, problems = read_lines(path)
    if problems:
        raise InputError(listed(problems))
    return rows


def read_lines(path: Path) -> tuple[list[RawRow], list[str]]:
    """Return the rows of a .jsonl file, and what is wrong with its other lines; blank lines are skipped.

    Raises:
        InputError: the file cannot be read.
    """
    rows, problems = [], []
    try:
        with path.open("rb") as file:
            for number, line in enumerate(_lines(file), 1):
                source = f"{path}:{number}"
                try:
                    content = _parse_line(line, "utf-8-sig" if number == 1 else "utf-8")
                except InputError as error:
                    problems.append(f"{source}: {error}")
                    continue
                if content is not None:
                    rows.append((source, content))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    return rows, problems


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Yield the lines of a file; only the first LONGEST_LINE + 1 bytes of a line that is too long."""
    while line := file.readline(LONGEST_LINE + 1):
        yield line
        too_long, ended = len(line) > LONGEST_LINE, line.endswith(b"\n")
        del line  # it may be large
        while too_long and not ended:
            rest = file.readline(2**20)
            ended = not rest or rest.endswith(b"\n")


def _parse_line(line: bytes, encoding: str) -> dict[str, Any] | None:
    """Return the object of a line, None for a blank line.

    Raises:
        InputError: what is wrong with the line.
    """
    if len(line) > LONGEST_LINE:
        raise InputError(f"longer than {LONGEST_LINE >> 20} MB; each line must be one row, split it")
    try:
        text = line.decode(encoding).strip()
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 at byte {error.start}; save the file as UTF-8") from None
    if not text:
        return None
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:  # a number with too many digits is a plain ValueError
        detail = getattr(error, "msg", "nested too deeply" if isinstance(error, RecursionError) else error)
        column = getattr(error, "colno", 1)
        raise InputError(
            f"not valid JSON (column {column}: {detail}); each line must be one JSON object"
        ) from None
    if not isinstance(content, dict):
        raise InputError(f"holds a {type(content).__name__}; each line must be one JSON object")
    return content


# --- Hugging Face -------------------------------------------------------------------------------------------


def load_hub(identifier: str, names: Sequence[str]) -> dict[str, list[RawRow]]:
    """Load splits of a Hugging Face dataset whose rows are in a supported format; a missing split gives no rows.

    Raises:
        InputError: the name is not a dataset's, or the dataset cannot be loaded.
    """
    _check_name(identifier, "--data")
    datasets = _import_datasets(f"--data {identifier}: no such directory; check the path")
    try:
        loaded = datasets.load_dataset(identifier)
    except Exception as error:
        raise InputError(
            f"--data {identifier}: no such directory, and not loadable from the Hugging Face Hub ({first_line(error)})"
        ) from None
    return {name: _with_sources(f"{identifier}[{name}]", loaded.get(name, [])) for name in names}


def load_hub_entry(entry: dict[str, Any], names: Sequence[str]) -> dict[str, list[RawRow]]:
    """Load one entry of `hf_dataset`: path, config, and {train,valid,test}_split, as in mlx_lm.lora.

    Raises:
        InputError: a path or split is missing, or the dataset cannot be loaded.
    """
    reject_unknown(entry, HUB_KEYS, "hf_dataset")
    if "path" not in entry:
        raise InputError("hf_dataset: each record needs a 'path'")
    path = entry["path"]
    _check_name(path, "hf_dataset")
    settings = entry.get("config", {})
    if not isinstance(settings, dict) or "trust_remote_code" in settings:
        raise InputError(
            f"hf_dataset {path}: config must hold settings of load_dataset, without trust_remote_code"
        )
    datasets = _import_datasets(f"hf_dataset {path}")
    splits = {
        "train": entry.get("train_split", "train[:80%]"),
        "valid": entry.get("valid_split", "train[-10%:]"),
        "test": entry.get("test_split"),
    }
    rows = {}
    for name in names:
        split = splits[name]
        if split is None:
            raise InputError(f"hf_dataset {path}: give {name}_split")
        try:
            loaded = datasets.load_dataset(path, split=split, **settings)
        except Exception as error:
            raise InputError(f"hf_dataset {path}: cannot load {split} ({first_line(error)})") from None
        rows[name] = _with_sources(f"{path}[{split}]", loaded)
    return rows


def _check_name(name: Any, flag: str) -> None:
    """Raise InputError unless it is the name of a dataset; a path could lead anywhere."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or ".." in name.split("/"):
        raise InputError(f"{flag} {name!r}: not the name of a Hugging Face dataset; give owner/name")


def _import_datasets(what: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise InputError(f"{what}; to load it from the Hugging Face Hub, pip install datasets") from None
    return datasets


def _with_sources(name: str, rows: Any) -> list[RawRow]:
    return [(f"{name}:{number}", dict(row)) for number, row in enumerate(rows, 1)]
