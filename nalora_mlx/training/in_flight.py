"""What a run remembers of an iteration until it reads the results, and of an update that it skips."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx

from nalora_mlx.data.batches import Batch


class InFlight(NamedTuple):
    """An iteration that was started, and whose results have not been read yet."""

    iteration: int
    batch: Batch
    updates: bool  # whether it ends its accumulation window
    weights: list[mx.array] | None  # that its loss is computed from; None if the run does not keep them
    loss: mx.array  # summed over the batch; []
    measures: mx.array | None  # of the batch, see `TrainingStep.measures`
    finite: mx.array  # whether the numbers of its window are finite so far; []
    started: float  # seconds


@dataclass(frozen=True)
class SkippedUpdate:
    """Why an update is skipped: the first batch of its window whose numbers are not finite."""

    batch: Batch
    loss: float  # summed over the batch

    @property
    def reason(self) -> str:
        """What is not finite, as a clause."""
        if math.isfinite(self.loss):
            return "the gradient, the new weights or what they compute is not finite"
        return f"the loss is {self.loss}"
