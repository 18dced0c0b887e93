"""Cross entropy over supervised positions only, in chunks of tokens, with its gradient made in the forward."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from nalora_mlx.elementary import LOG2_E, logsumexp, probability

# Of float32 logits in a chunk. MLX begins operations before those before them have ended: some fourteen arrays of this
# size are alive at a time. Half as much costs time: each chunk reads all weights of the head.
CHUNK_BYTES = 9 << 20
MIN_ROWS = 48  # of a chunk, for the same reason
Head = Callable[[mx.array], mx.array]


def cross_entropy_sum(logits: mx.array, targets: mx.array, weights: mx.array) -> mx.array:
    """Sum of w * -log softmax(logits)[target] over positions of weight w above 0, in float32.

    A sum and not a mean: the caller's weights are 1 over the token count of the whole optimizer step, so that every
    token weighs the same however rows fall into batches, and a batch without supervised tokens gives 0, not 0/0.

    Args:
        logits: [S, V], any float dtype; promoted to float32 first.
        targets: [S] token ids.
        weights: [S], 0 where the target does not count.
    """
    losses = _cross_entropies(logits.astype(mx.float32), targets[:, None])  # [S]
    return mx.sum(mx.where(weights > 0, losses * weights, 0))


def _cross_entropies(logits: mx.array, targets: mx.array) -> mx.array:
    """Log sum exp(logits) - logits[target] of each row, [S]; targets [S, 1]."""
    function: Any = mx.custom_function(_losses_and_sizes)

    @function.vjp
    def _(arrays, cotangents, outputs):
        logits, targets = arrays
        d, (_, size) = cotangents[0], outputs
        hit = mx.arange(logits.shape[-1])[None, :] == targets
        # where, not a product: what stands beside an unscored position may be NaN
        return mx.where(d == 0, 0, d * (probability((logits - size) * LOG2_E) - hit)), mx.zeros_like(targets)

    return function(logits, targets)[0][:, 0]


def _losses_and_sizes(logits: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
    size = logsumexp(logits)  # [S, 1]
    return size - mx.take_along_axis(logits, targets, axis=-1), size


def chunked_cross_entropy_sum(
    head: Head,
    hidden: mx.array,
    targets: mx.array,
    weights: mx.array,
    chunk: int,
    with_gradient: bool = True,
) -> mx.array:
    """`cross_entropy_sum` of head(hidden), of which only `chunk` rows of logits exist at a time.

    The gradient of each chunk is computed beside its loss and kept in place of its logits, [S, D] for [S, V]. It
    reaches `hidden` alone: what `head` holds must be frozen.

    Args:
        head: hidden states [s, D] -> logits [s, V], row by row.
        hidden: [S, D].
        targets: [S] token ids.
        weights: [S], 0 where the target does not count.
        chunk: rows of logits at a time.
        with_gradient: False where none will be asked for.
    """
    parts = [slice(start, start + chunk) for start in range(0, hidden.shape[0], chunk)]

    def total(
        h: mx.array, of: Callable[[mx.array, slice], list[mx.array]]
    ) -> tuple[mx.array, list[mx.array]]:
        loss, done, others = mx.array(0.0), list[mx.array](), list[mx.array]()
        for part in parts:
            # Only after the chunk before: MLX would otherwise begin with all of them, and hold the logits of all.
            rows = mx.depends([h[part]], done)[0] if done else h[part]
            done = of(rows, part)
            loss = loss + done[0]
            others += done[1:]
        return loss, others

    if not with_gradient:
        return total(
            hidden, lambda rows, part: [cross_entropy_sum(head(rows), targets[part], weights[part])]
        )[0]
    custom: Any = mx.custom_function

    # Around all chunks and not one by one: the gradient of a slice is an array of the whole size, zeros around it.
    @custom
    def both(h: mx.array) -> list[mx.array]:
        loss, gradients = total(
            h, lambda rows, part: _with_gradient(head, rows, targets[part], weights[part])
        )
        return [loss, mx.concatenate(gradients)]

    @both.vjp
    def _(primals, cotangents, outputs):
        return (cotangents[0] * outputs[1]).astype(primals.dtype)

    return both(hidden)[0]


def _with_gradient(head: Head, h: mx.array, targets: mx.array, weights: mx.array) -> list[mx.array]:
    """The summed loss of a chunk and its gradient in h, [s, D]."""
    logits = head(h)  # [s, V]
    losses, slopes = _losses_and_slopes(logits.astype(mx.float32), targets)
    _, (gradient,) = mx.vjp(head, [h], [slopes.astype(logits.dtype)])
    # Weighed here and not in the slopes: a [s, V] less, and in a half type slopes over many tokens underflow.
    value = mx.sum(mx.where(weights > 0, losses * weights, 0))
    weighed = mx.where(weights[:, None] > 0, gradient.astype(mx.float32) * weights[:, None], 0)
    return [value, weighed.astype(h.dtype)]


def _losses_and_slopes(logits: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
    """-log p[target] [s], and its gradient p - 1[target] in the logits [s, V], of p = softmax(logits).

    With m = max(logits), e = exp(logits - m) and z = sum e: p = e / z, and -log p[target] = log z + m - logits[target].
    """
    targets = targets[:, None]
    largest = mx.max(logits, axis=-1, keepdims=True)
    e = probability((logits - largest) * LOG2_E)
    z = mx.sum(e, axis=-1, keepdims=True)
    losses = mx.log(z) + (largest - mx.take_along_axis(logits, targets, axis=-1))
    hit = mx.arange(logits.shape[-1])[None, :] == targets
    return losses[:, 0], e * (1 / z) - hit
