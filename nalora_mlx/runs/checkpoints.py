"""The checkpoints of a run, its latest adapter and its best one: what a run writes while it trains."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from nalora_mlx.adapters.files import ADAPTER_FILE
from nalora_mlx.core import storage
from nalora_mlx.core.errors import RunError

CHECKPOINTS = "checkpoints"
BEST = "best"
BEST_FILE = "best.safetensors"  # in a checkpoint: the best adapter at that time
REFERENCE_FILE = "reference.safetensors"  # in a checkpoint: what a preference run computed before training
REFERENCES = "reference"  # in the run's directory: the same; later runs on the same rows use its files, too
Files = Mapping[str, storage.Writer]
_STEP = re.compile(r"step-([0-9]{7,})")


def step_directory(parent: Path, step: int) -> Path:
    """Return the path of a step's checkpoint, whether it exists or not."""
    return parent / f"step-{step:07d}"


def steps(parent: Path) -> dict[int, Path]:
    """Return the complete checkpoints in a directory by step, in order. A directory of that name is complete."""
    found = {}
    for path in parent.iterdir() if parent.is_dir() else ():
        if (match := _STEP.fullmatch(path.name)) and path.is_dir():
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def final_adapters(directory: Path) -> list[Path]:
    """Return the latest and the best adapter of a run, given its directory or that of any of its adapters."""
    directory = directory.resolve()
    if directory.name == BEST:
        directory = directory.parent
    elif directory.parent.name == CHECKPOINTS:
        directory = directory.parent.parent
    return [path for path in (directory, directory / BEST) if (path / ADAPTER_FILE).exists()]


def prune_checkpoints(parent: Path, keep: int) -> None:
    """Remove all but the last `keep` checkpoints, each in one step."""
    for path in list(steps(parent).values())[:-keep]:
        storage.remove_directory(path)


class CheckpointWriter:
    """Writes a run's adapter, its best adapter and its checkpoints. A full disk does not stop a run before its end.

    Args:
        output: the run's directory.
        keep_last: checkpoints to keep; None for all.
        adapter_files: returns the files of the current adapter.
        checkpoint_files: returns the files of a checkpoint, given the file of the best adapter if there is one.
        send: receives events, see `nalora_mlx.training.events`.
    """

    def __init__(
        self,
        output: Path,
        keep_last: int | None,
        adapter_files: Callable[[], Files],
        checkpoint_files: Callable[[Path | None], Files],
        send: Callable[..., None],
    ):
        self.output, self.keep_last = output, keep_last
        self.adapter_files, self.checkpoint_files, self.send = adapter_files, checkpoint_files, send
        self.saved: int | None = None  # iteration of the last checkpoint on disk
        self.failure: str | None = None  # why the last attempt to write one failed

    def save_best(self) -> bool:
        """Write the best adapter. Return False, after a notice, if that fails."""
        directory = self.output / BEST
        try:
            if not directory.exists():
                storage.write_directory(directory, self.adapter_files())
            else:  # file by file, so that a best adapter exists at every moment; its config does not change
                for name, writer in self.adapter_files().items():
                    storage.write_file(directory / name, writer)
        except OSError as error:
            reason = error.strerror or error
            self.send("notice", text=f"the best adapter could not be saved ({reason}); the run goes on")
            return False
        return True

    def save(self, iteration: int, prune: bool = True) -> None:
        """Write a checkpoint, then the adapter. If that fails, send a notice and keep what was there."""
        if self.saved == iteration and self.failure is None:
            return
        best = self.output / BEST / ADAPTER_FILE
        try:
            self.send("saving")
            parent = self.output / CHECKPOINTS
            if self.saved != iteration:  # a complete checkpoint is never written again
                target = step_directory(parent, iteration)
                storage.write_directory(target, self.checkpoint_files(best if best.exists() else None))
                self.saved = iteration
            for name, writer in self.adapter_files().items():
                storage.write_file(self.output / name, writer)
            self.failure = None
            if self.keep_last is not None and prune:
                prune_checkpoints(parent, self.keep_last)
        except OSError as error:
            self.failure = error.strerror or str(error)
            what = f"{'the adapter of ' if self.saved == iteration else ''}iteration {iteration}"
            self.send("notice", text=f"{what} could not be saved ({self.failure}); {self.last_complete()}")
            return
        self.send("saved", path=str(self.output), step=iteration)

    def finish(self) -> None:
        """Raise RunError if the end of the run is not on disk."""
        if self.failure is not None:
            raise RunError(
                f"the end of the run could not be saved in {self.output} ({self.failure}); {self.last_complete()}; "
                "free some disk space, then continue with --resume"
            )

    def last_complete(self) -> str:
        """Return which checkpoint is the last complete one, in words."""
        found = list(steps(self.output / CHECKPOINTS))
        return (
            f"the last complete checkpoint is iteration {found[-1]}"
            if found
            else "there is no checkpoint yet"
        )
