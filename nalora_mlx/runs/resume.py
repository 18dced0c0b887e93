"""What a checkpoint holds beside its adapter, and how a run is put back to it.

The order of the data and the place in it follow from the rows, the batch size, the seed and the iteration, all of
which are here: nothing else is needed to find the next batch.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from nalora_mlx.adapters.files import ADAPTER_CONFIG, ADAPTER_FILE, adapter_weights, load_weights
from nalora_mlx.core import storage
from nalora_mlx.core.config import TrainingConfig
from nalora_mlx.core.errors import InputError, listed
from nalora_mlx.core.parsing import coerce, reject_unknown
from nalora_mlx.runs import checkpoints
from nalora_mlx.runs.checkpoints import BEST_FILE, CHECKPOINTS
from nalora_mlx.runs.fingerprint import differences, fingerprint, versions
from nalora_mlx.runs.progress import Progress

STATE_FILE = "training_state.json"
STATE_ARRAYS = "training_state.safetensors"
FORMAT = 2  # of the state; another number is another way to write it


@dataclass
class State:
    """What training_state.json says: see `checkpoint_files`."""

    progress: Progress
    identity: dict[str, Any]
    versions: dict[str, Any]
    arrays: dict[str, Any]
    best: str | None


def adapter_files(model: nn.Module, description: Mapping[str, Any] | None) -> dict[str, storage.Writer]:
    """The two files of an adapter that mlx-lm loads."""
    return {
        ADAPTER_FILE: storage.arrays_writer(adapter_weights(model)),
        ADAPTER_CONFIG: storage.json_writer(description),
    }


def checkpoint_files(
    model: nn.Module,
    description: Mapping[str, Any] | None,
    state: Mapping[str, Any],
    progress: Progress,
    known: Mapping[str, Any],
    config: TrainingConfig,
    best: Path | None,
) -> dict[str, storage.Writer]:
    """The files of a checkpoint: an adapter that mlx-lm loads, and all that resume needs.

    Args:
        model: its trainable arrays.
        description: content of adapter_config.json.
        state: trees of arrays: the optimizer's and the importance's state.
        progress: counters, losses so far, and the place in the data and in the metrics, which is the iteration.
        known: see `identity`.
        config: for people to read.
        best: the best adapter so far, if there is one.
    """
    weights = adapter_weights(model)
    arrays = {**dict(_leaves(state)), "random": _random_key()}
    content = {
        "format": FORMAT,
        "progress": asdict(progress),
        "identity": known,
        "versions": versions(),
        "config": {f.name: getattr(config, f.name) for f in fields(TrainingConfig)},
        "arrays": {ADAPTER_FILE: fingerprint(weights), STATE_ARRAYS: fingerprint(arrays)},
        "best": None if best is None else _digest(best),
    }
    content["seal"] = _seal(content)
    files = {
        **adapter_files(model, description),
        STATE_ARRAYS: storage.arrays_writer(arrays),
        STATE_FILE: storage.json_writer(content),
    }
    if best is not None:
        files[BEST_FILE] = storage.copy_writer(best)
    return files


def _seal(content: Mapping[str, Any]) -> str:
    """A hash by which a state that was changed is known; it is no proof of who wrote it."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _digest(path: Path) -> str:
    """A hash of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find(resume: str, output: Path) -> Path:
    """The checkpoint that --resume names: "latest" of the output directory, or a path.

    Raises:
        InputError: there is none.
    """
    directory = output if resume == "latest" else Path(resume).expanduser()
    if (directory / STATE_FILE).exists():
        return directory
    found = checkpoints.steps(directory / CHECKPOINTS)
    if not found:
        raise InputError(
            f"--resume: no checkpoint in {directory}; give ADAPTERS/{CHECKPOINTS}/step-NNNNNNN, "
            "or start without --resume"
        )
    return list(found.values())[-1]


def read_state(directory: Path) -> State:
    """Read training_state.json.

    Raises:
        InputError: it is missing, unreadable, or of another format.
    """
    path = directory / STATE_FILE
    content = storage.read_json(path)
    if content.get("format") != FORMAT:
        raise InputError(
            f"{path}: format {content.get('format')!r}, but this version reads {FORMAT}; "
            "resume with the version that wrote it"
        )
    if content.pop("seal", None) != _seal(content):
        raise InputError(_changed(path))
    parts = {}
    for name in ("progress", "identity", "versions", "arrays"):
        if not isinstance(content.get(name), dict):
            raise InputError(f"{path}: {name!r} is missing or no object")
        parts[name] = content[name]
    given = parts.pop("progress")
    reject_unknown(given, Progress.__dataclass_fields__, f"{path}: progress")
    return State(Progress(**coerce(given, Progress, f"{path}: progress")), **parts, best=content.get("best"))


def restore(
    directory: Path,
    now: Mapping[str, Any],
    model: nn.Module,
    state: Mapping[str, Any],
    iterations: int,
    anyway: bool = False,
) -> tuple[Progress, list[str]]:
    """Put a run back to a checkpoint: the model's trainable arrays, `state` in place, and mlx's random numbers.

    Args:
        directory: the checkpoint.
        now: the identity of this run.
        model: adapted as the run's was.
        state: trees of the same names and shapes as those that were saved.
        iterations: how many this run will have.
        anyway: go on although something differs.

    Returns:
        The progress, and what a person should know: what was ignored, and whether libraries have changed.

    Raises:
        InputError: it is of another run, with all that differs, or a file is missing, was changed, or does not fit.
    """
    known = read_state(directory)
    wrong = differences(known.identity, now)
    if wrong and not anyway:
        raise InputError(
            f"--resume {directory}: not the same run: {listed(wrong)}; give what it had, or --resume-anyway"
        )
    if known.progress.iteration > iterations:
        raise InputError(
            f"--resume {directory}: it is at iteration {known.progress.iteration}, beyond the {iterations} asked for"
        )
    notices = [f"resuming although {phrase}" for phrase in wrong]
    if others := differences(known.versions, versions()):
        notices.append(f"the last digits may come out otherwise: {listed(others)}")
    _check_copies(directory, known)
    _restore_arrays(directory, known, model, state)
    return known.progress, notices


def _check_copies(directory: Path, known: State) -> None:
    """Raise InputError for a file that goes back to the run's directory and is not what the run wrote."""
    if storage.read_json(directory / ADAPTER_CONFIG) != known.identity.get("adapter"):
        raise InputError(_changed(directory / ADAPTER_CONFIG))
    best = directory / BEST_FILE
    if (_digest(best) if best.is_file() else None) != known.best:
        raise InputError(_changed(best))


