"""The terminal output of an evaluation: a table of measures, the verdicts, and the rows whose answers changed."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from nalora_mlx.core.errors import counted
from nalora_mlx.runs.evaluation_rows import GENERAL, NOT_TOLD, by_part, measure_rows, part_title

COLORS = {"better": "green", "worse": "red", "": "dim"}
SHOWN_CHARACTERS = 300  # of a prompt or an answer
Entry = Mapping[str, Any]


def measures_table(
    content: Mapping[str, Any], name: str | None, entries: Sequence[Entry], base: str = "base"
) -> Table:
    """Return the measures of a base model and of a tuned one as a table.

    Args:
        content: the result, see `results.document`.
        name: of the tuned model; None for the base model alone.
        entries: its measures.
        base: name of the model that it is compared with.
    """
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for number, (part, found) in enumerate(by_part(entries).items()):
        title = part_title(content, part)
        if number:
            table.add_row(Text(title, "dim"))
        else:
            table.add_column(title, no_wrap=True)
            for heading in (base, *([name, "difference", "95 % interval", ""] if name else [])):
                table.add_column(heading, justify="left" if heading in ("", "95 % interval") else "right")
        for row in measure_rows(found):
            cells: list[str | Text] = [f"  {row.title}", row.base]
            if name:
                color = COLORS[row.told]
                # A terminal is narrow; sentences below the table say what is not told.
                verdict = row.verdict.replace(NOT_TOLD, "not told").replace("McNemar ", "")
                cells += [row.tuned, Text(row.difference, color), row.interval, Text(verdict, color)]
            table.add_row(*cells)
    return table


def sentences(entries: Sequence[Entry]) -> Iterator[str]:
    """Yield a sentence for each measure by which no difference can be told."""
    for entry in entries:
        if entry.get("told") == "":
            where = " on general text" if entry["part"] == GENERAL else ""
            yield f"{entry['title']}{where}: {entry['words']}"


def changes_text(
    records: Sequence[Mapping[str, Any]], changes: Mapping[str, Sequence[int]], title: str, shown: int
) -> list[Text]:
    """Return the rows whose answers became better, and those that became worse, as text.

    Args:
        records: of all answers, see `results.answer_records`.
        changes: their indices, see `results.changed`.
        title: of the metric.
        shown: number of rows of each kind.
    """
    lines: list[Text] = []
    for kind in ("better", "worse"):
        found = changes[kind]
        lines.append(
            Text(f"{counted(len(found), 'answer')} {kind} by {title}", COLORS[kind] if found else "")
        )
        for i in found[:shown]:
            record = records[i]
            lines.append(Text(f"  {record['source']}  {_short(record['prompt'])}"))
            for label, text in (
                ("expected", record["expected"]),
                ("base", record["base"]["text"]),
                ("tuned", record["tuned"]["text"]),
            ):
                if text is not None:
                    lines.append(Text(f"    {label:<9} {_short(text)}", "dim" if label == "expected" else ""))
        if len(found) > shown > 0:
            lines.append(Text(f"  and {len(found) - shown} more, see the file of the result", "dim"))
    return lines


def cut_answers(records: Sequence[Mapping[str, Any]], max_tokens: int) -> list[str]:
    """Return a notice if answers were cut at the maximum length."""
    counts = {
        name: sum(not record[name]["complete"] for record in records if name in record)
        for name in ("base", "tuned")
    }
    if not any(counts.values()):
        return []
    return [
        f"of {len(records)} answers, {counts['base']} of the base model and {counts['tuned']} of the tuned one were "
        f"cut at {max_tokens} tokens; --max-tokens raises the limit"
    ]


def _short(text: str) -> str:
    line = " / ".join(part.strip() for part in text.splitlines() if part.strip())
    return line if len(line) <= SHOWN_CHARACTERS else f"{line[:SHOWN_CHARACTERS]} ..."
