"""JSON Lines and JSON files. A key that stands twice in an object is a problem: silently, the last would win."""

import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from sys import intern
from typing import Any, BinaryIO

from nalora_mlx.core.errors import InputError
from nalora_mlx.data.sources.files import RawRow, Remarks, decode_line, open_file, read_lines

LARGEST_JSON = 2**31  # bytes; a JSON file is held in memory whole


class _RepeatedKey(dict[str, Any]):
    """An object in which a key stands twice."""

    key = ""


def parse_json(text: str) -> tuple[Any, list[str]]:
    """Return the value of a JSON text, and the keys that stand twice in one object.

    Raises:
        InputError: what is wrong with the text, and where.
    """
    repeated = []

    def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = {intern(key): value for key, value in pairs}  # rows share their keys
        if len(content) == len(pairs):
            return content
        content, keys = _RepeatedKey(content), [key for key, _ in pairs]
        content.key = next(key for key in keys if keys.count(key) > 1)
        repeated.append(content.key)
        return content

    try:
        return json.loads(text, object_pairs_hook=build), repeated
    except RecursionError:
        raise InputError("not valid JSON (column 1: nested too deeply)") from None
    except ValueError as error:  # a number with too many digits is a plain ValueError
        line, column = getattr(error, "lineno", 1), getattr(error, "colno", 1)
        place = f"line {line}, column {column}" if line > 1 else f"column {column}"
        raise InputError(f"not valid JSON ({place}: {getattr(error, 'msg', error)})") from None


def _twice(key: str) -> InputError:
    return InputError(f"holds the key {key!r} twice; keep one of the two")


# --- JSON Lines ---------------------------------------------------------------------------------------------


def jsonl_rows(path: Path, remarks: Remarks) -> Iterator[RawRow]:
    """Yield the rows of a .jsonl file, one JSON object per line; blank lines are skipped."""
    with open_file(path) as file:
        yield from _rows_of_lines(file, path, remarks)


def _rows_of_lines(file: BinaryIO, path: Path, remarks: Remarks) -> Iterator[RawRow]:
    for number, line in enumerate(read_lines(file), 1):
        source = f"{path}:{number}"
        try:
            content = _parse_line(decode_line(line, number).strip())
        except InputError as error:
            remarks.problems.append(f"{source}: {error}")
            continue
        if content is not None:
            yield source, content


def _parse_line(text: str) -> dict[str, Any] | None:
    if not text:
        return None
    try:
        content, repeated = parse_json(text)
    except InputError as error:
        raise InputError(f"{error}; each line must be one JSON object") from None
    if not isinstance(content, dict):
        raise InputError(f"holds a {type(content).__name__}; each line must be one JSON object")
    if repeated:
        raise _twice(repeated[0])
    return content


# --- JSON ---------------------------------------------------------------------------------------------------


def json_splits(path: Path, split_names: Iterable[str], remarks: Remarks) -> dict[str, Iterator[RawRow]]:
    """Return the rows of a .json file by split; by "" if they belong to no split.

    The file holds an array of rows, one object with an array of rows, an object with an array per split, or one row.
    JSON Lines under this name are read, too.
    """
    with open_file(path) as file:
        data = file.read(LARGEST_JSON + 1)
    if len(data) > LARGEST_JSON:
        raise InputError(
            f"{path}: larger than {LARGEST_JSON >> 30} GB; write one JSON object per line (.jsonl)"
        )
    if _is_json_lines(data):
        return {"": _rows_of_lines(io.BytesIO(data), path, remarks)}
    try:
        text = data.decode("utf-8-sig")
        del data
        if not text.strip():
            return {"": iter(())}
        content, repeated = parse_json(text)
        del text
        lists = _lists_of_rows(content, split_names)
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte {error.start}; save the file as UTF-8") from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return {
        name: _rows_of_list(rows, f"{path}[{name}]" if name else str(path), bool(repeated), remarks)
        for name, rows in lists.items()
    }


def _is_json_lines(data: bytes) -> bool:
    """Return whether the first line is an object and another line follows."""
    first, _, rest = data.removeprefix(b"\xef\xbb\xbf").lstrip().partition(b"\n")
    if not first.startswith(b"{") or not rest.strip():
        return False
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return False
    return True


def _lists_of_rows(content: Any, split_names: Iterable[str]) -> dict[str, list[Any]]:
    if isinstance(content, list):
        return {"": content}
    if not isinstance(content, dict):
        raise InputError(f"holds a {type(content).__name__}; give an array of JSON objects")
    lists = {
        key: value
        for key, value in content.items()
        if isinstance(value, list) and all(isinstance(row, dict) for row in value)
    }
    if any(
        isinstance(row, dict) and {"role", "from"} & row.keys() for rows in lists.values() for row in rows[:1]
    ):
        return {"": [content]}  # messages: the object is a row itself
    if splits := {key: rows for key, rows in lists.items() if key in split_names}:
        if others := [repr(key) for key, rows in lists.items() if key not in splits and rows]:
            raise InputError(f"holds lists besides those of the splits ({', '.join(others)}); remove them")
        return splits
    lists = {key: rows for key, rows in lists.items() if rows}
    if len(lists) > 1:
        raise InputError(
            f"holds {len(lists)} lists of objects ({', '.join(map(repr, lists))}); keep one, the rows"
        )
    return {"": next(iter(lists.values()), [content])}


def _rows_of_list(rows: list[Any], place: str, repeated: bool, remarks: Remarks) -> Iterator[RawRow]:
    rows.reverse()  # so that each row is freed once it is parsed
    number = 0
    while rows:
        content, number = rows.pop(), number + 1
        if not isinstance(content, dict):
            problem = f"holds a {type(content).__name__}; each item must be one JSON object"
        elif repeated and (key := _repeated_key(content)) is not None:
            problem = str(_twice(key))
        else:
            yield f"{place}:{number}", content
            continue
        remarks.problems.append(f"{place}:{number}: {problem}")


def _repeated_key(value: Any) -> str | None:
    """Return the first key that stands twice in an object of a JSON value, or None."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, _RepeatedKey):
            return value.key
        if isinstance(value, dict | list):
            waiting += value.values() if isinstance(value, dict) else value
    return None
