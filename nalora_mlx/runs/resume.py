"""What a checkpoint holds in addition to its adapter, and how a run is restored from it.

The order of the data and the position in it follow from the rows, the batch size, the seed and the iteration. All of
these are in the checkpoint, so nothing else is needed to find the next batch.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from nalora_mlx.adapters.files import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    adapter_files,
    adapter_weights,
    load_weights,
)
from nalora_mlx.core import storage, trees
from nalora_mlx.core.config import RunConfig, TrainingConfig, load_run_config
from nalora_mlx.core.errors import InputError, listed
from nalora_mlx.core.parsing import coerce, reject_unknown
from nalora_mlx.core.versions import numeric_versions
from nalora_mlx.runs import checkpoints
from nalora_mlx.runs.checkpoints import BEST_FILE, CHECKPOINTS, REFERENCE_FILE
from nalora_mlx.runs.directory import holds_run
from nalora_mlx.runs.fingerprint import differences, fingerprint
from nalora_mlx.runs.progress import Progress
from nalora_mlx.runs.saved_settings import (
    EXPLAINED_BY,
    changed_settings,
    missing_paths,
    resumed_settings,
    settings_to_save,
)

STATE_FILE = "training_state.json"
STATE_ARRAYS = "training_state.safetensors"
FORMAT = 2  # version of the state's format
RANDOM = "random"  # the name of MLX's random key among the arrays
LATEST = "latest"  # --resume without a path


@dataclass
class State:
    """The content of training_state.json, see `checkpoint_files`."""

    progress: Progress
    identity: dict[str, Any]
    config: dict[str, Any]
    versions: dict[str, Any]
    arrays: dict[str, Any]
    best: str | None
    reference: str | None = None


def checkpoint_files(
    model: nn.Module,
    adapter_config: Mapping[str, Any] | None,
    state: Mapping[str, Any],
    progress: Progress,
    identity: Mapping[str, Any],
    config: TrainingConfig,
    best: Path | None,
    reference: Path | None = None,
) -> dict[str, storage.Writer]:
    """Return the files of a checkpoint: an adapter that mlx-lm loads, and all that resume needs.

    Args:
        model: its trainable arrays are saved.
        adapter_config: content of adapter_config.json.
        state: trees of arrays, the optimizer's and the importance's.
        progress: counters and losses so far. Its iteration is the position in the data and in the metrics.
        identity: see `runs.fingerprint`.
        config: settings, with which the run can be resumed.
        best: file of the best adapter so far, if there is one.
        reference: file of what a preference run computed before training.
    """
    weights, arrays = adapter_weights(model), {**trees.named_arrays(state), RANDOM: _random_key()}
    content = {
        "format": FORMAT,
        "progress": asdict(progress),
        "identity": identity,
        "versions": numeric_versions(),
        "config": settings_to_save(config),
        "arrays": {ADAPTER_FILE: fingerprint(weights), STATE_ARRAYS: fingerprint(arrays)},
        "best": _file_digest(best),
        "reference": _file_digest(reference),
    }
    content["seal"] = _seal(content)
    files = {
        **adapter_files(model, adapter_config),
        STATE_ARRAYS: storage.arrays_writer(arrays),
        STATE_FILE: storage.json_writer(content),
    }
    copies = {BEST_FILE: best, REFERENCE_FILE: reference}
    return files | {name: storage.copy_writer(path) for name, path in copies.items() if path is not None}


def _seal(content: Mapping[str, Any]) -> str:
    """Return a hash that reveals accidental changes of a state. It does not prove who wrote it."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _file_digest(path: Path | None) -> str | None:
    if path is None or not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_checkpoint(resume: str, output: Path) -> Path:
    """Return the checkpoint that --resume names: the latest one of the output directory, or the one at a path.

    Raises:
        InputError: there is none.
    """
    directory = output if resume == LATEST else Path(resume).expanduser()
    if (directory / STATE_FILE).exists():
        return directory
    found = checkpoints.steps(directory / CHECKPOINTS)
    if not found:
        raise InputError(
            f"--resume: no checkpoint in {directory}; give ADAPTERS/{CHECKPOINTS}/step-NNNNNNN, "
            "or start without --resume"
        )
    return list(found.values())[-1]


