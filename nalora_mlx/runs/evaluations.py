"""RUN/evaluations/: results of `nalora evaluate` about a run's adapters, for the report and the model card."""

import hashlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nalora_mlx.adapters.files import ADAPTER_FILE
from nalora_mlx.adapters.merge_record import adapter_digest
from nalora_mlx.core import storage
from nalora_mlx.core.errors import InputError
from nalora_mlx.runs.checkpoints import BEST, CHECKPOINTS, steps
from nalora_mlx.runs.metrics import METRICS_FILE
from nalora_mlx.runs.record import RECORD_FILE

EVALUATIONS = "evaluations"
FORMAT = 1
LONGEST_NAME = 48  # characters of a test set's name in the name of a file
# What the report and the model card read of a result, of its adapter, and of each measure.
_KEYS = ("created", "model", "data", "split", "rows", "of", "passages", "adapters")
_ADAPTER_KEYS = ("name", "digest", "measures")
_MEASURE_KEYS = ("name", "title", "part", "unit", "base", "tuned")


def run_of(adapter: Path) -> tuple[Path, str]:
    """Return the directory of the run that an adapter belongs to, and the adapter's name in it.

    The name is "best" or that of a checkpoint; empty for the run's own adapter. A link to one of these belongs to the
    run that it leads to.
    """
    given = adapter.expanduser()
    for path in (given, given.resolve()):
        if path.name == BEST and _is_run(path.parent) and not _is_run(path):
            return path.parent, BEST
        if path.parent.name == CHECKPOINTS and path in steps(path.parent).values():
            return path.parent.parent, path.name
    return given, ""


def _is_run(directory: Path) -> bool:
    return any((directory / name).is_file() for name in (METRICS_FILE, RECORD_FILE))


def evaluation_file(adapter: Path, data: str | None, split: str) -> Path:
    """Return the file for the result of an adapter on a test set: a later result on the same set replaces it.

    Different names of test sets never lead to the same file.

    Args:
        adapter: directory.
        data: name of the test set; None without one.
        split: name.
    """
    run, name = run_of(adapter)
    parts = [_file_name(data), split, name] if data else ["general", name]
    return run / EVALUATIONS / f"{'-'.join(filter(None, parts))}.json"


def _file_name(name: str) -> str:
    """Return a name as part of a file's name: with a hash if characters had to be replaced, or there are too many."""
    plain = re.sub(r"[^\w.-]+", "_", name).lstrip(".-")[:LONGEST_NAME]
    if plain == name:
        return name
    return f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:8]}".lstrip("-")


def write_evaluation(path: Path, content: Mapping[str, Any]) -> None:
    """Write a result, atomically.

    Raises:
        OSError: the disk is full, or the directory is not writable.
    """
    storage.make_directory(path.parent)
    storage.write_file(path, storage.json_writer(content))


def read_evaluations(run: Path) -> list[dict[str, Any]]:
    """Return the results about a run's adapter and its best adapter as they are now, the oldest first.

    Left out are results about an adapter that has changed since, damaged files, and those of a newer nalora.
    """
    return _results(run, lambda: {_digest(run), _digest(run / BEST)})


def evaluations_of(adapter: Path) -> list[dict[str, Any]]:
    """Return the results about an adapter as it is now, the oldest first, and of each test set only the newest."""
    found = _results(run_of(adapter)[0], lambda: {_digest(adapter)})
    newest = {(content["data"], content["split"]): content for content in found}
    return [content for content in found if content is newest[content["data"], content["split"]]]


def _results(run: Path, find_digests: Callable[[], set[str | None]]) -> list[dict[str, Any]]:
    """Return the results in a run's directory about adapters of some digests, which takes time to find."""
    found = []
    for path in sorted((run / EVALUATIONS).glob("[!.]*.json")):  # names with a dot are of unfinished files
        try:
            content = storage.read_json(path)
        except InputError:
            continue
        if content.get("format") == FORMAT and _is_complete(content):
            found.append(content)
    digests = find_digests() - {None} if found else set()
    found = [content for content in found if content["adapters"][0]["digest"] in digests]
    return sorted(found, key=lambda content: str(content["created"]))


def _is_complete(content: Mapping[str, Any]) -> bool:
    """Return whether a result has all that is read of it. That of a base model alone, or of checkpoints, has not."""
    if not all(key in content for key in _KEYS):
        return False
    adapters = content["adapters"]
    if not (isinstance(adapters, list) and adapters and _has(adapters[0], _ADAPTER_KEYS)):
        return False
    measures = adapters[0]["measures"]
    return isinstance(measures, list) and all(_has(measure, _MEASURE_KEYS) for measure in measures)


def _has(content: Any, keys: tuple[str, ...]) -> bool:
    return isinstance(content, dict) and all(key in content for key in keys)


def _digest(adapter: Path) -> str | None:
    """Return the digest of an adapter; None if there is none."""
    try:
        return adapter_digest(adapter / ADAPTER_FILE)
    except InputError:
        return None
