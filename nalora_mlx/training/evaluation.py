"""The loss of a model over a fixed set of batches."""

from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn

from nalora_mlx.data.batches import Batch
from nalora_mlx.ops.fast_math import vectorized
from nalora_mlx.training.distributed import ALONE, Workers
from nalora_mlx.training.loss import ScoredLoss


def evaluate(
    model: nn.Module,
    batches: Sequence[Batch],
    on_batch: Callable[[int], None] | None = None,
    loss: ScoredLoss | None = None,
    workers: Workers = ALONE,
) -> tuple[float, int]:
    """Mean cross entropy over all supervised tokens of the batches, and their number.

    Args:
        model: any model; it is put into evaluation mode and back.
        batches: a fixed set, see `evaluation_batches`.
        on_batch: called with the number of batches done.
        loss: the model's loss, if there is one already.
        workers: who have the batches' other shares.
    """
    training = model.training
    model.eval()
    loss = loss or ScoredLoss(model)
    total, tokens = 0.0, 0
    try:
        for done, batch in enumerate(batches, 1):
            with vectorized():
                value = loss.evaluate(*map(mx.array, (batch.inputs, *batch.scored())))
            total += float(value)
            tokens += batch.tokens
            mx.clear_cache()
            if on_batch is not None:
                on_batch(done)
    finally:
        model.train(training)
    return float(workers.sum(mx.array(total))) / max(tokens, 1), tokens
