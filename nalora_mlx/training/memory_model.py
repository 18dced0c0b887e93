"""The peak memory of a training step as a function of its batch, measured on small trials of the step itself.

For B rows of L tokens, T = B L in all, the peak of a training step has the form

    peak = base + per_token * T + per_square * T L

base: weights, adapters, gradients. per_token: what layers keep for the backward pass and what the output head computes.
per_square: attention scores and masks, whose number grows with the length. The coefficients are not derived from an
architecture. They are measured with the run's own step, its checkpointing and kernels, on this device:

1. Run the step on a few rows of half the length, on twice as many rows, and on a few rows of the whole length (for a
   single row: on three fractions of it). Solve the three peaks for the three coefficients.
2. If the batch itself surely fits by that estimate, run it too, and let the fit pass through its peak. Then only larger
   batches are extrapolated.
3. Measure the update alone: it does not grow with tokens.

In trials, the tiles of the output head, the groups of tokens of recurrences and the supervised positions shrink with
the number of tokens. Each part then keeps its share of the peak, so the same part determines the peak for every number
of rows.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from nalora_mlx.adapters.forward_pass import recompute_activations
from nalora_mlx.core import trees
from nalora_mlx.data.answer_batches import BatchAnswers
from nalora_mlx.data.batches import Batch
from nalora_mlx.data.media_batches import scaled_media
from nalora_mlx.data.padding import PAD_TO
from nalora_mlx.ops.device_sizes import device_sizes, using_sizes
from nalora_mlx.training.step import TrainingStep

TRIAL_TOKENS = 512  # of the smallest trial, if the run's batches have at least twice as many
UPDATE_MARGIN = 1.1  # the smallest trial must need this many times the memory of an update alone
FULL_BATCH_WEIGHT = 1e3  # weight of the run's own batch in the fit
UNLIMITED = 2**20  # rows or tokens


@dataclass(frozen=True)
class BatchShape:
    """What determines the memory of a batch: rows, tokens per row, supervised positions in all, packing, and images.

    Attributes:
        media: of some batch, whose share of image tokens is taken; see `data.media_batches.collate_media`.
        lanes: sequences per row of data: two if each answer of a pair has one of its own.
        answers: answers per row of data in preference training; 0 in supervised training.
        branched: whether the answers of a row share its prompt.
        rows_per_sequence: rows of data in a packed sequence, about.
    """

    rows: int
    length: int
    loss_positions: int
    packed: bool = False
    media: dict[str, Any] | None = field(default=None, compare=False, repr=False)
    lanes: int = 1
    answers: int = 0
    branched: bool = False
    rows_per_sequence: int = 1

    @property
    def tokens(self) -> int:
        """Positions in the batch, including padding."""
        return self.rows * self.length

    def with_shape(self, rows: int, length: int) -> "BatchShape":
        """Return another shape with the same share of supervised positions."""
        scaled = round(self.loss_positions * rows * length / self.tokens)
        return replace(self, rows=rows, length=length, loss_positions=scaled)


@dataclass(frozen=True)
class PeakMemory:
    """The peak memory of one step as a function of the batch, in bytes; see the module."""

    base: float
    per_token: float
    per_square: float
    update: float

    def at(self, rows: int, length: int) -> int:
        """Return the peak for any number of rows, of about the length that was measured."""
        tokens = rows * length
        activations = self.base + self.per_token * tokens + self.per_square * tokens * length
        return round(max(self.update, activations))

    def plus(self, size: int) -> "PeakMemory":
        """Return the peak of a step while something else takes this many bytes."""
        return replace(self, base=self.base + size, update=self.update + size)

    def rows_within(self, budget: int, length: int) -> int:
        """Return the most rows of this length that stay within a budget; 0 if a single row exceeds it."""
        if self.at(1, length) > budget:
            return 0
        per_row = length * (self.per_token + self.per_square * length)
        return int((budget - self.base) // per_row) if per_row > 0 else UNLIMITED

    def length_within(self, budget: int, rows: int) -> int:
        """Return the greatest length at which this many rows stay within a budget; 0 if none does."""
        if self.at(rows, PAD_TO) > budget:
            return 0
        a, b, spare = self.per_square * rows, self.per_token * rows, budget - self.base  # a L^2 + b L = spare
        if a + b == 0:
            return UNLIMITED
        length = 2 * spare / (b + math.sqrt(b * b + 4 * a * spare))
        return int(min(length, UNLIMITED)) // PAD_TO * PAD_TO


def no_progress(_: str) -> None:
    """Show nothing."""


class PeakProfiler:
    """Measures the peak memory of a training step.

    Parameters, optimizer and random state are the same afterwards. Nothing else may use the step meanwhile.

    Args:
        step: made like the run's training step.
        layers: whose activations are recomputed.
        accumulating: whether gradients of several batches are accumulated.
        progress: called with a line of text before each trial.

    Attributes:
        incomplete: whether the batch itself was left out because it takes long.
    """

    def __init__(
        self,
        step: TrainingStep,
        layers: Sequence[nn.Module] = (),
        accumulating: bool = False,
        progress: Callable[[str], None] = no_progress,
    ):
        self.step, self.layers, self.accumulating = step, list(layers), accumulating
        self.progress, self.incomplete = progress, False
        self.backup_bytes = 0  # held only to restore the state afterwards
        self.seconds_per_token = 0.0  # of the last trial

    def profile(
        self, shape: BatchShape, safe: int = 0, left: Callable[[], float] = lambda: math.inf
    ) -> PeakMemory:
        """Measure the coefficients for batches of about this shape.

        Args:
            shape: of the run's largest batch.
            safe: bytes. The batch itself runs too if its estimated peak stays below.
            left: returns the seconds within which the batch itself must run, or it is left out.
        """
        with self._restoring_state():
            present = mx.get_active_memory()
            update = self._measure(shape.with_shape(1, PAD_TO), shape, update=True)
            enough = present + UPDATE_MARGIN * (update - present)  # below, the peak may be that of the update
            trials, updates = trial_shapes(shape), not self.accumulating
            smallest = self._measure(trials[0], shape, updates)
            while smallest < enough and 4 * trials[0].rows <= shape.rows:
                trials = [trial.with_shape(2 * trial.rows, trial.length) for trial in trials]
                smallest = self._measure(trials[0], shape, updates)
            if updates and smallest < enough:
                updates = False  # without it the peak is that of the activations, if slightly higher
                smallest = self._measure(trials[0], shape, updates)
            peaks = [smallest, *(self._measure(trial, shape, updates) for trial in trials[1:])]
            peak = PeakMemory(*fit_coefficients(trials, peaks), update)
            within, seconds = (
                peak.at(shape.rows, shape.length) <= safe,
                2 * shape.tokens * self.seconds_per_token,
            )
            self.incomplete = within and seconds > left()
            if within and not self.incomplete:
                peaks.append(self._measure(shape, shape, not self.accumulating))
                peak = PeakMemory(*fit_coefficients([*trials, shape], peaks), update)
        if self.accumulating:
            gradients = trees.nbytes(self.step.model.trainable_parameters())
            peak = replace(peak, base=peak.base + gradients)
        return peak

    def measure_batches(self, batches: Sequence[Batch]) -> list[int]:
        """Return the peak of a step on each batch, in bytes."""
        with self._restoring_state():
            return [self._run(batch, True) for batch in batches]

    def _measure(self, trial: BatchShape, shape: BatchShape, update: bool) -> int:
        sizes = device_sizes().scaled(min(1, trial.tokens / shape.tokens))
        with using_sizes(sizes):
            if trial.tokens == PAD_TO:
                self.progress("an optimizer update")
            return self._run(trial_batch(trial), update)

    def _run(self, batch: Batch, update: bool) -> int:
        """Return the peak of a step in bytes: the larger of two, since compiling delays the first."""
        rows, length = batch.inputs.shape
        if rows * length > PAD_TO:
            self.progress(f"{rows} row{'s' * (rows > 1)} of {length} tokens")
        step, peaks = self.step, list[int]()
        recomputed = recompute_activations(self.layers) if self.layers else nullcontext()
        with recomputed:
            for _ in range(2):
                mx.synchronize()
                mx.clear_cache()
                mx.reset_peak_memory()
                began = time.perf_counter()
                total, accumulated = step(batch, batch.loss_counts, None, update)
                mx.eval(step.state, total, accumulated)
                del total, accumulated
                self.seconds_per_token = (time.perf_counter() - began) / (rows * length)
                peaks.append(mx.get_peak_memory() - self.backup_bytes)
                if update:  # the replaced arrays are kept until the end, which no run does
                    changed = [step.model.trainable_parameters(), step.state_tree()]
                    self.backup_bytes = trees.nbytes(changed)
        return max(peaks)

    @contextmanager
    def _restoring_state(self) -> Iterator[None]:
        model, state = self.step.model, self.step.state
        before = tree_map(lambda array: array, state)
        training = model.training
        model.train()
        try:
            yield
        finally:
            trees.assign(state, before)
            model.train(training)
            self.backup_bytes = 0
            mx.clear_cache()
            mx.reset_peak_memory()


def trial_shapes(shape: BatchShape) -> list[BatchShape]:
    """Return three shapes that separate tokens from squares, the largest last, of half the tokens if possible."""
    if shape.rows == 1:
        fractions = (0.125, 0.25, 0.5) if shape.length >= 2 * TRIAL_TOKENS else (0.25, 0.5, 0.75)
        return [shape.with_shape(1, max(PAD_TO, int(shape.length * part))) for part in fractions]
    half = max(PAD_TO, shape.length // 2)
    rows = min(max(1, TRIAL_TOKENS // half), shape.rows // 2)
    return [
        shape.with_shape(rows, half),
        shape.with_shape(2 * rows, half),
        shape.with_shape(rows, 2 * half),
    ]


def fit_coefficients(trials: Sequence[BatchShape], peaks: Sequence[int]) -> tuple[float, float, float]:
    """Return base, per_token and per_square, the last two not negative; a fourth trial is met almost exactly."""
    features = np.array([[1, trial.tokens, trial.tokens * trial.length] for trial in trials], np.float64)
    weights = np.array([1, 1, 1, FULL_BATCH_WEIGHT])[: len(trials)]
    kept = [0, 1, 2]
    while True:
        coefficients = np.zeros(3)
        weighted = features[:, kept] * weights[:, None]
        coefficients[kept] = np.linalg.lstsq(weighted, np.array(peaks) * weights, rcond=None)[0]
        negative = [i for i in kept[1:] if coefficients[i] < 0]  # by rounding: the part is absent
        if not negative:
            return float(coefficients[0]), float(coefficients[1]), float(coefficients[2])
        kept.remove(negative[-1])


def trial_batch(shape: BatchShape) -> Batch:
    """Return a batch of a shape with arbitrary tokens."""
    size = (shape.rows, shape.length)
    loss_mask = np.zeros(shape.tokens, np.float32)
    count = min(max(1, shape.loss_positions), shape.tokens)
    loss_mask[np.linspace(0, shape.tokens - 1, count).astype(int)] = 1
    tokens = np.ones(size, np.int32)
    segment_ids = tokens if shape.packed else None
    batch = Batch(tokens, tokens, loss_mask.reshape(size), np.ones(size, np.float32), (), segment_ids)
    media = None if shape.media is None else scaled_media(shape.media, *size)
    batch = replace(batch, media=media)
    if not shape.answers:
        return batch
    rows = max(1, shape.rows * shape.rows_per_sequence // shape.lanes)
    answers = shape.answers * rows
    numbers = np.where(loss_mask > 0, np.cumsum(loss_mask) % answers, -1).astype(np.int32)
    present = np.ones(rows, np.float32)
    reference = np.zeros(answers, np.float32)
    of_batch = BatchAnswers(tuple(range(rows)), numbers.reshape(size), present, present, reference)
    if not shape.branched:
        return replace(batch, answers=of_batch, rows=of_batch.rows)
    positions = np.broadcast_to(np.arange(shape.length, dtype=np.int32), size)
    return replace(
        batch,
        answers=of_batch,
        rows=of_batch.rows,
        segment_ids=tokens,
        branches=0 * tokens,
        positions=positions,
    )
