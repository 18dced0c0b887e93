"""RUN/evaluations/: results of `nalora evaluate` about a run's adapters, for the report and the model card."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nalora_mlx.adapters.files import ADAPTER_FILE
from nalora_mlx.adapters.merge_record import adapter_digest
from nalora_mlx.core import storage
from nalora_mlx.core.errors import InputError
from nalora_mlx.runs.checkpoints import BEST, CHECKPOINTS

EVALUATIONS = "evaluations"
FORMAT = 1
KEYS = ("model", "split", "rows", "adapters")


def run_of(adapter: Path) -> tuple[Path, str]:
    """Return the directory of the run that an adapter belongs to, and the adapter's name in it.

    The name is "best" or that of a checkpoint; empty for the run's own adapter.
    """
    path = adapter.expanduser().absolute()
    if path.name == BEST and path.parent.name:
        return adapter.parent, BEST
    if path.parent.name == CHECKPOINTS:
        return adapter.parent.parent, path.name
    return adapter, ""


def evaluation_file(adapter: Path, data: str | None, split: str) -> Path:
    """Return the file for the result of an adapter on a test set: a later result on the same set replaces it."""
    run, name = run_of(adapter)
    parts = [Path(data).name if data else "", split if data else "general", name]
    stem = "-".join(part for part in (re.sub(r"[^\w.-]+", "_", part) for part in parts) if part)
    return run / EVALUATIONS / f"{stem}.json"


def write_evaluation(path: Path, content: Mapping[str, Any]) -> None:
    """Write a result, atomically.

    Raises:
        OSError: the disk is full, or the directory is not writable.
    """
    storage.make_directory(path.parent)
    storage.write_file(path, storage.json_writer(content))


def read_evaluations(run: Path) -> list[dict[str, Any]]:
    """Return the results about a run's adapter and its best adapter as they are now, the oldest first.

    Results about an adapter that has changed since, and damaged files, are left out.
    """
    return _results(run, {_digest(run), _digest(run / BEST)})


def evaluations_of(adapter: Path) -> list[dict[str, Any]]:
    """Return the results about an adapter as it is now, the oldest first."""
    return _results(run_of(adapter)[0], {_digest(adapter)})


def _results(run: Path, digests: set[str | None]) -> list[dict[str, Any]]:
    """Return the results in a run's directory about adapters of some digests."""
    found = []
    for path in sorted((run / EVALUATIONS).glob("*.json")):
        try:
            content = storage.read_json(path)
        except InputError:
            continue
        if content.get("format") != FORMAT or not all(key in content for key in KEYS):
            continue
        adapters = content["adapters"]
        if isinstance(adapters, list) and adapters and adapters[0].get("digest") in digests - {None}:
            found.append(content)
    return sorted(found, key=lambda content: str(content.get("created")))


def _digest(adapter: Path) -> str | None:
    """Return the digest of an adapter; None if there is none."""
    try:
        return adapter_digest(adapter / ADAPTER_FILE)
    except InputError:
        return None
