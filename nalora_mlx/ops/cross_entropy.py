"""Cross-entropy over supervised positions only, with and without tiling of the logits."""

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from nalora_mlx.ops.custom_function import custom_function
from nalora_mlx.ops.device_sizes import device_sizes
from nalora_mlx.ops.fast_math import LOG2_E, exp2_nonpositive, logsumexp

MAX_TILES = 256  # per batch; larger batches get wider tiles
COLUMN_MULTIPLE = 128  # of the columns of a tile, for fast matrix products

# Computes logits row by row. Takes hidden states [s, D] and vocabulary entries (a slice, or indices [v]); returns the
# logits of these entries, [s, v].
LogitsFunction = Callable[[mx.array, Any], mx.array]


def cross_entropy_sum(logits: mx.array, targets: mx.array, weights: mx.array) -> mx.array:
    """Return the weighted sum of token losses, sum_i w_i * -log softmax(logits_i)[target_i], a float32 scalar.

    This is a sum, not a mean. The caller sets the weights to 1 / (supervised tokens of the whole optimizer update), so
    every token counts equally however rows are divided into batches, and a batch without supervised tokens gives 0
    rather than 0/0.

    Args:
        logits: [S, V], any float dtype; converted to float32.
        targets: [S], token ids.
        weights: [S], 0 at positions that do not count; their logits may hold NaN.
    """
    return weighted_sum(token_losses(logits, targets), weights)


def weighted_sum(losses: mx.array, weights: mx.array) -> mx.array:
    """Return sum_i w_i * losses_i, a float32 scalar. Losses with weight 0 may be NaN."""
    return mx.sum(mx.where(weights > 0, losses * weights, 0))


def token_losses(logits: mx.array, targets: mx.array) -> mx.array:
    """Return -log softmax(logits_i)[target_i] of each row; [S], float32.

    Rows whose loss gets a gradient of exactly 0 may hold NaN.

    Args:
        logits: [S, V], any float dtype; converted to float32.
        targets: [S], token ids.
    """
    function = custom_function(_losses_and_lse)

    @function.vjp
    def _(primals, cotangents, outputs):
        logits, targets = primals
        d, (_, lse) = cotangents[0], outputs
        is_target = mx.arange(logits.shape[-1])[None, :] == targets
        probabilities = exp2_nonpositive((logits - lse) * LOG2_E)
        # `where` instead of a product, because logits at positions that do not count may be NaN.
        return mx.where(d == 0, 0, d * (probabilities - is_target)), mx.zeros_like(targets)

    return function(logits.astype(mx.float32), targets[:, None])[0][:, 0]


