"""Results of `nalora evaluate` in a report: the measures as tables, and the answers that became better or worse."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from nalora_mlx.core.errors import counted
from nalora_mlx.report.run_data import RunData
from nalora_mlx.runs.evaluation_rows import MeasureRow, by_part, measure_rows, part_title

SHOWN_CHANGES = 3  # answers of each kind
SHOWN_CHARACTERS = 600  # of a question or an answer
HEAD = ("base", "tuned", "difference", "95 % interval", "verdict")
LEGEND = (
    "Each difference is tuned minus base on the same rows, in percentage points for shares, with its 95 % interval. "
    "KL(base || tuned) says how far the probabilities of the next token moved; 0 is not at all."
)
COMPARISON = "All adapters"


class Row(NamedTuple):
    """A measure: its title, values as text, and "better", "worse" or "" for the last of them."""

    title: str
    cells: list[str]
    told: str = ""


class Part(NamedTuple):
    """The measures on one test set, on general text, or of tasks."""

    title: str
    rows: list[Row]


class Text(NamedTuple):
    """An answer, or the expected one.

    Attributes:
        who: its heading.
        role: "before", "after" or "expected".
        text: its beginning.
        note: that it was cut; empty if it was not.
    """

    who: str
    role: str
    text: str
    note: str


class Question(NamedTuple):
    """A question whose answer changed."""

    source: str
    prompt: str
    texts: list[Text]


class Changes(NamedTuple):
    """Questions whose answers became better, or worse, and how many there are."""

    title: str
    questions: list[Question]


class Section(NamedTuple):
    """A result about an adapter, or several compared.

    Attributes:
        title: adapter and test set.
        run: index of the run; None for several.
        head: columns of the table, without the one of titles.
        parts: rows of the table.
        warning: a sentence; None without one.
        changes: of the answers.
    """

    title: str
    run: int | None
    head: Sequence[str]
    parts: list[Part]
    warning: str | None
    changes: list[Changes]


def evaluation_sections(runs: Sequence[RunData]) -> list[Section]:
    """Return a comparison of what several runs were measured on, and each result, the oldest of a run first."""
    sections = _comparison(runs)
    for i, run in enumerate(runs):
        for content in run.evaluations:
            adapter = content["adapters"][0]
            parts = [
                Part(part_title(content, part), [_row(row) for row in measure_rows(entries)])
                for part, entries in by_part(adapter["measures"]).items()
            ]
            warning = adapter.get("warning")
            warning = warning and f"{warning[0].upper()}{warning[1:]}."
            sections.append(Section(_title(run, content), i, HEAD, parts, warning, _all_changes(adapter)))
    return sections


def _title(run: RunData, content: dict[str, Any]) -> str:
    """Return the adapter and the test set."""
    where = f"on {content['data']}, {content['split']}" if content["data"] else "on general text and tasks"
    return f"{_adapter_name(run, content)} {where}"


def _adapter_name(run: RunData, content: dict[str, Any]) -> str:
    """Return the name of the run in this report, with "best" or a step: the directory may have been renamed."""
    part = str(content["adapters"][0]["name"]).partition("/")[2]
    return f"{run.name}/{part}" if part else run.name


# --- tables -------------------------------------------------------------------------------------------------


def _row(row: MeasureRow) -> Row:
    return Row(row.title, [row.base, row.tuned, row.difference, row.interval, row.verdict], row.told)


def _comparison(runs: Sequence[RunData]) -> list[Section]:
    """Return a section with what several runs were measured on; none if there is nothing."""
    found: dict[tuple[str, ...], dict[str, dict[tuple[str, str], str]]] = {}
    owners: dict[tuple[str, ...], set[int]] = {}
    for i, run in enumerate(runs):
        for content in run.evaluations:
            for part, entries in by_part(content["adapters"][0]["measures"]).items():
                rows = list(measure_rows(entries))
                # Test sets of one name are different ones if the base model's values are.
                key = (part_title(content, part), str(content["model"]), rows[0].title, rows[0].base)
                tuned = {(row.title, row.base): row.tuned for row in rows}
                found.setdefault(key, {})[_adapter_name(run, content)] = tuned
                owners.setdefault(key, set()).add(i)
    found = {key: columns for key, columns in found.items() if len(owners[key]) > 1}
    names = list(dict.fromkeys(name for columns in found.values() for name in columns))
    parts = []
    for (title, *_), columns in found.items():
        measures = dict.fromkeys(measure for column in columns.values() for measure in column)
        compared = [
            Row(measure, [base, *(columns.get(name, {}).get((measure, base), "-") for name in names)])
            for measure, base in measures
        ]
        parts.append(Part(title, compared))
    return [Section(COMPARISON, None, ["base", *names], parts, None, [])] if parts else []


# --- answers ------------------------------------------------------------------------------------------------


def _all_changes(adapter: dict[str, Any]) -> list[Changes]:
    """Return the answers that became better and worse, then the choices that became right and wrong."""
    metric = adapter.get("metric")
    title = next((entry["title"] for entry in adapter["measures"] if entry["name"] == metric), metric)
    found = []
    for kind in ("better", "worse"):
        records = [adapter["answers"][i] for i in (adapter.get("changed") or {}).get(kind) or ()]
        found.append(_changes(f"{kind} by {title}", "answer", records))
    for kind, word in (("better", "right"), ("worse", "wrong")):
        records = (adapter.get("changed_choices") or {}).get(kind) or []
        found.append(_changes(word, "most likely choice", records))
    return [changes for changes in found if changes.questions]


def _changes(kind: str, what: str, records: Sequence[dict[str, Any]]) -> Changes:
    title = f"{counted(len(records), what)} became {kind}"
    if len(records) > SHOWN_CHANGES:
        title += f"; here are {SHOWN_CHANGES}"
    return Changes(title, [_question(record) for record in records[:SHOWN_CHANGES]])


def _question(record: dict[str, Any]) -> Question:
    texts = []
    for name, who, role in (("base", "Base", "before"), ("tuned", "Tuned", "after")):
        if name in record:
            texts.append(_text(who, role, record[name]["text"], record[name]["complete"]))
    if record["expected"] is not None:
        texts.append(_text("Expected", "expected", record["expected"]))
    return Question(record["source"], _text("", "", record["prompt"]).text, texts)


def _text(who: str, role: str, text: str, complete: bool = True) -> Text:
    """Return a text, or its beginning if it is very long."""
    if len(text) > SHOWN_CHARACTERS:
        return Text(who, role, f"{text[:SHOWN_CHARACTERS].rstrip()} …", "shortened here")
    return Text(who, role, text, "" if complete else "cut off at the maximum length")
