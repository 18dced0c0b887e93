"""metrics.jsonl: one JSON object per line, appended during a run."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nalora_mlx.core.storage import bytes_writer, flush, write_file

METRICS_FILE = "metrics.jsonl"


class MetricsFile:
    """A listener of `train` that appends metrics events to a file.

    A full disk does not stop the run: records are kept in memory until they can be written.

    Args:
        path: the file, which may exist.
        warn: called with a message when records cannot be written, once per failure.
    """

    def __init__(self, path: Path, warn: Callable[[str], None] = print):
        self.path, self.warn = path, warn
        self.pending: list[str] = []

    def __call__(self, event: dict[str, Any]) -> None:
        """Append metrics events. Flush the file before a checkpoint is written, because resuming needs its records."""
        if "split" in event:
            record = {key: _round(value) for key, value in event.items() if key != "event"}
            self._append(json.dumps(record) + "\n")
        elif event.get("event") == "saving" and self.path.exists():
            try:
                flush(self.path)
            except OSError as error:
                self.warn(f"{self.path} cannot be written ({error.strerror}); the run goes on")

    def _append(self, line: str) -> None:
        already_failing = bool(self.pending)
        self.pending.append(line)
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(self.pending))
            self.pending = []
        except OSError as error:
            if self.path.exists():
                os.truncate(self.path, size)  # remove a partial line
            if not already_failing:
                self.warn(
                    f"{self.path} cannot be written ({error.strerror}); records are kept in memory and written later"
                )


def keep_until(source: Path, target: Path, step: int) -> None:
    """Copy the records of a metrics file up to a step, atomically; `target` may be the same file.

    Later records and partial lines are dropped, because the resumed run writes them again.
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


def _round(value: Any) -> Any:
    """Round to six significant digits. NaN and infinity become null, because JSON has neither."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _round(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_round(item) for item in value]
    return value
