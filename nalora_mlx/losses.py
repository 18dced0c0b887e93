"""Cross entropy over the supervised positions of a batch."""

import mlx.core as mx
import mlx.nn as nn


def cross_entropy_sum(logits: mx.array, targets: mx.array, supervised: mx.array) -> mx.array:
    """Sum of -log softmax(logits)[target] over supervised positions, in float32.

    A sum and not a mean: the caller divides by the token count of the whole optimizer step, so that every token
    weighs the same however rows fall into batches, and a batch without supervised tokens gives 0, not 0/0.

    Args:
        logits: [B, L, V], any float dtype; promoted to float32 first.
        targets: [B, L] token ids.
        supervised: [B, L], 1 where the target counts and 0 elsewhere.
    """
    losses = nn.losses.cross_entropy(logits.astype(mx.float32), targets)  # [B, L]
    return mx.sum(mx.where(supervised > 0, losses, 0))
