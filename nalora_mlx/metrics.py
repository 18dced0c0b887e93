"""metrics.jsonl: one JSON object a line, appended while a run goes on."""

import json
import math
from pathlib import Path
from typing import Any


class MetricsFile:
    """Appends every metrics event of a run to a file; usable as a listener of `train`."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path

    def __call__(self, event: dict[str, Any]) -> None:
        """Write an event that has a split; others are not measurements."""
        if "split" not in event:
            return
        record = {key: _rounded(value) for key, value in event.items() if key != "event"}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def _rounded(value: Any) -> Any:
    """Six significant digits; JSON has no NaN, so that becomes null."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value
