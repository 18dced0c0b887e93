"""The peak memory of a training step as a function of its batch, found on small trials of the step itself.

The peak of a training step of B rows of L tokens, T = B L of them, has the form

    peak = base + per token * T + per square * T L

base: weights, adapters, gradients. Per token: what the layers keep for the backward pass, and what the head makes.
Per square: attention scores and masks, whose number grows with the length. The three are not computed from a model's
architecture but found on the model itself: its own step, with its own checkpointing and kernels, on this device, runs
on few rows of half the length, on twice as many, and on few of the whole length (of one row: on parts of it), and the
three peaks are solved for them. If the batch itself then surely fits, it runs as well, and what is found passes through
its peak, so that no more is extrapolated than what is larger. The tiles of the head and the scored positions shrink
with the number of tokens, so that each part keeps its share of the peak; which one makes the peak then does not depend
on the number of rows. The update at the end of a step does not grow with tokens; it is measured by itself.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map

from nalora_mlx.adapters.forward_pass import recomputed
from nalora_mlx.data.batches import Batch
from nalora_mlx.data.padding import PAD_TO
from nalora_mlx.training.step import TrainingStep

ENOUGH = 512  # tokens of the smallest trial, if the run's batches have twice as many
MARGIN = 1.1  # how much more than an update alone the smallest trial must need beside what is there
WEIGHT = 1e3  # of a batch of the whole size among the trials
MOST = 2**20  # rows, or tokens: as good as without limit


@dataclass(frozen=True)
class BatchShape:
    """What a batch is to memory: rows, tokens in each, scored positions in all, and whether rows are packed."""

    rows: int
    length: int
    scored: int
    packed: bool = False

    @property
    def tokens(self) -> int:
        """Positions in the batch, padding included."""
        return self.rows * self.length

    def with_shape(self, rows: int, length: int) -> "BatchShape":
        """As many scored positions per token in another shape."""
        return replace(
            self, rows=rows, length=length, scored=round(self.scored * rows * length / self.tokens)
        )


@dataclass(frozen=True)
class Peak:
    """The peak of one step as a function of the batch, in bytes; see the module."""

    base: float
    per_token: float
    per_square: float
    update: float

    def of(self, rows: int, length: int) -> int:
        """The peak with another number of rows, or rows not much longer or shorter than those it was found for."""
        tokens = rows * length
        return round(
            max(self.update, self.base + self.per_token * tokens + self.per_square * tokens * length)
        )

    def rows_within(self, budget: int, length: int) -> int:
        """The most rows of this length that stay within a budget; 0 if not even one does."""
        if self.of(1, length) > budget:
            return 0
        each = length * (self.per_token + self.per_square * length)
        return int((budget - self.base) // each) if each > 0 else MOST

    def length_within(self, budget: int, rows: int) -> int:
        """The longest rows, so many in a batch, that stay within a budget; 0 if none do."""
        if self.of(rows, PAD_TO) > budget:
            return 0
        a, b, spare = self.per_square * rows, self.per_token * rows, budget - self.base  # a L^2 + b L = spare
        if a + b == 0:
            return MOST
        length = 2 * spare / (b + math.sqrt(b * b + 4 * a * spare))
        return int(min(length, MOST)) // PAD_TO * PAD_TO


class Planner:
    """Measures a step that nothing else uses; parameters, optimizer and random state are afterwards what they were.

    Args:
        step: the training step of the run, or one that is made as it is.
        layers: whose activations are recomputed.
        accumulating: whether gradients of several batches are added up.
    """

    def __init__(self, step: TrainingStep, layers: Sequence[nn.Module] = (), accumulating: bool = False):
        self.step, self.layers, self.accumulating = step, list(layers), accumulating
        self.kept = 0  # bytes that are there for no other reason than to be put back

    def peak(self, size: BatchShape, safe: int = 0) -> Peak:
        """Find the peak's parts for batches of about this size.

        Args:
            size: of the run's largest batch.
            safe: bytes; a batch of the size itself is run if by the smaller ones its peak stays below.
        """
        with self._untouched():
            there = mx.get_active_memory()
            update = self._measure(size.with_shape(1, PAD_TO), size, update=True)
            enough = there + MARGIN * (update - there)  # below it, what a step peaks at may be its update
            trials, updates = _trials(size), not self.accumulating
            smallest = self._measure(trials[0], size, updates)
            while smallest < enough and 4 * trials[0].rows <= size.rows:
                trials = [trial.with_shape(2 * trial.rows, trial.length) for trial in trials]
                smallest = self._measure(trials[0], size, updates)
            if updates and smallest < enough:
                updates = (
                    False  # then the peak is that of activations, if a little higher than with the update
                )
                smallest = self._measure(trials[0], size, updates)
            peaks = [smallest, *(self._measure(trial, size, updates) for trial in trials[1:])]
            found = Peak(*_solved(trials, peaks), update)
            if found.of(size.rows, size.length) <= safe:
                peaks.append(self._measure(size, size, not self.accumulating))
                found = Peak(*_solved([*trials, size], peaks), update)
        if self.accumulating:
            found = replace(found, base=found.base + nbytes(self.step.model.trainable_parameters()))
        return found

    def _measure(self, trial: BatchShape, real: BatchShape, update: bool) -> int:
        """Peak memory of a step of a trial, in bytes: of the larger of two, as the first is held up by compiling."""
        step, loss, peaks = self.step, self.step.loss, []
        rows, loss.rows = loss.rows, max(1, round(loss.rows * min(1, trial.tokens / real.tokens)))
        try:
            with recomputed(self.layers) if self.layers else nullcontext():
                for _ in range(2):
                    mx.synchronize()
                    mx.clear_cache()
                    mx.reset_peak_memory()
                    total, carry = step(_trial(trial), trial.scored, None, update)
                    mx.eval(step.state, total, carry)
                    del total, carry
                    peaks.append(mx.get_peak_memory() - self.kept)
                    if update:  # what it replaces is kept until the end, which no run does
                        changed = [step.model.trainable_parameters(), step.optimizer.state, step.importance]
                        self.kept = nbytes(changed)
            return max(peaks)
        finally:
            loss.rows = rows

    @contextmanager
    def _untouched(self) -> Iterator[None]:
        model, state = self.step.model, self.step.state
        before = tree_map(lambda array: array, state)
        training = model.training
        model.train()
        try:
            yield
        finally:
            _put_back(state, before)
            model.train(training)
            self.kept = 0
            mx.clear_cache()
            mx.reset_peak_memory()


def _trials(size: BatchShape) -> list[BatchShape]:
    """Three shapes that tell tokens from squares, the largest last, of half the tokens if there are enough."""
    if size.rows == 1:
        parts = (0.125, 0.25, 0.5) if size.length >= 2 * ENOUGH else (0.25, 0.5, 0.75)
        return [size.with_shape(1, max(PAD_TO, int(size.length * part))) for part in parts]
    half = max(PAD_TO, size.length // 2)
    rows = min(max(1, ENOUGH // half), size.rows // 2)
    return [size.with_shape(rows, half), size.with_shape(2 * rows, half), size.with_shape(rows, 2 * half)]


def _solved(trials: Sequence[BatchShape], peaks: Sequence[int]) -> tuple[float, float, float]:
    """The base, the part per token and the part per square, none of them negative; they meet a fourth peak."""
    features = np.array([[1, trial.tokens, trial.tokens * trial.length] for trial in trials], np.float64)
    weights = np.array([1, 1, 1, WEIGHT])[: len(trials)]
    kept = [0, 1, 2]
    while True:
        parts = np.zeros(3)
        weighted = features[:, kept] * weights[:, None]
        parts[kept] = np.linalg.lstsq(weighted, np.array(peaks) * weights, rcond=None)[0]
        negative = [i for i in kept[1:] if parts[i] < 0]  # by rounding: then there is none of it
        if not negative:
            return float(parts[0]), float(parts[1]), float(parts[2])
        kept.remove(negative[-1])


def _trial(size: BatchShape) -> Batch:
    """A batch of a size, of tokens that do not matter."""
    shape = (size.rows, size.length)
    supervised = np.zeros(size.tokens, np.float32)
    supervised[np.linspace(0, size.tokens - 1, min(max(1, size.scored), size.tokens)).astype(int)] = 1
    tokens = np.ones(shape, np.int32)
    segments = tokens if size.packed else None
    return Batch(tokens, tokens, supervised.reshape(shape), np.ones(shape, np.float32), (), segments)


def _put_back(tree: Any, before: Any) -> None:
    """Give a tree of dicts and lists the arrays that it had before."""
    for key in before if isinstance(before, dict) else range(len(before)):
        if isinstance(before[key], dict | list):
            _put_back(tree[key], before[key])
        else:
            tree[key] = before[key]


def nbytes(tree: Any) -> int:
    """Bytes of all arrays of a tree."""
    return sum(array.nbytes for _, array in tree_flatten(tree))
