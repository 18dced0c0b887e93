"""Where training data comes from: directories, files and Hugging Face datasets, as rows by split."""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nalora_mlx.core.data_entries import FEATURE_KEYS, ratio_problem
from nalora_mlx.core.errors import InputError, first_line, listed
from nalora_mlx.core.notices import Note
from nalora_mlx.core.optional_dependencies import install_command
from nalora_mlx.core.parsing import reject_unknown
from nalora_mlx.data.sources.files import RawRow, Remarks
from nalora_mlx.data.sources.readers import (
    ALL_SPLIT_NAMES,
    FORMS,
    SPLIT_NAMES,
    SPLITS,
    TEXT_FORMS,
    form_and_stem,
    read_file,
    read_json_splits,
    read_texts,
)
from nalora_mlx.data.sources.tables import without_decoding, without_nulls

HUB_KEYS = (  # of an entry of hf_dataset; those of mlx-lm, and ratio
    "path",
    "config",
    *(f"{split}_split" for split in SPLITS),
    *FEATURE_KEYS,
    "ratio",
)
EXAMPLE_ROW = '{"prompt": "...", "completion": "..."}'
_NAME = re.compile(r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)?")
_SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})")  # as the Hub names the parts of a split


@dataclass
class Source:
    """The rows of one directory, file or dataset, read when they are iterated over.

    Attributes:
        splits: rows by split.
        texts: whether each row is a whole text file.
        directory: of the data files, where relative paths in rows start; None for data sets of the Hub.
    """

    splits: dict[str, Iterable[RawRow]]
    texts: bool = False
    directory: Path | None = None

    @property
    def is_remote(self) -> bool:
        """Whether it is a data set on the Hub, whose rows the user cannot correct."""
        return self.directory is None and not self.texts


def open_source(path: str, names: Sequence[str], remarks: Remarks, unsplit: str = "train") -> Source:
    """Return the splits of one entry of --data: a directory, a file or a Hugging Face dataset.

    Args:
        path: of the directory or file, or name of the dataset.
        names: of the splits.
        remarks: collects what is wrong or odd.
        unsplit: the split that a file, or a folder of texts, belongs to if it does not say.

    Raises:
        InputError: there is no such thing.
    """
    local = Path(path).expanduser()
    if os.path.isdir(local):
        return _open_directory(local, names, remarks, unsplit)
    if os.path.exists(local):  # unlike Path.exists, false for a name that is too long
        return _open_file(local, names, remarks, unsplit)
    known = form_and_stem(local)[0] or local.suffix.lower() in TEXT_FORMS
    if known or path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise InputError(
            f"--data {path}: no such file or directory; give a file of rows, or a directory with "
            "train.jsonl (and valid.jsonl, test.jsonl)"
        )
    return Source(hub_splits(path, names, remarks))


def numbered(rows: Iterable[Mapping[str, Any]], split: str = "train") -> list[RawRow]:
    """Return rows that are in memory with a source each: "row 1", or "valid row 1" in another split.

    Raises:
        InputError: a row is not a mapping.
    """
    if isinstance(rows, str | bytes | Mapping):
        raise InputError(f"the {split} rows are {type(rows).__name__}; give a list of dicts")
    prefix = "" if split == "train" else f"{split} "
    found = []
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise InputError(
                f"{prefix}row {number} is {type(row).__name__}; give a dict, such as {EXAMPLE_ROW}"
            )
        found.append((f"{prefix}row {number}", without_nulls(dict(row))))
    return found


# --- files --------------------------------------------------------------------------------------------------


def load_local(path: Path, names: Sequence[str]) -> dict[str, list[RawRow]]:
    """Read splits from a directory with {train,valid,test} in any form, or from a file; missing splits have no rows.

    Raises:
        InputError: a file cannot be read, or has bad rows; the message names them as file:line.
    """
    remarks = Remarks()
    opened = _open_directory if path.is_dir() else _open_file
    splits = {name: list(rows) for name, rows in opened(path, names, remarks).splits.items()}
    if remarks.problems:
        raise InputError(listed(remarks.problems))
    return splits