def find_start(config: RunConfig, output: Path) -> Path | None:
    """Return what training starts from: a checkpoint, or the adapter weights of a file or directory.

    Raises:
        InputError: it does not exist, or the output directory cannot take a run.
    """
    storage.check_writable(output)
    holds_run(output)
    if config.resume is not None:
        checkpoint = find_checkpoint(config.resume, output)
        read_state(checkpoint)
        return checkpoint
    if config.resume_adapter_file is None:
        return None
    path = Path(config.resume_adapter_file).expanduser()
    if path.is_dir():
        path = path / ADAPTER_FILE
    if not path.exists():
        raise InputError(f"--resume-adapter-file {config.resume_adapter_file}: no {ADAPTER_FILE} there")
    return path


def read_state(directory: Path) -> State:
    """Read training_state.json.

    Raises:
        InputError: it is missing, unreadable, or in another format.
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
    for name in ("progress", "identity", "config", "versions", "arrays"):
        if not isinstance(content.get(name), dict):
            raise InputError(f"{path}: {name!r} is missing or not an object")
        parts[name] = content[name]
    given = parts.pop("progress")
    reject_unknown(given, Progress.__dataclass_fields__, f"{path}: progress")
    progress = Progress(**coerce(given, Progress, f"{path}: progress"))
    return State(progress, **parts, best=content.get("best"), reference=content.get("reference"))


# What differs between two runs, if no setting explains it -> in words.
DIFFERENT = {
    "base_model.weights": "the base model has other weights",
    "base_model.settings": "the base model has another config",
    "training_data.tokens": "the training rows, or how they are tokenized, have changed",
    "validation_data.tokens": "the validation rows, or how they are tokenized, have changed",
    "training_data.rows": "the training set had {before} sequences, and has {now}",
    "validation_data.rows": "the validation set had {before} sequences, and has {now}",
    "workers": "it ran on {before} workers, and runs on {now}",
}


def with_saved_settings(
    config: RunConfig, path: Path | None, flags: Mapping[str, Any], where: str = "command line"
) -> RunConfig:
    """Return the settings of the run that is resumed, with those of a file and flags on top.

    Args:
        config: the settings of file and flags alone, which say what is resumed.
        path, flags, where: see `load_run_config`.

    Raises:
        InputError: there is no checkpoint, or it does not hold the run's settings, and no model is given.
    """
    checkpoint = find_checkpoint(str(config.resume), Path(config.adapter_path or ".").expanduser())
    saved = resumed_settings(read_state(checkpoint).config, _run_directory(checkpoint))
    if saved is None and "model" not in config.given:
        raise InputError(
            f"--resume: {checkpoint} does not hold the run's settings; give its flags again, at least --model and "
            "--data"
        )
    missing = missing_paths(read_state(checkpoint).config, _run_directory(checkpoint), config.given)
    if missing:
        raise InputError(f"--resume {checkpoint}: {listed(missing)}")
    return load_run_config(path, flags, saved, where)


def _run_directory(checkpoint: Path) -> Path:
    """Return the directory of the run that wrote a checkpoint; that of the checkpoint if it was copied elsewhere."""
    parent = checkpoint.absolute().parent
    return parent.parent if parent.name == CHECKPOINTS else checkpoint


def run_differences(
    checkpoint: Path, saved: State, identity: Mapping[str, Any], config: TrainingConfig
) -> list[str]:
    """Return in words how a run differs from the one that wrote a checkpoint; none if it computes the same.

    Settings that can explain a difference are named instead of it.
    """
    found = differences(saved.identity, identity)
    if not found:
        return []
    changed = changed_settings(saved.config, config, _run_directory(checkpoint))
    phrases: dict[str, None] = {}  # in order, each once
    # Other adapters leave other weights frozen.
    hidden = {"base_model.weights"} if any(path.startswith("adapter.") for path, _, _ in found) else set()
    hidden |= {path.removesuffix("rows") + "tokens" for path, _, _ in found if path.endswith("_data.rows")}
    for path, before, now in found:
        if path in hidden:
            continue
        settings = EXPLAINED_BY.get(path) or EXPLAINED_BY.get(path.partition(".")[0], ())
        causes = [name for name in settings if name in changed]
        if causes:
            phrases |= dict.fromkeys(changed[name] for name in causes)
        elif path in DIFFERENT:
            phrases[DIFFERENT[path].format(before=before, now=now)] = None
        else:
            phrases[_difference(path, before, now)] = None
    return list(phrases)


def _difference(path: str, before: Any, now: Any) -> str:
    before, now = (f"{value:.6g}" if isinstance(value, float) else str(value) for value in (before, now))
    what = path.removeprefix("training.").replace("_", " ").replace(".", ": ")
    return f"{what} was {before}, is {now}" if max(len(before), len(now)) <= 60 else f"{what} differs"


def restore(
    directory: Path,
    identity: Mapping[str, Any],
    config: TrainingConfig,
    model: nn.Module,
    state: Mapping[str, Any],
    iterations: int,
    anyway: bool = False,
) -> tuple[Progress, list[str]]:
    """Restore the model's trainable arrays, `state` and MLX's random state from a checkpoint, all in place.

    Everything is checked before anything is changed.

    Args:
        directory: the checkpoint.
        identity: of this run.
        config: settings of this run.
        model: adapted like the model of the checkpoint.
        state: trees with the names and shapes of those that were saved.
        iterations: iterations of this run.
        anyway: continue even though something differs.

    Returns:
        The progress, and notices: what was ignored, and which libraries have changed.

    Raises:
        InputError: the checkpoint is from another run (with all differences), or a file is missing, was changed, or
            does not fit.
    """
    saved = read_state(directory)
    wrong = run_differences(directory, saved, identity, config)
    if wrong and not anyway:
        raise InputError(
            f"--resume {directory}: not the same run: {listed(wrong)}; change that back, or give --resume-anyway"
        )
    if saved.progress.iteration > iterations:
        raise InputError(
            f"--resume {directory}: it is at iteration {saved.progress.iteration}, beyond --iters {iterations}"
        )
    notices = [f"resuming although {phrase}" for phrase in wrong]
    if others := differences(saved.versions, numeric_versions()):
        versions = [_difference(*other) for other in others]
        notices.append(f"results may differ in the last digits: {listed(versions)}")
    _check_copies(directory, saved)
    _restore_arrays(directory, saved, model, state)
    return saved.progress, notices


def _check_copies(directory: Path, saved: State) -> None:
    """Raise InputError for a changed file that would be copied back into the run's directory."""
    if storage.read_json(directory / ADAPTER_CONFIG) != saved.identity.get("adapter"):
        raise InputError(_changed(directory / ADAPTER_CONFIG))
    for name, digest in ((BEST_FILE, saved.best), (REFERENCE_FILE, saved.reference)):
        if _file_digest(directory / name) != digest:
            raise InputError(_changed(directory / name))