def _losses_and_lse(logits: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
    """Return the losses and the log-sum-exp of each row, [S, 1] both."""
    lse = logsumexp(logits)
    return lse - mx.take_along_axis(logits, targets, axis=-1), lse


def tiled_cross_entropy_sum(
    compute_logits: LogitsFunction,
    vocabulary: int,
    hidden: mx.array,
    targets: mx.array,
    weights: mx.array,
    with_gradient: bool = True,
) -> mx.array:
    """Return `cross_entropy_sum` of all logits, a float32 scalar, in tiles; see `tiled_token_losses`.

    Args:
        compute_logits: see `LogitsFunction`.
        vocabulary: V, the number of vocabulary entries.
        hidden: [S, D], any float dtype.
        targets: [S], token ids.
        weights: [S], 0 at positions that do not count; their hidden states may hold NaN.
        with_gradient: whether to compute the gradient; pass False if it is not needed.
    """
    return weighted_sum(
        tiled_token_losses(compute_logits, vocabulary, hidden, targets, with_gradient), weights
    )


def tiled_token_losses(
    compute_logits: LogitsFunction,
    vocabulary: int,
    hidden: mx.array,
    targets: mx.array,
    with_gradient: bool = True,
) -> mx.array:
    """Return `token_losses` of all logits while computing only one tile of logits [rows, columns] at a time.

    Each tile of rows computes its losses and, in the same pass, their gradients in `hidden`, [rows, D]. The backward
    only scales these gradients, so no logits are stored or recomputed. For each row with target y:

    1. Compute the target logit l_y. Start with the maximum m = l_y, the sum o = 0, and its gradient G = 0 [D].
    2. For each tile of the vocabulary (online softmax):
       a. Compute the tile's logits l_v, and update m to their maximum, m' = max(m, max_v l_v).
       b. Rescale o and G by exp(m - m').
       c. Add the tile's entries except the target: o += sum_v exp(l_v - m'), G += sum_v exp(l_v - m') dl_v/dh.
    3. With e = exp(l_y - m) and z = o + e, the loss is -log p_y = log z + m - l_y, and its gradient in h is
       (G - o dl_y/dh) / z.

    Leaving the target out of o keeps the precision of losses near zero, where p_y - 1 would round to 0.

    The gradient reaches `hidden` only: the parameters of `compute_logits` must be frozen. Rows whose loss gets a
    gradient of exactly 0 may hold NaN.

    Args:
        compute_logits: see `LogitsFunction`.
        vocabulary: V, the number of vocabulary entries.
        hidden: [S, D], any float dtype.
        targets: [S], token ids.
        with_gradient: whether to compute the gradient; pass False if it is not needed.

    Returns:
        [S], float32. The gradient has the dtype of `hidden`.

    Source: the running maximum follows Milakov and Gimelshein (arXiv 1805.02867); tiles of logits, with the gradient
    in the hidden states, are as in Cut Your Losses (arXiv 2411.09009, apple/ml-cross-entropy).
    """
    row_tiles, vocabulary_tiles = head_tiles(hidden.shape[0], vocabulary)

    def losses_and_gradients(h: mx.array) -> list[mx.array]:
        previous, losses, gradients = list[mx.array](), list[mx.array](), list[mx.array]()
        for tile in row_tiles:
            previous = _row_tile_losses(
                compute_logits,
                vocabulary_tiles,
                _run_after(h[tile], previous),
                targets[tile],
                with_gradient,
            )
            losses.append(previous[0])
            gradients += previous[1:]
        return (
            [mx.concatenate(losses), mx.concatenate(gradients)] if with_gradient else [mx.concatenate(losses)]
        )

    if not with_gradient:
        return losses_and_gradients(hidden)[0]
    # One custom function around all row tiles: the gradient of a slice of `hidden` is an array of its whole size.
    function = custom_function(losses_and_gradients)

    @function.vjp
    def _(primals, cotangents, outputs):
        d = cotangents[0][:, None]
        # `where` instead of a product, because rows that do not count may hold NaN.
        return mx.where(d == 0, 0, d * outputs[1]).astype(primals.dtype)

    return function(hidden)[0]


def tiled_argmax(compute_logits: LogitsFunction, vocabulary: int, hidden: mx.array) -> mx.array:
    """Return the vocabulary entry with the largest logit of each row, the first of equal ones; [S], int32.

    Computes one tile of logits [rows, columns] at a time.

    Args:
        compute_logits: see `LogitsFunction`.
        vocabulary: V, the number of vocabulary entries.
        hidden: [S, D], any float dtype.
    """
    row_tiles, vocabulary_tiles = head_tiles(hidden.shape[0], vocabulary)
    found = list[mx.array]()
    previous = list[mx.array]()
    for rows in row_tiles:
        h = hidden[rows]
        best, entry = mx.full((h.shape[0],), -mx.inf), mx.zeros((h.shape[0],), mx.int32)
        for tile in vocabulary_tiles:
            logits = compute_logits(_run_after(h, previous), tile).astype(mx.float32)  # [s, v]
            largest = mx.max(logits, axis=-1)
            at = mx.argmax(logits, axis=-1).astype(mx.int32) + tile.start
            best, entry = mx.maximum(best, largest), mx.where(largest > best, at, entry)
            previous = [best, entry]
        found.append(entry)
    return mx.concatenate(found)


def head_tiles(rows: int, vocabulary: int) -> tuple[list[slice], list[slice]]:
    """Split rows and vocabulary into tiles of the sizes of this device; see `device_sizes`.

    MLX starts operations before earlier ones finish, so about a dozen tiles are in memory at once.
    """
    sizes = device_sizes()
    row_tiles = [slice(start, start + sizes.head_rows) for start in range(0, rows, sizes.head_rows)]
    columns = min(sizes.head_elements // min(rows, sizes.head_rows), sizes.head_columns)
    columns = max(columns, math.ceil(vocabulary * len(row_tiles) / MAX_TILES))
    columns = -(-columns // COLUMN_MULTIPLE) * COLUMN_MULTIPLE
    return row_tiles, [
        slice(start, min(start + columns, vocabulary)) for start in range(0, vocabulary, columns)
    ]


def _run_after(array: mx.array, previous: list[mx.array]) -> mx.array:
    """Return the array, but delay what is computed from it until `previous` is computed.

    Without this, MLX would start all tiles at once and hold all of their logits.
    """
    return mx.depends([array], previous)[0] if previous else array


def _row_tile_losses(
    compute_logits: LogitsFunction,
    vocabulary_tiles: list[slice],
    h: mx.array,
    targets: mx.array,
    with_gradient: bool,
) -> list[mx.array]:
    """Return the losses [s] of one tile of rows, and their gradients in h [s, D] if asked for.

    See `tiled_token_losses` for the algorithm: `running_max` is m, `other_sum` is o, `other_gradient` is G.
    """
    target_logits = mx.diagonal(compute_logits(h, targets)).astype(mx.float32)[:, None]  # [s, 1]
    running_max, other_sum, other_gradient = target_logits, mx.zeros_like(target_logits), mx.zeros(h.shape)
    previous: list[mx.array] = []
    for tile in vocabulary_tiles:
        tile_h = _run_after(h, previous)
        logits = compute_logits(tile_h, tile)  # [s, v]
        logits32 = logits.astype(mx.float32)
        old_max = running_max
        running_max = mx.maximum(old_max, mx.max(logits32, axis=-1, keepdims=True))
        is_target = mx.arange(tile.start, tile.stop)[None, :] == targets[:, None]
        exps = mx.where(is_target, 0, exp2_nonpositive((logits32 - running_max) * LOG2_E))
        rescale = mx.exp(old_max - running_max)
        other_sum = other_sum * rescale + mx.sum(exps, axis=-1, keepdims=True)
        previous = [other_sum]
        if with_gradient:
            _, (tile_gradient,) = mx.vjp(
                lambda h, tile=tile: compute_logits(h, tile), [tile_h], [exps.astype(logits.dtype)]
            )
            other_gradient = other_gradient * rescale + tile_gradient.astype(mx.float32)
            previous.append(other_gradient)
    target_exp = mx.exp(target_logits - running_max)
    # log z as log1p(z - 1), because target_exp is 1 where the target has the largest logit.
    losses = (mx.log1p(other_sum + (target_exp - 1)) + (running_max - target_logits))[:, 0]
    if not with_gradient:
        return [losses]
    identity = mx.eye(h.shape[0], dtype=logits.dtype)
    _, (target_gradient,) = mx.vjp(
        lambda h: compute_logits(h, targets), [_run_after(h, previous)], [identity]
    )  # dl_y/dh
    gradient = (other_gradient - other_sum * target_gradient.astype(mx.float32)) / (other_sum + target_exp)
    return [losses, gradient.astype(h.dtype)]


def gather_rows(array: mx.array, rows: mx.array, weights: mx.array) -> mx.array:
    """Return array[rows], [S, D], with a gradient that is a gather too.

    MLX computes the gradient of indexing as a scatter-add, which takes 300 ns per element on a CPU. It is a gather
    here, because every row with a positive weight occurs only once.

    Args:
        array: [N, D].
        rows: [S], indices into `array`, distinct where the weight is positive.
        weights: [S]; rows with weight 0 are padding, and no gradient flows through them.
    """
    function = custom_function(lambda array, rows, weights: array[rows])

    @function.vjp
    def _(primals, d, _output):
        array, rows, weights = primals
        count = array.shape[0]
        # For each row of `array`, its position in d. Rows without one point to a row of zeros behind the end of d.
        position = mx.full((count + 1,), d.shape[0], dtype=mx.int32)
        position[mx.where(weights > 0, rows, count)] = mx.arange(d.shape[0])
        padded = mx.concatenate([d, mx.zeros((1, d.shape[1]), d.dtype)])
        return padded[position[:count]], mx.zeros_like(rows), mx.zeros_like(weights)

    return function(array, rows, weights)
