"""Rows of training data as they stand in files and in Hugging Face datasets: (source, row) pairs."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from nalora_mlx.core.errors import InputError, first_line, listed
from nalora_mlx.core.parsing import reject_unknown

SPLITS = ("train", "valid", "test")
HUB_KEYS = (  # of a record of hf_dataset, as in mlx-lm
    "path",
    "config",
    *(f"{split}_split" for split in SPLITS),
    *(f"{part}_feature" for part in ("prompt", "completion", "chat", "text")),
)
_NAME = re.compile(r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)?")
LONGEST_LINE = (
    32 * 2**20
)  # bytes; more is a whole file in one line, and would be cut to a few thousand tokens
Row = tuple[str, dict[str, Any]]


# --- files --------------------------------------------------------------------------------------------------


def read_lines(path: Path) -> tuple[list[Row], list[str]]:
    """Read the rows of a .jsonl file, and what is wrong with the lines that hold none; blank lines are skipped.

    Raises:
        InputError: the file cannot be read.
    """
    rows, problems = [], []
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(_lines(file), 1):
                source = f"{path}:{number}"
                found = _parse(raw, first=number == 1)
                if isinstance(found, str):
                    problems.append(f"{source}: {found}")
                elif found is not None:
                    rows.append((source, found))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    return rows, problems


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Lines of a file; of one that is too long, one byte more than is allowed."""
    while line := file.readline(LONGEST_LINE + 1):
        yield line
        too_long, ended = len(line) > LONGEST_LINE, line.endswith(b"\n")
        del line  # it may be large
        while too_long and not ended:
            rest = file.readline(2**20)
            ended = not rest or rest.endswith(b"\n")


def _parse(raw: bytes, first: bool) -> dict[str, Any] | str | None:
    """The object of a line, or what is wrong with it, or None for a blank one."""
    if len(raw) > LONGEST_LINE:
        return f"longer than {LONGEST_LINE >> 20} MB; each line must be one row, cut it into several"
    try:
        line = raw.decode("utf-8-sig" if first else "utf-8").strip()
    except UnicodeDecodeError as error:
        return f"not UTF-8 at byte {error.start}; save the file as UTF-8"
    if not line:
        return None
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # a number of too many digits is a plain ValueError
        detail = getattr(error, "msg", "nested too deeply" if isinstance(error, RecursionError) else error)
        column = getattr(error, "colno", 1)
        return f"not valid JSON (column {column}: {detail}); each line must be one object"
    if not isinstance(row, dict):
        return f"holds a {type(row).__name__}; each line must be one JSON object"
    return row


def read_jsonl(path: Path) -> list[Row]:
    """Read (source, row) pairs from a .jsonl file; blank lines are skipped.

    Raises:
        InputError: names the bad lines as file:line, with what is wrong.
    """
    rows, problems = read_lines(path)
    if problems:
        raise InputError(listed(problems))
    return rows


def load_local(directory: Path, names: Sequence[str]) -> dict[str, list[Row]]:
    """Read {name}.jsonl for each name that exists in a directory; an absent file gives no rows."""
    return {
        name: read_jsonl(path) if (path := directory / f"{name}.jsonl").exists() else [] for name in names
    }


# --- Hugging Face -------------------------------------------------------------------------------------------


def load_hub(identifier: str, names: Sequence[str]) -> dict[str, list[Row]]:
    """Load the splits of a Hugging Face dataset that is already in a supported format.

    Raises:
        InputError: the name is neither a directory nor a dataset that can be loaded.
    """
    _check_name(identifier, "--data")
    datasets = _import_datasets(f"--data {identifier}: no such directory; check the path")
    try:
        loaded = datasets.load_dataset(identifier)
    except Exception as error:
        raise InputError(
            f"--data {identifier}: no such directory, and not loadable from the Hugging Face Hub ({first_line(error)})"
        ) from None
    return {name: _numbered(f"{identifier}[{name}]", loaded.get(name, [])) for name in names}


def load_hub_entry(entry: dict[str, Any], names: Sequence[str]) -> dict[str, list[Row]]:
    """Load one record of `hf_dataset`: path, config, and {train,valid,test}_split as mlx_lm.lora has them.

    Raises:
        InputError: a missing path or split, or a dataset that cannot be loaded.
    """
    reject_unknown(entry, HUB_KEYS, "hf_dataset")
    if "path" not in entry:
        raise InputError("hf_dataset: each record needs a 'path'")
    _check_name(entry["path"], "hf_dataset")
    settings = entry.get("config", {})
    if not isinstance(settings, dict) or "trust_remote_code" in settings:
        raise InputError(
            f"hf_dataset {entry['path']}: config must hold settings of load_dataset, and run no code"
        )
    datasets = _import_datasets(f"hf_dataset {entry['path']}")
    splits = {
        "train": entry.get("train_split", "train[:80%]"),
        "valid": entry.get("valid_split", "train[-10%:]"),
        "test": entry.get("test_split"),
    }
    rows = {}
    for name in names:
        if splits[name] is None:
            raise InputError(f"hf_dataset {entry['path']}: give {name}_split")
        try:
            loaded = datasets.load_dataset(entry["path"], split=splits[name], **settings)
        except Exception as error:
            raise InputError(
                f"hf_dataset {entry['path']}: cannot load {splits[name]} ({first_line(error)})"
            ) from None
        rows[name] = _numbered(f"{entry['path']}[{splits[name]}]", loaded)
    return rows


def _check_name(name: Any, flag: str) -> None:
    """Refuse what is no name of a data set: a path could lead anywhere."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or ".." in name.split("/"):
        raise InputError(f"{flag} {name!r}: no name of a Hugging Face dataset (these are owner/name)")


def _import_datasets(what: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise InputError(f"{what}; to load it from the Hugging Face Hub, pip install datasets") from None
    return datasets


def _numbered(name: str, rows: Any) -> list[Row]:
    return [(f"{name}:{number}", dict(row)) for number, row in enumerate(rows, 1)]