def _changed(path: Path) -> str:
    return f"{path} is not what the run wrote; resume from an earlier checkpoint"


def _restore_arrays(directory: Path, known: State, model: nn.Module, state: Mapping[str, Any]) -> None:
    saved = storage.read_arrays(directory / STATE_ARRAYS)
    wanted = {**dict(_leaves(state)), "random": _random_key()}
    wrong = sorted(
        name
        for name in saved.keys() | wanted.keys()
        if name not in saved
        or name not in wanted
        or (saved[name].shape, saved[name].dtype) != (wanted[name].shape, wanted[name].dtype)
    )
    if wrong:
        raise InputError(f"{directory / STATE_ARRAYS} does not fit this run: {listed(wrong, ', ')}")
    load_weights(model, directory / ADAPTER_FILE)
    for name, arrays in ((ADAPTER_FILE, adapter_weights(model)), (STATE_ARRAYS, saved)):
        if fingerprint(arrays) != known.arrays.get(name):
            raise InputError(_changed(directory / name))
    high, low = np.array(saved.pop("random")).tolist()
    mx.random.seed(high << 32 | low)
    # The rate is a setting: with --resume-anyway that of now counts, else it is the same, or a schedule sets it.
    rates = {name: array for name, array in wanted.items() if name.endswith(".learning_rate")}
    _fill(state, saved | rates, "")


def _random_key() -> mx.array:
    """What mlx draws the next random numbers from, [2] uint32; `mx.random.seed` puts it back."""
    state: Any = mx.random.state
    return state[0]


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, mx.array]]:
    """The arrays of a tree of dicts and lists by dotted path."""
    items: Any = tree.items() if isinstance(tree, Mapping) else enumerate(tree)
    for key, value in items:
        name = f"{path}.{key}" if path else str(key)
        if isinstance(value, mx.array):
            yield name, value
        else:
            yield from _leaves(value, name)


def _fill(tree: Any, arrays: Mapping[str, mx.array], path: str) -> None:
    """Put arrays where `_leaves` found them."""
    for key in list(tree) if isinstance(tree, Mapping) else range(len(tree)):
        name = f"{path}.{key}" if path else str(key)
        if isinstance(tree[key], mx.array):
            tree[key] = arrays[name]
        else:
            _fill(tree[key], arrays, name)