def read_jsonl(path: Path) -> list[RawRow]:
    """Read (source, row) pairs from a .jsonl file or one of another form; blank lines are skipped.

    Raises:
        InputError: the file cannot be read, or has bad lines; the message names them as file:line.
    """
    return load_local(path, ["train"])["train"]


def _open_file(path: Path, names: Sequence[str], remarks: Remarks, unsplit: str = "train") -> Source:
    """Return a file as the split `unsplit`; a .json file may hold several splits."""
    form, _ = form_and_stem(path)
    if path.suffix.lower() in TEXT_FORMS:
        return Source(_only(unsplit, read_texts([path], remarks), names), texts=True)
    if not form:
        raise InputError(
            f"--data {path}: not a form that can be read; give {FORMS}, or {', '.join(TEXT_FORMS)}"
        )
    if form != ".json":
        return Source(_only(unsplit, read_file(path, remarks), names), directory=path.parent)
    found = read_json_splits(path, remarks)
    if "" in found:
        return Source(_only(unsplit, found[""], names), directory=path.parent)
    splits = {name: _named_split(found, name, str(path), remarks) for name in names}
    return Source(splits, directory=path.parent)


def _only(split: str, rows: Iterable[RawRow], names: Sequence[str]) -> dict[str, Iterable[RawRow]]:
    """Return rows as one split, and the others without rows."""
    return {name: rows if name == split else [] for name in names}


def _named_split(
    found: Mapping[str, Iterable[RawRow]], name: str, where: str, remarks: Remarks
) -> Iterable[RawRow]:
    """Return the rows of a split under the first of its names that is there; a notice says if it is another name."""
    there = next((other for other in SPLIT_NAMES[name] if other in found), None)
    if there is None:
        return []
    if there != name:
        remarks.notices.append(Note(f"{where}: {there!r} is read as the {name} split"))
    return found[there]


# --- directories --------------------------------------------------------------------------------------------


