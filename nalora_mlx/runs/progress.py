"""Counters and losses of a run, all plain numbers, which a checkpoint stores exactly."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from nalora_mlx.core.errors import counted
from nalora_mlx.runs.status import duration, improves

SPIKE_HISTORY = 50  # batches whose losses define the typical loss
SPIKE_REPEATS = 3  # spikes within SPIKE_WITHIN batches that cause a notice
SPIKE_WITHIN = 100


@dataclass
class TrainResult:
    """Result of a run, including the parts before it was resumed.

    Losses are means over supervised tokens, in preference training over rows. Validation losses are None without a
    validation set, and accuracies (the share of pairs whose chosen answer has the higher reward) in supervised
    training. `skipped` counts updates with a NaN or infinite loss or gradient. `stopped` says why the run ended early,
    or is None.
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
    first_valid_accuracy: float | None = None
    valid_accuracy: float | None = None
    best_valid_accuracy: float | None = None

    @property
    def summary(self) -> str:
        """The validation accuracy and loss before and after training as a phrase, or the training loss without them."""
        if self.first_valid_loss is None or self.valid_loss is None:
            return f"training loss {self.train_loss:.4g}"
        losses = f"loss {self.first_valid_loss:.4g} -> {self.valid_loss:.4g}"
        if self.first_valid_accuracy is None or self.valid_accuracy is None:
            return f"validation {losses}"
        accuracies = f"{self.first_valid_accuracy:.2f} -> {self.valid_accuracy:.2f}"
        return f"validation accuracy {accuracies}, {losses}"

    def lines(self, output: Path, preparation: float) -> list[str]:
        """Return how the training ended, in sentences.

        Args:
            output: the run's directory.
            preparation: seconds before the training.
        """
        found = [f"stopped at iteration {self.iterations}: {self.stopped}"] if self.stopped else []
        if self.skipped:
            none = "" if self.updates else "; none was applied, so the weights are as they were"
            found.append(f"note: {counted(self.skipped, 'update')} skipped, see above{none}")
        took = f"{duration(self.seconds)}, after {preparation:.0f} s of preparation"
        return [*found, *self.describe_validation(output / "best"), f"done in {took}: adapter in {output}"]

    def describe_validation(self, best: Path) -> list[str]:
        """Return the validation losses in sentences; none without a validation. `best` is where the best adapter is."""
        if self.best_valid_loss is None:
            return []
        if self.best_valid_accuracy is not None:
            return self._describe_accuracy(best)
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

    def _describe_accuracy(self, best: Path) -> list[str]:
        """Return the validation accuracies and losses of preference training in sentences."""
        accuracy = (
            f"validation accuracy {_accuracy(self.first_valid_accuracy)} before training, "
            f"{_accuracy(self.valid_accuracy)} after"
        )
        before, after = (
            "NaN or infinite" if loss is None else f"{loss:.4f}"
            for loss in (self.first_valid_loss, self.valid_loss)
        )
        loss = f"validation loss {before} before training, {after} after"
        assert self.best_valid_loss is not None
        found = f"{_accuracy(self.best_valid_accuracy)} and a loss of {self.best_valid_loss:.4f}"
        if not improves(
            self.best_valid_loss, self.first_valid_loss, self.best_valid_accuracy, self.first_valid_accuracy
        ):
            return [
                accuracy,
                loss,
                f"note: training did not help: the best adapter, in {best}, has a validation accuracy of {found}, so "
                "the model is better without it; lower the learning rate, or look at the rows",
            ]
        last = self.valid_accuracy, self.valid_loss
        is_last = last == (self.best_valid_accuracy, self.best_valid_loss)
        where = "the best" if is_last else f"best {found} at iteration {self.best_iteration}: {best}"
        return [f"{accuracy} ({where})", loss]


def _accuracy(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2f}"


class Best(NamedTuple):
    """The best validation of a run: its loss, iteration and, in preference training, accuracy."""

    loss: float | None
    iteration: int | None
    accuracy: float | None


@dataclass
class Progress:
    """Progress of a run. Losses are means over supervised tokens, in preference training over rows.

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
        loss_count: tokens or rows that the summed loss is over; None in checkpoints of earlier versions, for tokens.
        measure_sums: (sum, count) of each of the loss's measures since the last report.
        train_measures: their means of the last report.
        first_valid_measures: means over the validation set before training.
        warned: kinds of warnings that were given.
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
    loss_count: int | None = None
    measure_sums: dict[str, Any] = field(default_factory=dict)
    train_measures: dict[str, Any] = field(default_factory=dict)
    first_valid_measures: dict[str, Any] = field(default_factory=dict)
    first_valid_accuracy: float | None = None
    valid_accuracy: float | None = None
    best_valid_accuracy: float | None = None
    warned: list[str] = field(default_factory=list)
    recent: list[float] = field(default_factory=list)
    spikes: list[int] = field(default_factory=list)

    def record_batch(self, loss: float, tokens: int, seconds: float, count: int | None = None) -> None:
        """Count one batch: its summed loss, supervised tokens and time. A NaN or infinite loss is left out.

        The loss is a sum over `count` rows, or over the tokens if None.
        """
        if self.loss_count is None:
            self.loss_count = self.loss_tokens
        self.iteration += 1
        self.loss_steps += 1
        self.loss_seconds += seconds
        if math.isfinite(loss):
            self.loss_sum += loss
            self.loss_tokens += tokens
            self.loss_count += tokens if count is None else count
            self.tokens += tokens

    def record_measures(self, measures: Mapping[str, Sequence[float]]) -> None:
        """Add the (sum, count) of each measure of a batch."""
        for name, (total, count) in measures.items():
            before = self.measure_sums.get(name, (0.0, 0.0))
            self.measure_sums[name] = [before[0] + total, before[1] + count]

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
        count = self.loss_tokens if self.loss_count is None else self.loss_count
        self.train_loss = self.loss_sum / count if count else None
        self.train_measures = {
            name: total / number for name, (total, number) in self.measure_sums.items() if number
        }
        self.loss_sum, self.loss_tokens, self.loss_steps, self.loss_seconds = 0.0, 0, 0, 0.0
        self.loss_count, self.measure_sums = 0, {}

    def record_validation(self, loss: float, accuracy: float | None = None) -> bool:
        """Record a validation. Return whether it is the best so far; the one before training does not count.

        The best has the highest accuracy, if there is one, and among equal ones the lowest loss.
        """
        self.valid_loss, self.valid_accuracy = loss if math.isfinite(loss) else None, accuracy
        if self.iteration == 0:
            self.first_valid_loss, self.first_valid_accuracy = self.valid_loss, accuracy
            return False
        best_loss, best_accuracy = self.best_valid_loss, self.best_valid_accuracy
        better = best_loss is None or (-(accuracy or 0.0), loss) < (-(best_accuracy or 0.0), best_loss)
        if math.isfinite(loss) and better:
            self.best = Best(loss, self.iteration, accuracy)
            self.stale_validations = 0
            return True
        self.stale_validations += 1
        return False

    @property
    def best(self) -> "Best":
        """The best validation so far."""
        return Best(self.best_valid_loss, self.best_iteration, self.best_valid_accuracy)

    @best.setter
    def best(self, best: "Best") -> None:
        self.best_valid_loss, self.best_iteration, self.best_valid_accuracy = best

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
            first_valid_accuracy=self.first_valid_accuracy,
            valid_accuracy=self.valid_accuracy,
            best_valid_accuracy=self.best_valid_accuracy,
        )
