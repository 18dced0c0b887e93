"""The loss of a model over a fixed set of batches."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from nalora_mlx.data.batches import Batch
from nalora_mlx.ops.fast_math import vectorized
from nalora_mlx.training.device_memory import trim_cache
from nalora_mlx.training.distributed import ALONE, Workers
from nalora_mlx.training.loss import Loss, SupervisedLoss, batch_arrays


class Evaluation(NamedTuple):
    """The result of `evaluate`.

    Attributes:
        loss: mean over supervised tokens, in nats; over rows in preference training.
        tokens: number of supervised tokens.
        measures: mean of each of the loss's measures that something counts in; none in supervised training.
    """

    loss: float
    tokens: int
    measures: dict[str, float]


def evaluate(
    model: nn.Module,
    batches: Sequence[Batch],
    on_batch: Callable[[int], None] | None = None,
    loss: Loss | None = None,
    workers: Workers = ALONE,
    clear_cache_threshold: int | None = None,
    more: Sequence[Mapping[str, mx.array]] | None = None,
) -> Evaluation:
    """Return the mean loss of a model over all batches.

    Args:
        model: any model; runs in evaluation mode and is put back into its own.
        batches: a fixed set, see `evaluation_batches`.
        on_batch: called with the number of batches done.
        loss: the model's loss; the supervised loss if None.
        workers: hold the other shares of the batches.
        clear_cache_threshold: bytes above which the allocator's cache is cleared; None decides by the device.
        more: for each batch, further arrays that the loss reads.
    """
    training = model.training
    model.eval()
    loss = loss or SupervisedLoss(model)
    counts = [sum(of_term) for of_term in zip(*(batch.loss_counts for batch in batches), strict=True)]
    # The first term's mean is taken at the end.
    weights = mx.array([1.0, *(counts[0] / max(count, 1) for count in counts[1:])])
    total, sums = 0.0, np.zeros((len(loss.measures), 2))
    try:
        for done, batch in enumerate(batches, 1):
            arrays = batch_arrays(batch) | dict(more[done - 1] if more else {})
            with vectorized():
                value, measures = loss.evaluate(arrays, weights)
            total += float(value)
            if measures is not None:
                sums += np.array(measures)
            trim_cache(clear_cache_threshold)
            if on_batch is not None:
                on_batch(done)
    finally:
        model.train(training)
    summed = workers.sum({"loss": mx.array(total), "measures": mx.array(sums.astype(np.float32))})
    return Evaluation(
        float(summed["loss"]) / max(counts[0] if counts else 0, 1),
        sum(batch.supervised_tokens for batch in batches),
        means(loss.measures, np.array(summed["measures"])),
    )


def means(names: Sequence[str], sums: np.ndarray) -> dict[str, float]:
    """Return the mean of each measure that something counts in.

    Args:
        names: of the measures.
        sums: (sum, count) of each; [K, 2].
    """
    return {name: total / count for name, (total, count) in zip(names, sums.tolist(), strict=True) if count}
