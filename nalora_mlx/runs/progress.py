"""Counters and losses of a run, all plain numbers, which a checkpoint stores exactly."""

import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path

SPIKE_HISTORY = 50  # batches whose losses define the typical loss
SPIKE_REPEATS = 3  # spikes within SPIKE_WITHIN batches that cause a notice
SPIKE_WITHIN = 100


@dataclass
class TrainResult:
    """Result of a run, including the parts before it was resumed.

    Losses are means over supervised tokens. Validation losses are None without a validation set. `skipped` counts
    updates with a NaN or infinite loss or gradient. `stopped` says why the run ended early, or is None.
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

    def describe_validation(self, best: Path) -> list[str]:
        """Return the validation losses in sentences; none without a validation. `best` is where the best adapter is."""
        if self.best_valid_loss is None:
            return []
        before, after = (
            "NaN or infinite" if loss is None else f"{loss:.4f}"
            for loss in (self.first_valid_loss, self.valid_loss)
        )
        is_last = self.best_valid_loss == self.valid_loss
        found = f"best {self.best_valid_loss:.4f} at iteration {self.best_iteration}: {best}"
        lines = [
            f"validation loss {before} before training, {after} after ({'the best' if is_last else found})"
        ]
        if not improves(self.best_valid_loss, self.first_valid_loss):
            lines = [
                f"validation loss {before} before training, {after} after",
                f"note: training did not help: the best adapter, in {best}, has a validation loss of "
                f"{self.best_valid_loss:.4f}, so the model is better without it; lower the learning rate, or look at "
                "the rows",
            ]
        return lines


def improves(loss: float, before: float | None) -> bool:
    """Return whether a validation loss is lower than that before training. A NaN before training is higher than any."""
    return before is None or loss < before


@dataclass
class Progress:
    """Progress of a run. Losses are means over supervised tokens.

    Attributes:
        iteration: number of batches trained on.
        updates: number of optimizer updates applied.
        skipped: number of updates skipped because of a NaN or infinite loss or gradient.
        skipped_in_a_row: number of skipped updates since the last one that was applied.
        tokens: number of supervised tokens trained on.
        seconds: training time, including the parts before the run was resumed.
        train_loss: mean loss of the last report.
        stale_validations: number of validations since the best one.
        loss_sum, loss_tokens, loss_steps, loss_seconds: summed loss, supervised tokens, batches and time since the
            last report.
        recent: losses of the last SPIKE_HISTORY batches, oldest first.
        spikes: iterations of recent loss spikes.
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

    def record_batch(self, loss: float, tokens: int, seconds: float) -> None:
        """Count one batch: its summed loss, supervised tokens and time. A NaN or infinite loss is left out."""
        self.iteration += 1
        self.loss_steps += 1
        self.loss_seconds += seconds
        if math.isfinite(loss):
            self.loss_sum += loss
            self.loss_tokens += tokens
            self.tokens += tokens

    def record_loss(self, loss: float) -> bool:
        """Record the mean loss of the last batch. Return True at every third spike within 100 batches.

        A spike is a loss above 1.5 medians and above median + 10 MAD (median absolute deviation) of the recent losses.
        """
        history, self.recent = self.recent, [*self.recent, loss][-SPIKE_HISTORY:]
        if len(history) < SPIKE_HISTORY // 2:
            return False
        median = statistics.median(history)
        deviation = statistics.median(abs(value - median) for value in history)
        if loss <= max(1.5 * median, median + 10 * deviation):
            return False
        self.spikes = [at for at in self.spikes if self.iteration - at < SPIKE_WITHIN] + [self.iteration]
        if len(self.spikes) < SPIKE_REPEATS:
            return False
        self.spikes = []
        return True

    def start_interval(self) -> None:
        """Set `train_loss` to the mean loss since the last report, and reset the sums."""
        self.train_loss = self.loss_sum / self.loss_tokens if self.loss_tokens else None
        self.loss_sum, self.loss_tokens, self.loss_steps, self.loss_seconds = 0.0, 0, 0, 0.0

    def record_validation(self, loss: float) -> bool:
        """Record a validation loss. Return whether it is the best so far; the one before training does not count."""
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
        """Return the result of the run; `stopped` is the reason why it ended early, if it did."""
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
