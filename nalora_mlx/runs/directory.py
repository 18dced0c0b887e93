"""A run's directory before the run: what it holds, how it goes back to a checkpoint, and whether there is room."""

import filecmp
import math
from pathlib import Path

from nalora_mlx.adapters.files import ADAPTER_CONFIG, ADAPTER_FILE
from nalora_mlx.core import storage
from nalora_mlx.core.errors import InputError
from nalora_mlx.runs import checkpoints
from nalora_mlx.runs.checkpoints import BEST, BEST_FILE, CHECKPOINTS
from nalora_mlx.runs.loggers import TENSORBOARD
from nalora_mlx.runs.metrics import METRICS_FILE, keep_until
from nalora_mlx.runs.record import RECORD_FILE

REPORT = "report"
RUN_FILES = (
    ADAPTER_FILE,
    ADAPTER_CONFIG,
    METRICS_FILE,
    BEST,
    CHECKPOINTS,
    RECORD_FILE,
    REPORT,
    TENSORBOARD,
)


def holds_run(output: Path) -> bool:
    """Whether a directory holds what a run left.

    Raises:
        InputError: it holds something of that name which no run left.
    """
    # A run that was stopped early may have left its record only, or a best adapter and metrics.
    signs = (ADAPTER_FILE, ADAPTER_CONFIG, METRICS_FILE, RECORD_FILE, f"{BEST}/{ADAPTER_FILE}")
    if any((output / name).exists() for name in signs) or checkpoints.steps(output / CHECKPOINTS):
        return True
    for name in (BEST, CHECKPOINTS):
        if (output / name).exists() and (not (output / name).is_dir() or any((output / name).iterdir())):
            raise InputError(f"{output} holds a {name!r} that is not of a run; choose another --adapter-path")
    return False


def remove_partial_files(output: Path) -> None:
    """Remove what a run that was killed while writing left half done; nobody else may be writing there."""
    for place in (output, output / CHECKPOINTS, output / BEST):
        storage.clean(place)


def archive_previous_run(output: Path) -> Path | None:
    """Move the run that a directory holds to previous/N; where it is now, None if there was none."""
    return storage.move_aside(output, RUN_FILES) if holds_run(output) else None


def rewind(output: Path, source: Path, iteration: int) -> Path | None:
    """Bring a run's directory back to a checkpoint; what came after it is moved to previous/N, not lost.

    Args:
        output: the run's directory.
        source: the checkpoint, in the same directory or elsewhere.
        iteration: where it stands.

    Returns:
        Where the later files are now, if there were any.
    """
    own = source.resolve().parent == (output / CHECKPOINTS).resolve()
    gone: list[str | Path] = []
    if own:
        later = [step for step in checkpoints.steps(output / CHECKPOINTS) if step > iteration]
        gone += [checkpoints.step_directory(Path(CHECKPOINTS), step) for step in later]
        if not _same(output / BEST / ADAPTER_FILE, source / BEST_FILE):
            gone.append(BEST)
    else:
        gone += RUN_FILES
    run = source.parent.parent
    records = run / METRICS_FILE
    aside = storage.move_aside(output, gone)
    if aside is not None and records.exists() and own:
        storage.write_file(aside / METRICS_FILE, storage.copy_writer(records))
    if not (output / BEST).exists() and (source / BEST_FILE).exists():
        files = {ADAPTER_FILE: source / BEST_FILE, ADAPTER_CONFIG: source / ADAPTER_CONFIG}
        storage.write_directory(
            output / BEST, {name: storage.copy_writer(path) for name, path in files.items()}
        )
    for name in (ADAPTER_CONFIG, ADAPTER_FILE):
        storage.write_file(output / name, storage.copy_writer(source / name))
    keep_until(records, output / METRICS_FILE, iteration)
    return aside


def _same(one: Path, other: Path) -> bool:
    if not one.exists() or not other.exists():
        return not one.exists() and not other.exists()
    return filecmp.cmp(one, other, shallow=False)


def check_space(output: Path, adapter: int, state: int, saves: int, keep_last: int | None) -> str | None:
    """Compare the room on the disk with what a run will write; a notice if not all of it has room.

    Args:
        output: the run's directory.
        adapter: bytes of the adapter.
        state: bytes of what a checkpoint holds beside it.
        saves: how many checkpoints the run writes.
        keep_last: how many stay; None for all.

    Raises:
        InputError: there is no room for a single checkpoint.
    """
    each = 2 * adapter + state  # the adapter and the best one
    others = 3 * adapter  # adapters.safetensors, best/, and a new one of them beside the old
    free = storage.free_space(output)
    if free < each + others:
        raise InputError(
            f"{output}: {_megabytes(free)} free, but a checkpoint and the adapters take {_megabytes(each + others)}; "
            "make room, or choose another --adapter-path"
        )
    kept = (
        saves if keep_last is None else min(saves, keep_last + 1)
    )  # an old one goes when the new one is there
    if free >= kept * each + others:
        return None
    most = math.floor((free - others) / each) - 1
    advice = f"--keep-last {most} fits" if most >= 1 else "make room"
    return f"{kept} checkpoints take {_megabytes(kept * each + others)}, and {_megabytes(free)} are free; {advice}"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
