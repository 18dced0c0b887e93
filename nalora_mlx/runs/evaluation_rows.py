"""Results of `nalora evaluate` as rows of text, which the terminal, the report and the model card show alike."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from nalora_mlx.core.errors import counted

LOSS, CHOICE, GENERAL_LOSS, KL = "loss", "choice", "general_loss", "kl"  # names of measures
TEST, GENERAL, TASKS = "test", "general", "tasks"  # what they are measured on
NATS, SHARE, SCORE = "nats per token", "share", "score"  # units
NOT_TOLD = "no difference can be told"

Numbers = Sequence[float | None] | None  # value, low and high of an interval


class MeasureRow(NamedTuple):
    """A measure as text.

    Attributes:
        title: of the measure.
        base, tuned: values; a dash for none.
        difference: tuned - base, in percentage points for shares; empty if the two are not compared.
        interval: of the difference, 95 %.
        told: "better", "worse", or "" if no difference can be told.
        verdict: the same in words, with the p-value of right and wrong answers.
    """

    title: str
    base: str
    tuned: str = ""
    difference: str = ""
    interval: str = ""
    told: str = ""
    verdict: str = ""


def measure_rows(entries: Sequence[Mapping[str, Any]]) -> Iterator[MeasureRow]:
    """Yield the row of each measure, and the perplexity below each loss."""
    for entry in entries:
        unit, told = entry["unit"], entry.get("told", "")
        row = MeasureRow(
            entry["title"], format_value(entry["base"], unit), format_value(entry["tuned"], unit)
        )
        if "difference" in entry:
            value, low, high = entry["difference"]
            known = low is not None and high is not None
            p = entry["p"]
            row = row._replace(
                difference=_signed(value, unit),
                interval=f"{_signed(low, unit)} to {_signed(high, unit)}" if known else "",
                told=told,
                verdict=(told or NOT_TOLD) + ("" if p is None else f", McNemar p {_p_value(p)}"),
            )
        yield row
        if entry["name"] in (LOSS, GENERAL_LOSS):
            yield MeasureRow("perplexity", _perplexity(entry["base"]), _perplexity(entry["tuned"]))


def by_part(entries: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Return measures by what they are measured on, in their order."""
    parts: dict[str, list[Mapping[str, Any]]] = {}
    for entry in entries:
        parts.setdefault(entry["part"], []).append(entry)
    return parts


def part_title(content: Mapping[str, Any], part: str) -> str:
    """Return what a part of a result is about: the test rows, general text, or tasks."""
    if part == TEST:
        rows = counted(content["rows"], "row")
        if content["rows"] < content["of"]:
            rows = f"{content['rows']:,} of {counted(content['of'], 'row')}"
        return f"{content['data']}, {content['split']}: {rows}"
    if part == GENERAL:
        name = (content.get("settings") or {}).get("general")
        return f"general text{f' ({name})' if name else ''}: {counted(content['passages'], 'passage')}"
    return "standard tasks"


def format_value(numbers: Numbers, unit: str) -> str:
    """Return the value of an interval as text; a dash for none."""
    if numbers is None or numbers[0] is None:
        return "-"
    return f"{numbers[0]:.1%}" if unit == SHARE else f"{numbers[0]:.3f}"


def _signed(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    text = f"{100 * value:+.1f}" if unit == SHARE else f"{value:+.3f}"
    return text if float(text) else text[1:]  # zero has no sign


def _perplexity(numbers: Numbers) -> str:
    if numbers is None or numbers[0] is None:
        return "-"
    return f"{math.exp(min(numbers[0], 700)):.4g}"


def _p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"
