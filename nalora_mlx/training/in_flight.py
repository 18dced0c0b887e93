"""What a run keeps of an iteration between its start and the reading of its results, and of a skipped update."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx

from nalora_mlx.data.batches import Batch


class InFlight(NamedTuple):
    """An iteration that was started and whose results have not been read."""

    iteration: int
    batch: Batch
    updates: bool  # whether it ends its accumulation window
    weights: list[mx.array] | None  # from which it computes the loss; None if the run does not keep them
    loss: mx.array  # summed over the batch; []
    finite: mx.array  # whether the numbers of its window are finite so far; []
    started: float  # seconds


@dataclass(frozen=True)
class SkippedUpdate:
    """Why an update is skipped: the first batch of its window with a NaN or infinite number."""

    batch: Batch
    loss: float  # summed over the batch

    @property
    def reason(self) -> str:
        """What is not finite, as a clause."""
        if math.isfinite(self.loss):
            return "the gradient or the new weights are not finite"
        return f"the loss is {self.loss}"
