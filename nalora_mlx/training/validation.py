"""Validation during a run: the loss on fixed rows, which decides which adapter is the best."""

import math
import time
from collections.abc import Sequence
from typing import Any

from nalora_mlx.core.config import TrainingConfig
from nalora_mlx.data.batches import Batch, evaluation_batches, evaluation_rows
from nalora_mlx.data.preferences import TokenizedRow
from nalora_mlx.training.evaluation import evaluate
from nalora_mlx.training.events import Events
from nalora_mlx.training.preferences.run import PreferenceRun
from nalora_mlx.training.preferences.warnings import new_warnings
from nalora_mlx.training.run_files import RunFiles
from nalora_mlx.training.step import TrainingStep


class Validation:
    """Computes the loss on the same rows each time, and saves the adapter if it is the best so far.

    Args:
        step: of the run.
        valid_set: all validation rows.
        config: settings of the run.
        files: of the run.
        events: where results go.
        preferences: of a preference run; None in supervised training.

    Attributes:
        rows: those that are validated on; set `batches` once they are ready.
    """

    def __init__(
        self,
        step: TrainingStep,
        valid_set: Sequence[TokenizedRow],
        config: TrainingConfig,
        files: RunFiles,
        events: Events,
        preferences: PreferenceRun | None = None,
    ):
        self.step, self.config, self.files, self.events = step, config, files, events
        self.preferences = preferences
        self.rows = evaluation_rows(valid_set, config.batch_size, config.val_batches, config.seed)
        self.batches: list[Batch] = []

    def prepare(self, rows: Sequence[TokenizedRow]) -> None:
        """Collate the rows, which are those of `rows` with what was computed before training."""
        config, share = self.config, self.step.workers.share
        self.batches = evaluation_batches(rows, config.batch_size, -1, config.seed, share)

    def run(self) -> None:
        """Compute the validation loss, record and report it, and save the adapter if it is the best so far."""
        tic, progress, events = time.perf_counter(), self.files.progress, self.events
        more = self.preferences.window_arrays(self.batches) if self.preferences is not None else None
        loss, tokens, measures = evaluate(
            self.step.model,
            self.batches,
            lambda done: events.send("validating", batch=done, batches=len(self.batches)),
            self.step.loss,
            self.step.workers,
            self.config.clear_cache_threshold,
            more,
        )
        if self.preferences is not None:
            measures |= self.preferences.divergence(self.batches[len(self.batches) // 2])
        before = progress.best
        if progress.record_validation(loss, measures.get("accuracy")) and not self.files.save_best():
            progress.best = before  # that of the adapter on disk
        if not math.isfinite(loss):
            events.send("notice", text=f"iteration {progress.iteration}: the validation loss is {loss}")
        if measures:
            for text in new_warnings(progress, measures, self.config, len(self.rows)):
                events.send("notice", text=f"iteration {progress.iteration}: {text}")
        event: dict[str, Any] = {
            "split": "valid",
            "step": progress.iteration,
            "loss": loss,
            "tokens": tokens,
            "seconds": time.perf_counter() - tic,
            "best_loss": progress.best_valid_loss,
            "first_loss": progress.first_valid_loss,
            **measures,
        }
        if measures:
            event |= {
                "best_accuracy": progress.best_valid_accuracy,
                "first_accuracy": progress.first_valid_accuracy,
            }
        events.send("metrics", **event)
