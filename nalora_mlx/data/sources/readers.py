"""Readers of data files, by form: each yields the rows of one file as (source, JSON object) pairs."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from nalora_mlx.core.errors import InputError, counted
from nalora_mlx.core.notices import Note
from nalora_mlx.data.sources.files import COMPRESSIONS, RawRow, Remarks, reading
from nalora_mlx.data.sources.json_files import json_splits, jsonl_rows
from nalora_mlx.data.sources.tables import csv_rows, parquet_rows, tsv_rows

SPLITS = ("train", "valid", "test")
# Names of each split in files, in data sets on the Hub, and in JSON files; the first that is there counts.
SPLIT_NAMES = {
    "train": ("train", "train_prefs", "train_sft"),
    "valid": ("valid", "validation", "val", "dev"),
    "test": ("test", "test_prefs", "test_sft"),
}
ALL_SPLIT_NAMES = tuple(name for names in SPLIT_NAMES.values() for name in names)
TEXT_FORMS = (".txt", ".md")


def _json_rows(path: Path, remarks: Remarks) -> Iterator[RawRow]:
    splits = json_splits(path, ALL_SPLIT_NAMES, remarks)
    if "" not in splits:
        raise InputError(f"{path}: holds several splits; give the file itself: --data {path}")
    yield from splits[""]


Reader = Callable[[Path, Remarks], Iterator[RawRow]]
READERS: dict[str, Reader] = {
    ".jsonl": jsonl_rows,
    ".json": _json_rows,
    ".csv": csv_rows,
    ".tsv": tsv_rows,
    ".parquet": parquet_rows,
}
FORMS = f"{', '.join(READERS)}, also with {', '.join(COMPRESSIONS)}"


def form_and_stem(path: Path) -> tuple[str, str]:
    """Return the form of a data file and its name without it: ".csv" and "train" for train.csv.gz.

    The form is empty if no reader knows the file.
    """
    name = path.name.lower()
    for suffix in COMPRESSIONS:
        name = name.removesuffix(suffix)
    for form in READERS:
        if name.endswith(form):
            compressed = form == ".parquet" and not path.name.lower().endswith(form)
            return ("", name) if compressed else (form, name.removesuffix(form))
    return "", name


def read_file(path: Path, remarks: Remarks) -> Iterator[RawRow]:
    """Yield the rows of a data file, and note what is wrong with others.

    Raises:
        InputError: the file cannot be read.
    """
    with reading(path):
        yield from READERS[form_and_stem(path)[0]](path, remarks)


def read_json_splits(path: Path, remarks: Remarks) -> dict[str, Iterator[RawRow]]:
    """Return the rows of a .json file by split, or by "" if it holds no splits.

    Raises:
        InputError: the file cannot be read.
    """
    with reading(path):
        return json_splits(path, ALL_SPLIT_NAMES, remarks)


def read_texts(paths: Sequence[Path], remarks: Remarks) -> Iterator[RawRow]:
    """Yield each text file as a row, named by its path; empty files are left out."""
    empty = 0
    for path in paths:
        with reading(path):
            try:
                text = path.read_text("utf-8-sig")
            except UnicodeDecodeError as error:
                remarks.problems.append(f"{path}: not UTF-8 at byte {error.start}; save the file as UTF-8")
                continue
        if text.strip():
            yield str(path), {"text": text}
        else:
            empty += 1
    if empty:
        verbs = "is empty and was" if empty == 1 else "are empty and were"
        remarks.notices.append(Note(f"{empty} of {counted(len(paths), 'text file')} {verbs} left out"))
