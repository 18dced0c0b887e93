"""The files of a run: the checkpoint it resumes from, its output directory, and the checkpoints it writes."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nalora_mlx.adapters.attach import adapt_result
from nalora_mlx.adapters.files import adapter_files, adapter_weights
from nalora_mlx.core import storage
from nalora_mlx.core.config import TrainingConfig
from nalora_mlx.core.locks import lock_directory
from nalora_mlx.core.trees import nbytes
from nalora_mlx.data.preferences import TokenizedRow
from nalora_mlx.runs import checkpoints
from nalora_mlx.runs.checkpoints import CHECKPOINTS, CheckpointWriter
from nalora_mlx.runs.directory import (
    archive_previous_run,
    check_space,
    holds_run,
    remove_partial_files,
    rewind,
)
from nalora_mlx.runs.fingerprint import run_identity
from nalora_mlx.runs.progress import Progress
from nalora_mlx.runs.resume import checkpoint_files, restore
from nalora_mlx.training.events import Events
from nalora_mlx.training.step import TrainingStep


class RunFiles:
    """Restores a run from a checkpoint, and writes its checkpoints and adapters.

    Args:
        step: the run's training step.
        config: settings.
        adapter_config: content of adapter_config.json.
        output: the run's directory; None writes nothing.
        resume: checkpoint to resume from; None starts from the beginning.
        events: where notices go.
    """

    def __init__(
        self,
        step: TrainingStep,
        config: TrainingConfig,
        adapter_config: dict[str, Any] | None,
        output: Path | None,
        resume: Path | None,
        events: Events,
    ):
        self.step, self.config, self.adapter_config = step, config, adapter_config
        self.output, self.resume, self.events = output, resume, events
        self.identity: dict[str, Any] = {}
        self.progress = Progress()
        self.reference: Path | None = None  # what a preference run computed before training
        self.writer: CheckpointWriter | None = None

    def identify(self, train_set: Sequence[TokenizedRow], valid_set: Sequence[TokenizedRow]) -> None:
        """Compute what identifies the run, see `runs.fingerprint`. Reads all weights."""
        step = self.step
        self.identity = run_identity(
            step.model,
            step.optimizer,
            self.adapter_config,
            self.config,
            train_set,
            valid_set,
            step.workers.size,
        )

    def restore(self, iterations: int, anyway: bool) -> list[str]:
        """Restore weights, optimizer, importance, random state and progress from the checkpoint; return notices.

        Raises:
            InputError: the checkpoint is from another run or does not fit.
        """
        if self.resume is None:
            return []
        state = self.step.state_tree()
        self.progress, notices = restore(
            self.resume, self.identity, self.config, self.step.model, state, iterations, anyway
        )
        self.step.load_state_tree(state)
        if self.progress.iteration == iterations:
            notices.append(
                f"nothing is left to train: the checkpoint is at iteration {iterations} of {iterations}; "
                "raise --iters or --epochs to go on"
            )
        if self.progress.iteration % self.config.grad_accumulation_steps:
            notices.append(
                "the checkpoint ended a shorter accumulation window, the last one of its run; from here on, "
                "results differ from those of one longer run"
            )
        return notices

    def check_output(self, iterations: int) -> list[str]:
        """Check that the output directory can take the run; return notices.

        Raises:
            InputError: it cannot be written, holds something else, or has no room for a checkpoint.
        """
        if self.output is None:
            return []
        storage.check_writable(self.output)
        holds_run(self.output)
        self.writer = CheckpointWriter(
            self.output,
            self.config.keep_last,
            lambda: adapter_files(self.step.model, self.adapter_config),
            lambda best: checkpoint_files(
                self.step.model,
                self.adapter_config,
                self.step.state_tree(),
                self.progress,
                self.identity,
                self.config,
                best,
                self.reference,
            ),
            self.events.send,
        )
        saves = math.ceil((iterations - self.progress.iteration) / self.config.save_every)
        adapter, state = nbytes(adapter_weights(self.step.model)), nbytes(self.step.state_tree())
        if self.config.prefers and adapt_result(self.step.model) is not None:
            state += adapter  # as it was before training
        shortage = check_space(self.output, adapter, state, saves, self.config.keep_last)
        return [shortage] if shortage else []

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the output directory's lock.

        Raises:
            InputError: another run writes there.
        """
        if self.output is None:
            yield
            return
        with lock_directory(self.output):
            yield

    def prepare_output(self) -> list[str]:
        """Make the output directory this run's own: move what it held aside; return notices."""
        if self.output is None:
            return []
        remove_partial_files(self.output)
        if self.resume is None:
            aside = archive_previous_run(self.output)
            return [] if aside is None else [f"moved the previous run in {self.output} to {aside}"]
        iteration = self.progress.iteration
        aside = rewind(self.output, self.resume, iteration)
        if self.writer is not None and iteration in checkpoints.steps(self.output / CHECKPOINTS):
            self.writer.saved = iteration
        return [] if aside is None else [f"moved everything after iteration {iteration} to {aside}"]

    def save(self, prune: bool = True) -> None:
        """Write a checkpoint and the adapter."""
        if self.writer is not None:
            self.writer.save(self.progress.iteration, prune)

    def save_best(self) -> bool:
        """Write the best adapter; return False if that fails."""
        return self.writer is None or self.writer.save_best()

    def finish(self) -> None:
        """Raise RunError if the end of the run is not on disk."""
        if self.writer is not None:
            self.writer.finish()

    def where_saved(self) -> str:
        """Return where the state before skipped updates is, as the end of a sentence."""
        if self.writer is None:
            return ""
        if self.writer.failure is None:
            return f"; the state before them is in {self.writer.output}"
        return f"; the state before them could not be saved ({self.writer.failure}), {self.writer.last_complete()}"

    def last_complete(self) -> str:
        """Return which checkpoint is the last complete one, as the end of a sentence."""
        return "" if self.writer is None else f"; {self.writer.last_complete()}"
