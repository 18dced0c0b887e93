"""What a run writes while it goes on: checkpoints, its adapter, and the best one."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from nalora_mlx.adapters.files import ADAPTER_FILE
from nalora_mlx.core import storage
from nalora_mlx.core.errors import RunError

CHECKPOINTS = "checkpoints"
BEST = "best"
BEST_FILE = "best.safetensors"  # of a checkpoint: the best adapter as it was then
Files = Mapping[str, storage.Writer]


class Saver:
    """Writes a run's adapter, its best one and its checkpoints; a full disk stops no run before its end.

    Args:
        output: the run's directory.
        keep_last: checkpoints to keep; None for all.
        adapter: makes the files of the adapter as it is now.
        whole: makes the files of a checkpoint, given the best adapter's file if there is one.
        tell: takes events, as `train`'s listeners get them.
    """

    def __init__(
        self,
        output: Path,
        keep_last: int | None,
        adapter: Callable[[], Files],
        whole: Callable[[Path | None], Files],
        tell: Callable[..., None],
    ):
        self.output, self.keep_last = output, keep_last
        self.adapter, self.whole, self.tell = adapter, whole, tell
        self.saved: int | None = None  # iteration of the last checkpoint that was written
        self.failure: str | None = None  # why the last attempt to write one came to nothing

    def best(self) -> bool:
        """Write the best adapter; False, and a notice, if that cannot be done."""
        directory = self.output / BEST
        try:
            if not directory.exists():
                storage.write_directory(directory, self.adapter())
            else:  # file by file, so that there is a best one at every moment; the config does not change
                for name, writer in self.adapter().items():
                    storage.write_file(directory / name, writer)
        except OSError as error:
            self.tell(
                "notice",
                text=f"the best adapter could not be saved ({error.strerror or error}); the run goes on",
            )
            return False
        return True

    def save(self, iteration: int, prune: bool = True) -> None:
        """Write a checkpoint and then the adapter; if that cannot be done, say so and leave what was there."""
        if self.saved == iteration and self.failure is None:
            return
        best = self.output / BEST / ADAPTER_FILE
        try:
            self.tell("saving")
            parent = self.output / CHECKPOINTS
            if self.saved != iteration:  # one that is whole is never written again
                target = step_directory(parent, iteration)
                storage.write_directory(target, self.whole(best if best.exists() else None))
                self.saved = iteration
            for name, writer in self.adapter().items():
                storage.write_file(self.output / name, writer)
            self.failure = None
            if self.keep_last is not None and prune:
                prune_checkpoints(parent, self.keep_last)
        except OSError as error:
            self.failure = error.strerror or str(error)
            what = f"{'the adapter of ' if self.saved == iteration else ''}iteration {iteration}"
            self.tell("notice", text=f"{what} could not be saved ({self.failure}); {self.kept()}")
            return
        self.tell("saved", path=str(self.output), step=iteration)

    def finish(self) -> None:
        """Raise RunError if what the run came to is not on the disk."""
        if self.failure is not None:
            raise RunError(
                f"the end of the run could not be saved in {self.output} ({self.failure}); {self.kept()}; "
                "make room, then go on with --resume"
            )

    def kept(self) -> str:
        """Which checkpoint is the last whole one, in words."""
        found = list(steps(self.output / CHECKPOINTS))
        return (
            f"the last whole checkpoint is of iteration {found[-1]}"
            if found
            else "there is no checkpoint yet"
        )


_STEP = re.compile(r"step-([0-9]{7,})")


def step_directory(parent: Path, step: int) -> Path:
    """Where the checkpoint of a step is, or would be."""
    return parent / f"step-{step:07d}"


def steps(parent: Path) -> dict[int, Path]:
    """The complete checkpoints in a directory by step, lowest first; a directory of that name is complete."""
    found = {}
    for path in parent.iterdir() if parent.is_dir() else ():
        if (match := _STEP.fullmatch(path.name)) and path.is_dir():
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def prune_checkpoints(parent: Path, keep: int) -> None:
    """Remove all but the last `keep` checkpoints, each at once."""
    for path in list(steps(parent).values())[:-keep]:
        storage.remove_directory(path)
