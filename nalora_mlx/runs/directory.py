"""Preparation of a run's directory: archive an earlier run, rewind to a checkpoint, check the disk space."""

import filecmp
import math
from pathlib import Path

from nalora_mlx.adapters.files import ADAPTER_CONFIG, ADAPTER_FILE
from nalora_mlx.core import storage
from nalora_mlx.core.errors import InputError
from nalora_mlx.runs import checkpoints
from nalora_mlx.runs.checkpoints import BEST, BEST_FILE, CHECKPOINTS, REFERENCES
from nalora_mlx.runs.evaluations import EVALUATIONS
from nalora_mlx.runs.loggers import TENSORBOARD
from nalora_mlx.runs.metrics import METRICS_FILE, keep_until
from nalora_mlx.runs.record import RECORD_FILE
from nalora_mlx.runs.samples import SAMPLES_FILE

REPORT = "report"
RUN_FILES = (
    ADAPTER_FILE,
    ADAPTER_CONFIG,
    METRICS_FILE,
    BEST,
    CHECKPOINTS,
    RECORD_FILE,
    SAMPLES_FILE,
    EVALUATIONS,
    REPORT,
    TENSORBOARD,
)


def holds_run(output: Path) -> bool:
    """Return whether a directory holds files of a run.

    Raises:
        InputError: it holds a directory or file named like a run's, but with other content.
    """
    # A run that was stopped early may have written only run.json, or only metrics and a best adapter.
    names = (ADAPTER_FILE, ADAPTER_CONFIG, METRICS_FILE, RECORD_FILE, f"{BEST}/{ADAPTER_FILE}")
    if any((output / name).exists() for name in names) or checkpoints.steps(output / CHECKPOINTS):
        return True
    for name in (BEST, CHECKPOINTS):
        if (output / name).exists() and (not (output / name).is_dir() or any((output / name).iterdir())):
            raise InputError(f"{output} has a {name!r} that no run wrote; choose another --adapter-path")
    return False


def remove_partial_files(output: Path) -> None:
    """Remove files that a killed run left incomplete; no other process may be writing there."""
    for directory in (output, output / CHECKPOINTS, output / BEST, output / REFERENCES):
        storage.remove_partial(directory)


def archive_previous_run(output: Path) -> Path | None:
    """Move a run in a directory to its subdirectory previous/N. Return the new directory, or None without a run."""
    return storage.move_aside(output, RUN_FILES) if holds_run(output) else None


def rewind(output: Path, source: Path, iteration: int) -> Path | None:
    """Restore a run's directory to the state at a checkpoint. Later files are moved to previous/N, not deleted.

    1. Move aside what the checkpoint does not have: later checkpoints, a later best adapter, and the sample answers
       of a later adapter. If the checkpoint is from another directory, move aside the whole run.
    2. Copy the metrics of this run along with what was moved, so that a complete copy remains.
    3. Restore the best adapter, the adapter and its config from the checkpoint.
    4. Truncate the metrics after the checkpoint's iteration.
    5. Remove sample answers that are still there. They are of the adapter that the run trains further, and the end of
       training writes new ones.

    Args:
        output: the run's directory.
        source: the checkpoint, in this directory or elsewhere.
        iteration: the checkpoint's iteration.

    Returns:
        The directory with the later files, or None if there were none.
    """
    same_run = source.resolve().parent == (output / CHECKPOINTS).resolve()
    outdated: list[str | Path] = []
    if same_run:
        later = [step for step in checkpoints.steps(output / CHECKPOINTS) if step > iteration]
        outdated += [checkpoints.step_directory(Path(CHECKPOINTS), step) for step in later]
        if not _same_file(output / BEST / ADAPTER_FILE, source / BEST_FILE):
            outdated.append(BEST)
        if outdated:
            outdated.append(SAMPLES_FILE)
    else:
        outdated += RUN_FILES
    metrics = source.parent.parent / METRICS_FILE
    archive = storage.move_aside(output, outdated)
    if archive is not None and metrics.exists() and same_run:
        storage.write_file(archive / METRICS_FILE, storage.copy_writer(metrics))
    if not (output / BEST).exists() and (source / BEST_FILE).exists():
        files = {ADAPTER_FILE: source / BEST_FILE, ADAPTER_CONFIG: source / ADAPTER_CONFIG}
        storage.write_directory(
            output / BEST, {name: storage.copy_writer(path) for name, path in files.items()}
        )
    for name in (ADAPTER_CONFIG, ADAPTER_FILE):
        storage.write_file(output / name, storage.copy_writer(source / name))
    keep_until(metrics, output / METRICS_FILE, iteration)
    (output / SAMPLES_FILE).unlink(missing_ok=True)
    return archive


def _same_file(one: Path, other: Path) -> bool:
    """Return whether two files have the same content, or both are missing."""
    if not one.exists() or not other.exists():
        return not one.exists() and not other.exists()
    return filecmp.cmp(one, other, shallow=False)


def check_space(output: Path, adapter: int, state: int, saves: int, keep_last: int | None) -> str | None:
    """Compare the free disk space with what a run will write.

    Args:
        output: the run's directory.
        adapter: size of the adapter in bytes.
        state: size of a checkpoint without its adapters, in bytes.
        saves: number of checkpoints that the run writes.
        keep_last: number of checkpoints that are kept; None for all.

    Returns:
        A notice if not all checkpoints fit, or None.

    Raises:
        InputError: not even one checkpoint fits.
    """
    each = 2 * adapter + state  # a checkpoint has the adapter and the best one
    others = 3 * adapter  # adapters.safetensors, best/, and the temporary file that replaces one of them
    free = storage.free_space(output)
    if free < each + others:
        raise InputError(
            f"{output}: {_megabytes(free)} free, but a checkpoint and the adapters take {_megabytes(each + others)}; "
            "free some disk space, or choose another --adapter-path"
        )
    # A new checkpoint is complete before the oldest is removed.
    kept = saves if keep_last is None else min(saves, keep_last + 1)
    if free >= kept * each + others:
        return None
    most = math.floor((free - others) / each) - 1
    advice = f"--keep-last {most} fits" if most >= 1 else "free some disk space"
    return f"{kept} checkpoints take {_megabytes(kept * each + others)}, and {_megabytes(free)} are free; {advice}"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