def _open_directory(
    directory: Path, names: Sequence[str], remarks: Remarks, unsplit: str = "train"
) -> Source:
    """Return the splits of a directory of data files; of its texts if it has no data file."""
    try:
        children = sorted(path for path in directory.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise InputError(f"cannot read {directory}: {error.strerror}") from None
    data_files = [path for path in children if form_and_stem(path)[0]]
    texts = [] if data_files else _text_files(directory)
    if texts:
        return Source(_text_splits(directory, texts, names, remarks, unsplit), texts=True)
    by_name: dict[str, list[Path]] = {}
    for path in data_files:
        by_name.setdefault(_split_name(path), []).append(path)
    found = {name: _rows_of_split(paths, remarks) for name, paths in by_name.items()}
    splits = {name: _named_split(found, name, str(directory), remarks) for name in names}
    if "train" in names and "train" not in found and not any(name in found for name in ALL_SPLIT_NAMES):
        if not data_files:
            raise InputError(f"--data {directory}: has no train.jsonl, nor a file of {FORMS}, .txt or .md")
        files = listed([path.name for path in data_files], ", ")
        raise InputError(
            f"--data {directory}: none of its files is named train ({files}); rename the training set, "
            "give the file itself, or move texts to a folder without data files"
        )
    return Source(splits, directory=directory)


def _split_name(path: Path) -> str:
    stem = form_and_stem(path)[1]
    shard = _SHARD.fullmatch(stem)
    return shard[1] if shard else stem


def _rows_of_split(paths: Sequence[Path], remarks: Remarks) -> Iterator[RawRow]:
    """Yield the rows of the file of a split, or of all its shards.

    Raises:
        InputError: there are several files, or a shard is missing.
    """
    shards = [_SHARD.fullmatch(form_and_stem(path)[1]) for path in paths]
    counts = {int(shard[2]) if shard else 1 for shard in shards}
    if counts != {len(paths)}:
        files = listed([path.name for path in paths], ", ")
        complete = "all of its parts" if any(shards) else "one of them"
        raise InputError(f"--data {paths[0].parent}: one split has the files {files}; keep {complete}")
    for path in paths:
        yield from read_file(path, remarks)


def _text_files(directory: Path) -> list[Path]:
    """Return the text files below a directory in sorted order, without hidden ones.

    Raises:
        InputError: a subdirectory holds the data file of a split.
    """
    found = []
    for place, folders, files in os.walk(directory):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = [Path(place) / name for name in files if not name.startswith(".")]
        if data := [
            path for path in paths if form_and_stem(path)[0] and _split_name(path) in ALL_SPLIT_NAMES
        ]:
            raise InputError(
                f"--data {directory}: its subdirectory holds {data[0].name}; give it: --data {data[0].parent}"
            )
        found += [path for path in paths if path.suffix.lower() in TEXT_FORMS]
    return sorted(found)


def _text_splits(
    directory: Path, texts: Sequence[Path], names: Sequence[str], remarks: Remarks, unsplit: str
) -> dict[str, Iterable[RawRow]]:
    """Return texts by split if there is a subdirectory of that name; otherwise all texts are of the split `unsplit`."""
    by_name: dict[str, list[Path]] = {}
    for path in texts:
        by_name.setdefault(path.relative_to(directory).parts[0], []).append(path)
    if unsplit not in by_name:
        return _only(unsplit, read_texts(texts, remarks), names)
    unused = [str(path) for name, paths in by_name.items() if name not in ALL_SPLIT_NAMES for path in paths]
    if unused:
        remarks.notices.append(
            f"{directory}: {len(unused)} text files belong to no split and are not used ({listed(unused[:3], ', ')})"
        )
    found = {name: read_texts(paths, remarks) for name, paths in by_name.items()}
    return {name: _named_split(found, name, str(directory), remarks) for name in names}


# --- Hugging Face -------------------------------------------------------------------------------------------


def load_hub(identifier: str, names: Sequence[str]) -> dict[str, list[RawRow]]:
    """Load splits of a Hugging Face dataset whose rows are in a supported format; a missing split gives no rows.

    Raises:
        InputError: the name is not a dataset's, or the dataset cannot be loaded.
    """
    return {name: list(rows) for name, rows in hub_splits(identifier, names, Remarks()).items()}


def hub_splits(identifier: str, names: Sequence[str], remarks: Remarks) -> dict[str, Iterable[RawRow]]:
    """Return the splits that `load_hub` loads, read when they are iterated over."""
    _check_name(identifier, "--data")
    datasets = _import_datasets(f"--data {identifier}: no such file or directory; check the path")
    try:
        loaded = datasets.load_dataset(identifier)
    except Exception as error:
        raise InputError(
            f"--data {identifier}: no such file or directory, and not loadable from the Hugging Face Hub "
            f"({first_line(error)})"
        ) from None
    found = {name: _with_sources(f"{identifier}[{name}]", rows) for name, rows in loaded.items()}
    return {name: _named_split(found, name, identifier, remarks) for name in names}


def hub_entry_splits(entry: Mapping[str, Any], names: Sequence[str]) -> dict[str, Iterable[RawRow]]:
    """Load one entry of `hf_dataset`: path, config, and {train,valid,test}_split, as in mlx_lm.lora.

    Raises:
        InputError: a path or split is missing, or the dataset cannot be loaded.
    """
    reject_unknown(entry, HUB_KEYS, "hf_dataset")
    if "path" not in entry:
        raise InputError("hf_dataset: each record needs a 'path'")
    path = entry["path"]
    _check_name(path, "hf_dataset")
    if problem := ratio_problem(entry.get("ratio", 1)):
        raise InputError(f"hf_dataset {path}: {problem}")
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
    rows: dict[str, Iterable[RawRow]] = {}
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
        raise InputError(f"{what}; to load it from the Hugging Face Hub, {install_command('data')}") from None
    return datasets


def _with_sources(name: str, rows: Iterable[Mapping[str, Any]]) -> Iterator[RawRow]:
    for number, row in enumerate(without_decoding(rows), 1):
        yield f"{name}:{number}", without_nulls(dict(row))
