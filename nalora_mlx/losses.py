"""Cross entropy over supervised positions only, in chunks of tokens, with its gradient made in the forward."""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

CHUNK_BYTES = 1 << 26  # of float32 logits that exist at one time


def cross_entropy_sum(logits: mx.array, targets: mx.array, weights: mx.array) -> mx.array:
    """Sum of w * -log softmax(logits)[target] over positions of weight w above 0, in float32.

    A sum and not a mean: the caller's weights are 1 over the token count of the whole optimizer step, so that every
    token weighs the same however rows fall into batches, and a batch without supervised tokens gives 0, not 0/0.

    Args:
        logits: [S, V], any float dtype; promoted to float32 first.
        targets: [S] token ids.
        weights: [S], 0 where the target does not count.
    """
    losses = nn.losses.cross_entropy(logits.astype(mx.float32), targets)  # [S]
    return mx.sum(mx.where(weights > 0, losses * weights, 0))


def chunked_cross_entropy_sum(
    head: Callable[[mx.array], mx.array], hidden: mx.array, targets: mx.array, weights: mx.array, chunk: int
) -> mx.array:
    """`cross_entropy_sum` of head(hidden), of which only `chunk` rows of logits exist at a time.

    The gradient of each chunk is computed beside its loss and kept in place of its logits, [S, D] for [S, V]. It
    reaches `hidden` alone: what `head` holds must be frozen.

    Args:
        head: hidden states [s, D] -> logits [s, V].
        hidden: [S, D].
        targets: [S] token ids.
        weights: [S], 0 where the target does not count.
        chunk: rows of logits at a time.
    """
    total = mx.array(0.0)
    for start in range(0, hidden.shape[0], chunk):
        part = slice(start, start + chunk)
        total = total + _with_gradient(head, targets[part], weights[part])(hidden[part])[0]
    return total


def _with_gradient(
    head: Callable[[mx.array], mx.array], targets: mx.array, weights: mx.array
) -> Callable[[mx.array], tuple[mx.array, mx.array]]:
    """h -> (loss, gradient of the loss in h), differentiable in h through the gradient that it returns."""

    def loss(h: mx.array) -> mx.array:
        return cross_entropy_sum(head(h), targets, weights)

    @mx.custom_function
    def both(h: mx.array) -> tuple[mx.array, mx.array]:
        value, gradient = mx.value_and_grad(loss)(h)
        return value, gradient.astype(h.dtype)

    @both.vjp
    def _(primals, cotangents, outputs):
        return (cotangents[0] * outputs[1]).astype(primals.dtype)

    return both  # type: ignore[return-value]
