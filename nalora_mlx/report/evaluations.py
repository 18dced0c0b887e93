"""The section of a report with the results of `nalora evaluate`: tables, and rows whose answers changed."""

from typing import Any

from nalora_mlx.core.errors import counted
from nalora_mlx.report.answers import Piece
from nalora_mlx.report.run_data import RunData
from nalora_mlx.runs.evaluation_rows import by_part, measure_rows, part_title

SHOWN_CHANGES = 3  # answers of each kind
LEGEND = (
    "Differences are tuned minus base on the same rows, in percentage points for shares, with 95 % intervals. "
    "KL is the divergence of the next-token probabilities."
)


def evaluation_sections(runs: list[RunData]) -> list[dict[str, Any]]:
    """Return each result of the runs, the oldest first: title, tables, warning and changed answers."""
    return [_section(run, content, several=len(runs) > 1) for run in runs for content in run.evaluations]


def _section(run: RunData, content: dict[str, Any], several: bool) -> dict[str, Any]:
    adapter = content["adapters"][0]
    title = str(adapter["name"]) if not several else f"{run.name}: {adapter['name']}"
    return {
        "title": title,
        "tables": [
            _table(part_title(content, part), entries)
            for part, entries in by_part(adapter["measures"]).items()
        ],
        "warning": adapter.get("warning"),
        "changes": [
            change for kind in ("better", "worse") if (change := _changes(adapter, kind)) is not None
        ],
    }


def _table(title: str, entries: list[Any]) -> dict[str, Any]:
    return {
        "title": title,
        "head": ["", "base", "tuned", "difference", "95 % interval", "verdict"],
        "rows": [
            [row.title, row.base, row.tuned, row.difference, row.interval, row.verdict]
            for row in measure_rows(entries)
        ],
    }


def _changes(adapter: dict[str, Any], kind: str) -> dict[str, Any] | None:
    """Return the first answers that became better or worse; None without any."""
    indices = (adapter.get("changed") or {}).get(kind) or []
    if not indices:
        return None
    answers = [adapter["answers"][i] for i in indices[:SHOWN_CHANGES]]
    title = f"{counted(len(indices), 'answer')} became {kind}"
    if len(indices) > len(answers):
        title += f", of which the report shows {len(answers)}"
    return {"title": title, "kind": kind, "answers": [_answer(answer) for answer in answers]}


def _answer(answer: dict[str, Any]) -> dict[str, Any]:
    texts = [("Base", answer["base"]["text"], answer["base"]["complete"])]
    texts.append(("Tuned", answer["tuned"]["text"], answer["tuned"]["complete"]))
    if answer["expected"]:
        texts.append(("Expected", answer["expected"], True))
    return {
        "source": answer["source"],
        "prompt": answer["prompt"],
        "texts": [
            {"who": who, "pieces": [Piece(text, False)], "cut": not complete} for who, text, complete in texts
        ],
    }
