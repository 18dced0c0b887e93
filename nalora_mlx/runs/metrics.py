"""metrics.jsonl: one JSON object a line, appended while a run goes on."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nalora_mlx.core.storage import bytes_writer, flush, write_file

METRICS_FILE = "metrics.jsonl"


class MetricsFile:
    """Appends every metrics event of a run to a file; usable as a listener of `train`.

    A full disk stops no run: records wait until they can be written.

    Args:
        path: the file; it is appended to.
        complain: told once, in a sentence, when records cannot be written.
    """

    def __init__(self, path: Path, complain: Callable[[str], None] = print):
        self.path, self.complain = path, complain
        self.waiting: list[str] = []

    def __call__(self, event: dict[str, Any]) -> None:
        """Write an event that has a split; flush the file before a checkpoint refers to it."""
        if "split" in event:
            record = {key: _rounded(value) for key, value in event.items() if key != "event"}
            self._append(json.dumps(record) + "\n")
        elif event.get("event") == "saving" and self.path.exists():
            try:
                flush(self.path)
            except OSError as error:
                self.complain(f"{self.path} cannot be written ({error.strerror}); the run goes on")

    def _append(self, line: str) -> None:
        late = bool(self.waiting)
        self.waiting.append(line)
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(self.waiting))
            self.waiting = []
        except OSError as error:
            if self.path.exists():
                os.truncate(self.path, size)  # no half of a line
            if not late:
                self.complain(f"{self.path} cannot be written ({error.strerror}); its records wait")


def keep_until(source: Path, target: Path, step: int) -> None:
    """Write the records of a metrics file up to a step to a file (the same one, or another), whole or not at all.

    What follows the last record of that step or an earlier one goes, half lines too: it will be told anew.
    """
    lines = source.read_bytes().splitlines(keepends=True) if source.exists() else []
    kept = 0
    for number, line in enumerate(lines, 1):
        try:
            at = json.loads(line).get("step")
        except (ValueError, AttributeError):
            continue
        if isinstance(at, int) and at <= step:
            kept = number
        elif isinstance(at, int):
            break
    if source != target or kept < len(lines):
        write_file(target, bytes_writer(b"".join(lines[:kept])))


def _rounded(value: Any) -> Any:
    """Six significant digits; JSON has no NaN, so that becomes null."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value
