"""Tables as rows: CSV and TSV by the standard library, Parquet by pyarrow."""

import csv
import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from nalora_mlx.core.errors import InputError, first_line
from nalora_mlx.core.notices import Note
from nalora_mlx.core.optional_dependencies import install_command
from nalora_mlx.data.sources.files import LONGEST_LINE, RawRow, Remarks, decode_line, open_file, read_lines

BATCH_ROWS = 256  # rows of a Parquet file to decode at once
BUFFER_BYTES = 2**20  # of a column to read at once


# --- CSV and TSV --------------------------------------------------------------------------------------------


def csv_rows(path: Path, remarks: Remarks) -> Iterator[RawRow]:
    """Yield the rows of a .csv file, whose first row names the columns.

    Semicolons or tabs separate the cells if the header has no comma, as spreadsheets write in many languages.
    """
    return _table_rows(path, ",;\t", remarks)


def tsv_rows(path: Path, remarks: Remarks) -> Iterator[RawRow]:
    """Yield the rows of a .tsv file, whose first row names the columns."""
    return _table_rows(path, "\t", remarks)


def _table_rows(path: Path, delimiters: str, remarks: Remarks) -> Iterator[RawRow]:
    """Yield rows without their empty cells, named by the line on which they start; blank rows are skipped.

    The first of the delimiters that the header has separates the cells.
    """
    csv.field_size_limit(LONGEST_LINE)
    number = 1
    with open_file(path) as file:
        try:
            lines = (decode_line(line, number) for number, line in enumerate(read_lines(file), 1))
            first = next(lines, "")
            delimiter = next((other for other in delimiters if other in first), delimiters[0])
            if delimiter != delimiters[0]:
                remarks.notices.append(
                    Note(f"{path}: its header has no comma, so {delimiter!r} separates the cells")
                )
            table = csv.reader(itertools.chain([first], lines), delimiter=delimiter, strict=True)
            header: list[str] | None = None
            for cells in table:
                source, number = f"{path}:{number}", table.line_num + 1
                if not any(cell.strip() for cell in cells):
                    continue
                if header is None:
                    header = [cell.strip() for cell in cells]
                    if twice := [name for name in header if name and header.count(name) > 1]:
                        remarks.problems.append(
                            f"{source}: names the column {twice[0]!r} twice; keep one of the two"
                        )
                        return
                elif len(cells) == len(header):
                    # A column without a name is the index that pandas writes.
                    yield (
                        source,
                        {name: cell for name, cell in zip(header, cells, strict=True) if name and cell},
                    )
                else:
                    remarks.problems.append(
                        f"{source}: has {len(cells)} cells, the header has {len(header)}; "
                        "quote cells that hold the separator"
                    )
        except csv.Error as error:  # the rows that follow cannot be told apart
            remarks.problems.append(
                f"{path}:{number}: not valid CSV ({error}); double the quotes inside quoted cells, "
                "and end lines with a line feed"
            )
        except InputError as error:
            remarks.problems.append(f"{path}:{number}: {error}")


# --- Parquet ------------------------------------------------------------------------------------------------


def parquet_rows(path: Path, remarks: Remarks) -> Iterator[RawRow]:
    """Yield the rows of a .parquet file without nulls, a few at a time.

    Raises:
        InputError: pyarrow is missing, or the file is damaged.
    """
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise InputError(
            f"{path}: reading Parquet needs pyarrow; {install_command('data')}, or write the rows as .jsonl"
        ) from None
    try:
        with ParquetFile(path, buffer_size=BUFFER_BYTES, pre_buffer=False) as file:
            names = file.schema_arrow.names
            if twice := [name for name in names if names.count(name) > 1]:
                raise InputError(f"{path}: has the column {twice[0]!r} twice; keep one of the two")
            batches = file.iter_batches(batch_size=BATCH_ROWS)
            rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
            for number, content in enumerate(rows, 1):
                yield f"{path}:{number}", without_nulls(content)
    except (OSError, InputError):
        raise
    except Exception as error:  # pyarrow raises many kinds
        raise InputError(
            f"cannot read {path}: {first_line(error).rstrip('.')}; write the file again"
        ) from None


def without_nulls(value: Any) -> Any:
    """Return a value of Arrow without the keys whose value is null.

    Arrow gives all objects of a column the same keys, so that each holds those of the others as nulls.
    """
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


# --- data sets of the datasets library ------------------------------------------------------------------------


def without_decoding(rows: Iterable[Mapping[str, Any]]) -> Iterable[Mapping[str, Any]]:
    """Return rows; those of a data set with images hold the bytes or the path of each image, not its pixels."""
    features, form = getattr(rows, "features", None), getattr(rows, "format", None)
    if form is None or form["type"] is not None or not _has_images(features):
        return rows
    batches = rows.with_format("arrow").iter(BATCH_ROWS)  # type: ignore[attr-defined]
    return itertools.chain.from_iterable(batch.to_pylist() for batch in batches)


def _has_images(feature: Any) -> bool:
    """Return whether a feature of the datasets library is or holds an Image."""
    if isinstance(feature, Mapping):
        return any(map(_has_images, feature.values()))
    inner = getattr(feature, "feature", None)  # of a list
    return type(feature).__name__ == "Image" or (inner is not None and _has_images(inner))
