"""The value of `data`: one source or several, each with how often an epoch holds its rows and the keys of its rows."""

import math
import os
from collections.abc import Mapping
from typing import Any

from nalora_mlx.core.errors import InputError
from nalora_mlx.core.parsing import reject_unknown

FEATURE_KEYS = tuple(f"{part}_feature" for part in ("prompt", "completion", "chat", "text"))
ENTRY_KEYS = ("path", "ratio", *FEATURE_KEYS)
LARGEST_RATIO = 1000
ROWS_IN_MEMORY = "rows given in Python"  # the path of an entry whose rows come from no file


def data_entries(data: Any) -> list[dict[str, Any]]:
    """Return a mapping with path, ratio and given features for each source in the value of `data`.

    A source is a path, PATH=RATIO, or a mapping. A path that exists is never taken apart.

    Raises:
        InputError: lists all entries of the wrong form.
    """
    entries, problems = [], []
    for given in data if isinstance(data, list | tuple) else [data]:
        try:
            entries.append(_entry(given))
        except InputError as error:
            problems.append(str(error))
    if not entries and not problems:
        problems.append("data names no source")
    if problems:
        raise InputError("; ".join(problems))
    return entries


def _entry(given: Any) -> dict[str, Any]:
    if isinstance(given, Mapping):
        reject_unknown(given, ENTRY_KEYS, "data")
        entry = {"ratio": 1.0, **given}
        for key in ("path", *FEATURE_KEYS):
            if not isinstance(entry.get(key, ""), str):
                raise InputError(f"data: {key} is {entry[key]!r}; it takes text")
    elif isinstance(given, str):
        entry = {"path": given, "ratio": 1.0}
        path, equals, ratio = given.rpartition("=")
        if equals and not os.path.exists(os.path.expanduser(given)):
            try:
                entry = {"path": path, "ratio": float(ratio)}
            except ValueError:
                raise InputError(f"data {given}: {ratio!r} is not a ratio; give PATH=0.25") from None
    else:
        raise InputError(f"data: {given!r} is neither a path nor a mapping with path and ratio")
    if not entry.get("path"):
        raise InputError(f"data: {given!r} has no path")
    if problem := ratio_problem(entry["ratio"]):
        raise InputError(f"data {entry['path']}: {problem}")
    return entry


def ratio_problem(ratio: Any) -> str:
    """Return what is wrong with a ratio, or an empty string."""
    if isinstance(ratio, bool) or not isinstance(ratio, int | float):
        return f"ratio is {ratio!r}; it takes a number"
    if not (math.isfinite(ratio) and 0 < ratio <= LARGEST_RATIO):
        return f"ratio is {ratio}; it must be above 0 and at most {LARGEST_RATIO}"
    return ""