def _changed(path: Path) -> str:
    return f"{path} is not what the run wrote; resume from an earlier checkpoint"


def _restore_arrays(directory: Path, saved: State, model: nn.Module, state: Mapping[str, Any]) -> None:
    arrays = storage.read_arrays(directory / STATE_ARRAYS)
    wanted = {**trees.named_arrays(state), RANDOM: _random_key()}
    wrong = sorted(
        name
        for name in arrays.keys() | wanted.keys()
        if name not in arrays
        or name not in wanted
        or (arrays[name].shape, arrays[name].dtype) != (wanted[name].shape, wanted[name].dtype)
    )
    if wrong:
        raise InputError(f"{directory / STATE_ARRAYS} does not fit this run: {listed(wrong, ', ')}")
    load_weights(model, directory / ADAPTER_FILE)
    for name, content in ((ADAPTER_FILE, adapter_weights(model)), (STATE_ARRAYS, arrays)):
        if fingerprint(content) != saved.arrays.get(name):
            raise InputError(_changed(directory / name))
    high, low = np.array(arrays.pop(RANDOM)).tolist()
    mx.random.seed(high << 32 | low)
    # The learning rate is a setting. With --resume-anyway the new one counts; otherwise it is the same, or a schedule
    # sets it.
    rates = {name: array for name, array in wanted.items() if name.endswith(".learning_rate")}
    trees.fill(state, arrays | rates)


def _random_key() -> mx.array:
    """Return the key from which MLX draws next; [2] uint32. `mx.random.seed` restores it."""
    state: Any = mx.random.state
    return state[0]
