"""Cross entropy over scored positions only, in tiles of logits, with its gradient made in the forward."""

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from nalora_mlx.ops.fast_math import LOG2_E, exp2_nonpositive, logsumexp

# A tile of float32 logits, [rows, columns], is to stay in a processor's cache, and each of its sides long enough for
# products to be fast. MLX begins operations before those before them have ended: a dozen tiles are alive at a time.
# With few rows it has twice as many columns, for every tile is some fifty nodes of a graph.
ROWS, COLUMNS = 512, 2048
TILE_BYTES = 4 * ROWS * COLUMNS
MOST_TILES = 256  # of a batch; beyond it they become wider
# Hidden states [s, D] and entries of the vocabulary (a slice, or indices [v]) -> their logits [s, v], row by row.
Part = Callable[[mx.array, Any], mx.array]


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
        return mx.where(d == 0, 0, d * (exp2_nonpositive((logits - size) * LOG2_E) - hit)), mx.zeros_like(
            targets
        )

    return function(logits, targets)[0][:, 0]


def _losses_and_sizes(logits: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
    size = logsumexp(logits)  # [S, 1]
    return size - mx.take_along_axis(logits, targets, axis=-1), size


def tiled_cross_entropy_sum(
    part: Part,
    vocabulary: int,
    hidden: mx.array,
    targets: mx.array,
    weights: mx.array,
    rows: int = ROWS,
    with_gradient: bool = True,
) -> mx.array:
    """`cross_entropy_sum` of all logits, of which only a tile exists at a time.

    Over the entries v of the vocabulary but the target y, tile by tile, with m the largest logit so far:

        o = sum exp(l_v - m),  G = sum exp(l_v - m) dl_v/dh,  e = exp(l_y - m),  z = o + e
        -log p_y = log z + m - l_y,  d(-log p_y)/dh = (G - o dl_y/dh) / z

    When m grows, o and G shrink. Leaving out the target keeps the digits of a loss near zero: there p_y - 1 would have
    none. The gradient of each block of rows is computed beside its loss and kept in place of its logits, [S, D] for
    [S, V]. It reaches `hidden` alone: what makes the logits must be frozen.

    Args:
        part: see `Part`.
        vocabulary: V.
        hidden: [S, D].
        targets: [S] token ids.
        weights: [S], 0 where the target does not count.
        rows: of a tile.
        with_gradient: False where none will be asked for.

    Source: the running maximum is that of Milakov and Gimelshein (arXiv 1805.02867).
    """
    blocks = [slice(start, start + rows) for start in range(0, hidden.shape[0], rows)]
    columns = COLUMNS if hidden.shape[0] > ROWS // 2 else 2 * COLUMNS
    columns = max(columns, math.ceil(vocabulary * len(blocks) / MOST_TILES))
    parts = [slice(start, min(start + columns, vocabulary)) for start in range(0, vocabulary, columns)]

    def total(h: mx.array) -> list[mx.array]:
        loss, done, gradients = mx.array(0.0), list[mx.array](), list[mx.array]()
        for block in blocks:
            done = _block(part, parts, _after(h[block], done), targets[block], weights[block], with_gradient)
            loss = loss + done[0]
            gradients += done[1:]
        return [loss, mx.concatenate(gradients)] if with_gradient else [loss]

    if not with_gradient:
        return total(hidden)[0]
    # Around all blocks and not one by one: the gradient of a slice is an array of the whole size, zeros around it.
    both: Any = mx.custom_function(total)

    @both.vjp
    def _(primals, cotangents, outputs):
        return (cotangents[0] * outputs[1]).astype(primals.dtype)

    return both(hidden)[0]


def _after(array: mx.array, done: list[mx.array]) -> mx.array:
    """The array, but not before others: MLX would otherwise begin with all tiles, and hold the logits of all."""
    return mx.depends([array], done)[0] if done else array


def _block(
    part: Part, parts: list[slice], h: mx.array, targets: mx.array, weights: mx.array, with_gradient: bool
) -> list[mx.array]:
    """The summed loss of some rows and its gradient in h, [s, D]."""
    own = mx.diagonal(part(h, targets)).astype(mx.float32)[:, None]  # l_y, [s, 1]
    largest, others, pulled = own, mx.zeros_like(own), mx.zeros(h.shape)
    done: list[mx.array] = []
    for which in parts:
        rows = _after(h, done)
        logits = part(rows, which)  # [s, v]
        values = logits.astype(mx.float32)
        before, largest = largest, mx.maximum(largest, mx.max(values, axis=-1, keepdims=True))
        hit = mx.arange(which.start, which.stop)[None, :] == targets[:, None]
        e = mx.where(hit, 0, exp2_nonpositive((values - largest) * LOG2_E))
        shrink = mx.exp(before - largest)
        others = others * shrink + mx.sum(e, axis=-1, keepdims=True)
        done = [others]
        if with_gradient:
            _, (pull,) = mx.vjp(lambda h, which=which: part(h, which), [rows], [e.astype(logits.dtype)])
            pulled = pulled * shrink + pull.astype(mx.float32)
            done.append(pulled)
    e = mx.exp(own - largest)
    # log z is log1p(z - 1): e is 1 where the target has the largest logit.
    losses = (mx.log1p(others + (e - 1)) + (largest - own))[:, 0]
    value = mx.sum(mx.where(weights > 0, losses * weights, 0))
    if not with_gradient:
        return [value]
    eye = mx.eye(h.shape[0], dtype=logits.dtype)
    _, (pull,) = mx.vjp(lambda h: part(h, targets), [_after(h, done)], [eye])  # dl_y/dh
    gradient = (pulled - others * pull.astype(mx.float32)) / (others + e)
    # Weighed here and not in the tiles: in a half type slopes over many tokens underflow.
    weighed = mx.where(weights[:, None] > 0, gradient * weights[:, None], 0)
    return [value, weighed.astype(h.dtype)]


def gather_rows(array: mx.array, rows: mx.array, weights: mx.array) -> mx.array:
    """array[rows], [N, D] and [S] -> [S, D]; rows of weight 0 are fillers, which no gradient passes.

    Other rows occur once, so that the gradient is a gather too: MLX's sum of scattered rows takes 300 ns an element
    on a CPU.
    """
    function: Any = mx.custom_function(lambda array, rows, weights: array[rows])

    @function.vjp
    def _(arrays, d, _output):
        array, rows, weights = arrays
        count = array.shape[0]
        # Which of d each row has; beyond its end there is a row of zeros, for those that have none.
        where = mx.full((count + 1,), d.shape[0], dtype=mx.int32)
        where[mx.where(weights > 0, rows, count)] = mx.arange(d.shape[0])
        padded = mx.concatenate([d, mx.zeros((1, d.shape[1]), d.dtype)])
        return padded[where[:count]], mx.zeros_like(rows), mx.zeros_like(weights)

    return function(array, rows, weights)
