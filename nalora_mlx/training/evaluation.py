"""The loss of a model over a fixed set of batches."""

from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn

from nalora_mlx.data.batches import Batch
from nalora_mlx.ops.fast_math import vectorized
from nalora_mlx.training.device_memory import trim_cache
from nalora_mlx.training.distributed import ALONE, Workers
from nalora_mlx.training.loss import SupervisedLoss
from nalora_mlx.training.step import media_arrays


def evaluate(
    model: nn.Module,
    batches: Sequence[Batch],
    on_batch: Callable[[int], None] | None = None,
    loss: SupervisedLoss | None = None,
    workers: Workers = ALONE,
    clear_cache_threshold: int | None = None,
) -> tuple[float, int]:
    """Return the mean cross entropy over all supervised tokens of the batches, in nats, and the number of tokens.

    Args:
        model: any model; runs in evaluation mode and is put back into its own.
        batches: a fixed set, see `evaluation_batches`.
        on_batch: called with the number of batches done.
        loss: the model's loss; made here if None.
        workers: hold the other shares of the batches.
        clear_cache_threshold: bytes above which the allocator's cache is cleared; None decides by the device.
    """
    training = model.training
    model.eval()
    loss = loss or SupervisedLoss(model)
    total, tokens = 0.0, 0
    try:
        for done, batch in enumerate(batches, 1):
            with vectorized(), loss.training_forms.installed():
                arrays = map(mx.array, (batch.inputs, *batch.loss_positions()))
                value = loss.evaluate(*arrays, None, media_arrays(batch.with_media().media))
            total += float(value)
            tokens += batch.supervised_tokens
            trim_cache(clear_cache_threshold)
            if on_batch is not None:
                on_batch(done)
    finally:
        model.train(training)
    return float(workers.sum(mx.array(total))) / max(tokens, 1), tokens
