"""How far a run has come, in plain numbers that go into a checkpoint and come back from it to the last digit."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field

SPIKE_HISTORY = 50  # batches that say what loss is usual
SPIKE_REPEATS = 3  # spikes within so many batches that are worth a word
SPIKE_WITHIN = 100


@dataclass
class TrainResult:
    """What came of a run, over all its parts if it was resumed.

    Losses are means over supervised tokens, None without a validation set; `skipped` counts updates that were not
    applied; `stopped` says why the run ended early, None if it did not.
    """

    iterations: int
    updates: int
    tokens: int
    seconds: float
    train_loss: float
    first_valid_loss: float | None = None
    valid_loss: float | None = None
    best_valid_loss: float | None = None
    best_iteration: int | None = None
    skipped: int = 0
    stopped: str | None = None


@dataclass
class Progress:
    """What a run has done so far; losses are means over supervised tokens.

    Attributes:
        iteration: batches done.
        updates: optimizer updates applied.
        skipped: updates that were not applied, because their loss or gradient was not finite.
        skipped_in_a_row: how many of them were the last ones.
        tokens: supervised tokens trained on.
        seconds: time that the run took, over all its parts.
        train_loss: as last reported.
        stale_validations: validations since the best one.
        loss_sum, loss_tokens, loss_steps, loss_seconds: since the last report.
        recent: losses of the last batches, oldest first.
        spikes: the iterations at which the loss jumped lately.
    """

    iteration: int = 0
    updates: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    tokens: int = 0
    seconds: float = 0.0
    train_loss: float | None = None
    first_valid_loss: float | None = None
    valid_loss: float | None = None
    best_valid_loss: float | None = None
    best_iteration: int | None = None
    stale_validations: int = 0
    loss_sum: float = 0.0
    loss_tokens: int = 0
    loss_steps: int = 0
    loss_seconds: float = 0.0
    recent: list[float] = field(default_factory=list)
    spikes: list[int] = field(default_factory=list)

    def count(self, loss: float, tokens: int, seconds: float) -> None:
        """Count one batch: its summed loss, supervised tokens and time. A loss that is not finite is left out."""
        self.iteration += 1
        self.loss_steps += 1
        self.loss_seconds += seconds
        if math.isfinite(loss):
            self.loss_sum += loss
            self.loss_tokens += tokens
            self.tokens += tokens

    def record_loss(self, loss: float) -> bool:
        """Take the mean loss of the batch just counted; True at every third jump within a hundred batches.

        A jump is a loss above three halves of the usual (the median) and far outside its usual spread.
        """
        usual, self.recent = self.recent, [*self.recent, loss][-SPIKE_HISTORY:]
        if len(usual) < SPIKE_HISTORY // 2:
            return False
        middle = statistics.median(usual)
        spread = statistics.median(abs(value - middle) for value in usual)
        if loss <= max(1.5 * middle, middle + 10 * spread):
            return False
        self.spikes = [at for at in self.spikes if self.iteration - at < SPIKE_WITHIN] + [self.iteration]
        if len(self.spikes) < SPIKE_REPEATS:
            return False
        self.spikes = []
        return True

    def start_interval(self) -> None:
        """Take the mean loss since the last report for the report, and begin anew."""
        self.train_loss = self.loss_sum / self.loss_tokens if self.loss_tokens else None
        self.loss_sum, self.loss_tokens, self.loss_steps, self.loss_seconds = 0.0, 0, 0, 0.0

    def record_validation(self, loss: float) -> bool:
        """Take a validation loss; True where it is the best after training has begun."""
        self.valid_loss = loss if math.isfinite(loss) else None
        if self.iteration == 0:
            self.first_valid_loss = self.valid_loss
            return False
        if math.isfinite(loss) and (self.best_valid_loss is None or loss < self.best_valid_loss):
            self.best_valid_loss, self.best_iteration, self.stale_validations = loss, self.iteration, 0
            return True
        self.stale_validations += 1
        return False

    def result(self, stopped: str | None) -> TrainResult:
        """What came of the run, which ended for this reason, or at its end."""
        return TrainResult(
            iterations=self.iteration,
            updates=self.updates,
            tokens=self.tokens,
            seconds=self.seconds,
            train_loss=math.nan if self.train_loss is None else self.train_loss,
            first_valid_loss=self.first_valid_loss,
            valid_loss=self.valid_loss,
            best_valid_loss=self.best_valid_loss,
            best_iteration=self.best_iteration,
            skipped=self.skipped,
            stopped=stopped,
        )
