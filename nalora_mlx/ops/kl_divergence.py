"""The Kullback-Leibler divergence between two next-token distributions, with only a tile of logits in memory."""

import mlx.core as mx

from nalora_mlx.ops.cross_entropy import LogitsFunction, head_tiles


def tiled_kl_divergence(
    compute_logits: LogitsFunction,
    vocabulary: int,
    hidden: mx.array,
    reference: mx.array,
    reference_logits: LogitsFunction | None = None,
) -> mx.array:
    """Return KL(p || q) = sum_v p_v (log p_v - log q_v) of each row; [S], float32.

    p and q are the distributions of two hidden states, under one output head or one each. For each tile of the
    vocabulary, with logits l and l' of both (online softmax):

    1. Update the maxima m and m', and rescale the sums below by the change of m, and of m' for z'.
    2. z += sum_v exp(l_v - m), z' += sum_v exp(l'_v - m'), a += sum_v exp(l_v - m) (l_v - l'_v).

    At the end KL = a / z - (log z + m) + (log z' + m').

    Args:
        compute_logits: see `LogitsFunction`.
        vocabulary: V, the number of vocabulary entries.
        hidden: [S, D] of p, any float dtype.
        reference: [S, D] of q.
        reference_logits: the function of q; that of p if None.
    """
    functions = (compute_logits, reference_logits or compute_logits)
    row_tiles, vocabulary_tiles = head_tiles(hidden.shape[0], vocabulary)
    return mx.concatenate([_rows(functions, vocabulary_tiles, hidden[t], reference[t]) for t in row_tiles])


def _rows(
    functions: tuple[LogitsFunction, LogitsFunction], tiles: list[slice], h: mx.array, reference: mx.array
) -> mx.array:
    low = mx.full((h.shape[0], 1), -mx.inf)
    p_max, q_max, zero = low, low, mx.zeros_like(low)
    p_sum, q_sum, difference = zero, zero, zero
    for tile in tiles:
        p, q = (
            compute_logits(x, tile).astype(mx.float32)  # [s, v]
            for compute_logits, x in zip(functions, (h, reference), strict=True)
        )
        old_p, old_q = p_max, q_max
        p_max = mx.maximum(p_max, mx.max(p, axis=-1, keepdims=True))
        q_max = mx.maximum(q_max, mx.max(q, axis=-1, keepdims=True))
        weights, rescale = mx.exp(p - p_max), mx.exp(old_p - p_max)
        p_sum = p_sum * rescale + mx.sum(weights, axis=-1, keepdims=True)
        q_sum = q_sum * mx.exp(old_q - q_max) + mx.sum(mx.exp(q - q_max), axis=-1, keepdims=True)
        # Entries that have no probability may have logits of -inf in both.
        gap = mx.where(weights > 0, weights * (p - q), 0)
        difference = difference * rescale + mx.sum(gap, axis=-1, keepdims=True)
        mx.eval(p_max, q_max, p_sum, q_sum, difference)  # one tile at a time
    divergence = difference / p_sum - (mx.log(p_sum) + p_max) + (mx.log(q_sum) + q_max)
    return mx.maximum(divergence[:, 0], 0)
