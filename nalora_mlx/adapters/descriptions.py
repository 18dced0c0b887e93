"""Short descriptions of a model's modules: paths grouped by layer, and keys grouped by reason."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any


def group_layers(items: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Group equal values whose paths differ only in the layer number: model.layers.0-15.mlp."""
    groups: dict[tuple[str, Any], list[int]] = {}
    for path, value in items:
        number = re.search(r"\d+", path)
        pattern = path if number is None else f"{path[: number.start()]}{{}}{path[number.end() :]}"
        groups.setdefault((pattern, value), []).append(int(number.group()) if number else 0)
    for (pattern, value), numbers in groups.items():
        yield pattern.replace("{}", _format_ranges(sorted(numbers))), value


def _format_ranges(numbers: list[int]) -> str:
    """Format increasing numbers as ranges: 0-3,7."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in ranges)


def group_reasons(keys: Mapping[str, str]) -> str:
    """Format key -> reason, naming each reason once: a, b (gates); c (routers)."""
    groups: dict[str, list[str]] = {}
    for key, reason in keys.items():
        groups.setdefault(reason, []).append(key)
    return "; ".join(f"{', '.join(names)} ({reason})" for reason, names in groups.items())
