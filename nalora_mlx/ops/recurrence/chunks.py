"""Building blocks of recurrences that are computed in chunks.

A recurrence over T tokens, one at a time, gives a graph of O(T) small operations, and its backward keeps T states. Here
the tokens are split into chunks of C. Within a chunk everything is a product of [C, C] or [C, D] matrices. Between
chunks a single state is carried. Groups of chunks are recomputed in the backward, so a forward keeps its inputs and one
state per group.

Decays are given as logarithms, at most 0, and every product of decays is the exponential of a sum of them that begins
and ends where the product does. Nothing is divided, and no sums are subtracted: a decay of 0 is exact, and so is what
follows it.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import mlx.core as mx

from nalora_mlx.ops.custom_function import custom_function
from nalora_mlx.ops.device_sizes import device_sizes

CHUNK = 64  # tokens; the work within chunks grows with it, that between chunks falls
LOG_ZERO = -200.0  # the logarithm that stands for a decay of 0, because a sum of it and others stays finite
SMALLEST = 1e-18  # decays below it count as 0; their products would be denormal, which is slow on a CPU


def chunk_length(tokens: int) -> int:
    """Return the length of chunks for sequences of this length: a power of two, so that halves can be merged."""
    return min(CHUNK, 1 << (tokens - 1).bit_length())


def in_groups(
    step: Callable[..., tuple[mx.array, mx.array]],
    arrays: Sequence[mx.array],
    state: mx.array,
    shared: Sequence[mx.array] = (),
    length: int | None = None,
    decays_of_channels: bool = False,
) -> tuple[mx.array, mx.array]:
    """Run a recurrence over groups of tokens, one group after the other, and recompute each in the backward.

    Args:
        step: (*arrays of a group, *shared, state) -> (output [B, t, ...], state). Its gradients flow to its arguments
            only, so it must not use other arrays that need one.
        arrays: inputs, [B, T, ...], of a float dtype.
        state: the state before the first token.
        shared: inputs that all groups need whole.
        length: tokens of a group; as many chunks as the device's sizes allow if None.
        decays_of_channels: allow half as many more, since their products take more operations per group.

    Returns:
        The output [B, T, ...] and the state after the last token.
    """
    batch, tokens = arrays[0].shape[:2]
    if length is None:
        positions = device_sizes().group_positions
        if decays_of_channels:
            positions = positions * 3 // 2
        length = chunk_length(tokens) * max(positions // (batch * chunk_length(tokens)), 1)
    run = _recomputed(step)
    outputs: list[mx.array] = []
    for group in zip(*(_split(array, length) for array in arrays), strict=True):
        output, state = run(*group, *shared, state)
        outputs.append(output)
    return (outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=1)), state


def _recomputed(step: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that computes the same, and computes it again in the backward.

    Like `mx.checkpoint`, but it waits for the gradients of its outputs, and all its own gradients are computed before
    one of them is used. Otherwise MLX would follow the gradient of the state through all groups first, and hold the
    temporary arrays of all of them.
    """
    recomputed = custom_function(step)

    @recomputed.vjp
    def _(primals, cotangents, outputs):
        if isinstance(cotangents, mx.array):  # of a single output
            cotangents = [cotangents]
        gradients = mx.vjp(step, mx.depends(list(primals), list(cotangents)), list(cotangents))[1]
        return mx.depends(gradients, gradients)

    return recomputed


def _split(x: mx.array, length: int) -> list[mx.array]:
    """Split [B, T, ...] into groups of tokens. The gradient is a concatenation; that of slices is a sum of as many."""
    split = custom_function(
        lambda x: [x[:, start : start + length] for start in range(0, x.shape[1], length)]
    )

    @split.vjp
    def _(primals, cotangents, outputs):
        return mx.concatenate(cotangents, axis=1)

    return split(x)


def to_chunks(x: mx.array, chunk: int) -> mx.array:
    """Split tokens into chunks, padded with 0: [B, T, ..., D] -> [B, ..., N, C, D], float32."""
    padding = -x.shape[1] % chunk
    if padding:
        x = mx.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
    x = x.astype(mx.float32).reshape(x.shape[0], -1, chunk, *x.shape[2:])
    return mx.moveaxis(mx.moveaxis(x, 2, -2), 1, -3)


def from_chunks(x: mx.array, tokens: int) -> mx.array:
    """Undo `to_chunks`: [B, ..., N, C, D] -> [B, T, ..., D]."""
    x = mx.moveaxis(mx.moveaxis(x, -3, 1), -2, 2)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :tokens]


def _products_of_decays(log_decay: mx.array, **how: Any) -> mx.array:
    """Return the exponential of cumulative sums over axis -2, which are products of decays."""
    decay = mx.exp(mx.cumsum(log_decay, axis=-2, **how))
    return mx.where(decay < SMALLEST, 0, decay)


def decay_from_start(log_decay: mx.array, inclusive: bool = True) -> mx.array:
    """Return the decay from the start of each chunk to each token, with or without the token's own: [..., C, D]."""
    return _products_of_decays(log_decay, inclusive=inclusive)


def decay_to_end(log_decay: mx.array) -> mx.array:
    """Return the decay from each token, without its own, to the end of its chunk: [..., C, D]."""
    return _products_of_decays(log_decay, reverse=True, inclusive=False)


def decayed_products(
    x: mx.array, y: mx.array, log_decay: mx.array, own_decay: bool = True, diagonal: bool = True
) -> mx.array:
    """Return the products of the tokens of each chunk with all earlier ones, decayed by what lies between.

        M_ij = sum_d x_id y_jd exp(sum of log_decay_td over j < t <= i)    for i >= j, else 0

    With one decay for all d, M is a product of matrices times a matrix of decays. With a decay for each d, M is made
    of blocks: for i in the second half of a block and j in its first, the decay is one to i, from the middle, times one
    from j, to the middle. Halves are merged until a block is the chunk.

    Args:
        x: [..., C, D], float32; C is a power of two.
        y: [..., C, D].
        log_decay: [..., C, 1] or [..., C, D], at most 0.
        own_decay: whether the decay at i itself counts: t <= i, or t < i.
        diagonal: whether M has its diagonal, or 0 there. Without its own decay, i = j has none: pass False.

    Returns:
        [..., C, C].
    """
    C = x.shape[-2]
    if log_decay.shape[-1] == 1 and own_decay:
        i = mx.arange(C)
        between = mx.where(i[:, None] > i[None, :], log_decay, 0)  # [..., t, j]
        visible = i[:, None] >= i[None, :] if diagonal else i[:, None] > i[None, :]
        return mx.where(visible, (x @ y.swapaxes(-1, -2)) * _products_of_decays(between), 0)
    products = custom_function(partial(_products_below, own_decay))
    products.vjp(partial(_gradients_of_products_below, own_decay))
    below: mx.array = products(x, y, log_decay)
    return below + mx.eye(C) * mx.sum(x * y, axis=-1, keepdims=True) if diagonal else below


def _products_below(own_decay: bool, x: mx.array, y: mx.array, log_decay: mx.array) -> mx.array:
    """Return M_ij for i > j."""
    shape = mx.broadcast_shapes(x.shape, y.shape, log_decay.shape)[:-1]
    blocks = mx.zeros((*shape, 1, 1))  # [..., C / size, size, size]
    size = 1
    while size < x.shape[-2]:
        x_second, y_first, *_ = _decayed_halves(size, own_decay, x, y, log_decay)
        blocks = _merge(blocks, x_second @ y_first.swapaxes(-1, -2))
        size *= 2
    return blocks[..., 0, :, :]


def _gradients_of_products_below(
    own_decay: bool, primals: Sequence[mx.array], d_products: mx.array, _products: mx.array
) -> list[mx.array]:
    """Return the gradients of x, y and log_decay, summed up size by size, not held until the end.

    The gradient of the logarithm of a decay is what the decay multiplies, times the gradient of the product.
    """
    arrays, gradients = list(primals), [mx.zeros_like(x) for x in primals]
    blocks = d_products[..., None, :, :]
    size = d_products.shape[-1] // 2
    while size:
        x_second, y_first, from_start, to_end = _decayed_halves(size, own_decay, *arrays)
        below = blocks[..., size:, :size]
        dx, dy = below @ y_first, below.swapaxes(-1, -2) @ x_second
        second, first = _sum_like(dx * x_second, from_start), _sum_like(dy * y_first, to_end)
        second = mx.cumsum(second, axis=-2, reverse=True, inclusive=own_decay)
        first = mx.cumsum(first, axis=-2, inclusive=False)
        both = [(0, 0)] * (blocks.ndim - 2)
        for i, added in enumerate(
            [
                mx.pad(dx * from_start, [*both, (size, 0), (0, 0)]),
                mx.pad(dy * to_end, [*both, (0, size), (0, 0)]),
                mx.concatenate([first, second], axis=-2),
            ]
        ):
            gradients[i] = gradients[i] + _sum_like(added.flatten(-3, -2), gradients[i])
        blocks = mx.stack([blocks[..., :size, :size], blocks[..., size:, size:]], axis=-3).flatten(-4, -3)
        *arrays, blocks = mx.depends([*arrays, blocks], gradients)
        size //= 2
    return gradients


def _decayed_halves(
    size: int, own_decay: bool, x: mx.array, y: mx.array, log_decay: mx.array
) -> tuple[mx.array, ...]:
    """Return x in the second half of each block of 2 size tokens and y in the first, decayed, and the decays."""
    x, y, log_decay = (z.reshape(*z.shape[:-2], -1, 2 * size, z.shape[-1]) for z in (x, y, log_decay))
    from_start = decay_from_start(log_decay[..., size:, :], inclusive=own_decay)
    to_end = decay_to_end(log_decay[..., :size, :])
    return x[..., size:, :] * from_start, y[..., :size, :] * to_end, from_start, to_end


def _sum_like(x: mx.array, like: mx.array) -> mx.array:
    """Sum over the axes along which `like` was broadcast to the shape of x."""
    missing = x.ndim - like.ndim
    axes = [i for i, n in enumerate(x.shape) if i < missing or like.shape[i - missing] < n]
    return mx.sum(x, axis=axes, keepdims=True).reshape(like.shape) if axes else x


@custom_function
def invert_unit_lower(lower: mx.array) -> mx.array:
    """Return (I + L)^-1, where L is what is below the diagonal of [..., C, C]; C is a power of two.

    Blocks of twice the size are inverted from their halves:

        [A 0; B D]^-1 = [A^-1 0; -D^-1 B A^-1 D^-1]

    For X = (I + L)^-1, the gradient is dL = -X^T dX X^T below the diagonal.
    """
    C = lower.shape[-1]
    inverse = mx.ones((*lower.shape[:-1], 1, 1), lower.dtype)  # [..., C / size, size, size]
    size = 1
    while size < C:
        pairs = lower.reshape(*lower.shape[:-2], C // (2 * size), 2, size, C // (2 * size), 2, size)
        below = mx.diagonal(pairs[..., 1, :, :, 0, :], 0, -4, -2)  # [..., size, size, pairs]
        below = mx.moveaxis(below, -1, -3)
        inverse = _merge(inverse, -(inverse[..., 1::2, :, :] @ (below @ inverse[..., 0::2, :, :])))
        size *= 2
    return inverse[..., 0, :, :]


@invert_unit_lower.vjp
def _(primals, cotangents, inverse):
    transposed = inverse.swapaxes(-1, -2)
    return mx.tril(-(transposed @ cotangents @ transposed), -1)


def _merge(diagonal: mx.array, below: mx.array) -> mx.array:
    """Return blocks [A 0; B D] from the A and D in `diagonal`, [..., 2 n, s, s], and B, [..., n, s, s]."""
    first, second = diagonal[..., 0::2, :, :], diagonal[..., 1::2, :, :]
    top = mx.concatenate([first, mx.zeros_like(first)], axis=-1)
    return mx.concatenate([top, mx.concatenate([below, second], axis=-1)], axis=-2)


@custom_function
def matrix_recurrence(f: mx.array, z: mx.array, state: mx.array) -> list[mx.array]:
    """Compute S_{n+1} = F_n S_n + Z_n.

    The gradient is dS_n = F_n^T dS_{n+1} + dY_n, the same recurrence backwards, dZ_n = dS_{n+1} and
    dF_n = dS_{n+1} S_n^T, where dY are the gradients of the returned states.

    Args:
        f: [..., N, K, K].
        z: [..., N, K, V].
        state: S_0; [..., K, V].

    Returns:
        S_0 to S_{N-1}, [..., N, K, V], and S_N, [..., K, V].
    """
    states = []
    for n in range(f.shape[-3]):
        states.append(state)
        state = mx.addmm(z[..., n, :, :], f[..., n, :, :], state)
    return [mx.stack(states, axis=-3), state]


@matrix_recurrence.vjp
def _(primals, cotangents, outputs):
    f = primals[0]
    d_states, d_state = cotangents
    after = []
    for n in reversed(range(f.shape[-3])):
        after.append(d_state)
        d_state = mx.addmm(d_states[..., n, :, :], f[..., n, :, :].swapaxes(-1, -2), d_state)
    dz = mx.stack(after[::-1], axis=-3)
    return dz @ outputs[0].swapaxes(-1, -2), dz, d_state


@custom_function
def delta_recurrence(
    u: mx.array, w: mx.array, k: mx.array, decay: mx.array, state: mx.array
) -> list[mx.array]:
    """Compute d_n = u_n - w_n S_n and S_{n+1} = decay_n * S_n + k_n^T d_n.

    The gradients of d_n and S_n are dd_n + k_n dS_{n+1} and decay_n * dS_{n+1} + dY_n - w_n^T dd_n, where dd and dY are
    those of the returned d and states. The others are products of these.

    Args:
        u: [..., N, C, V].
        w: [..., N, C, K].
        k: [..., N, C, K].
        decay: [..., N, 1 or K, 1].
        state: S_0; [..., K, V].

    Returns:
        d, [..., N, C, V]; S_0 to S_{N-1}, [..., N, K, V]; and S_N, [..., K, V].
    """
    state = state[..., None, :, :]
    d, states = [], []
    for u_n, w_n, k_n, decay_n in _each_chunk(u, w, k, decay):
        states.append(state)
        d.append(mx.addmm(u_n, w_n, state, alpha=-1))
        state = mx.addmm(decay_n * state, k_n.swapaxes(-1, -2), d[-1])
    return [mx.concatenate(d, axis=-3), mx.concatenate(states, axis=-3), state[..., 0, :, :]]


@delta_recurrence.vjp
def _(primals, cotangents, outputs):
    _, w, k, decay, _ = primals
    d, states, _ = outputs
    dd, d_states, d_state = cotangents
    d_state = d_state[..., None, :, :]
    du, after = [], []
    for w_n, k_n, decay_n, dd_n, d_states_n in reversed(_each_chunk(w, k, decay, dd, d_states)):
        after.append(d_state)
        du.append(mx.addmm(dd_n, k_n, d_state))
        d_state = mx.addmm(decay_n * d_state + d_states_n, w_n.swapaxes(-1, -2), du[-1], alpha=-1)
    du_all, d_after = (mx.concatenate(x[::-1], axis=-3) for x in (du, after))
    dw = -(du_all @ states.swapaxes(-1, -2))
    dk = d @ d_after.swapaxes(-1, -2)
    d_decay = mx.sum(states * d_after, axis=-1 if decay.shape[-2] > 1 else (-2, -1), keepdims=True)
    return du_all, dw, dk, d_decay, d_state[..., 0, :, :]


def _each_chunk(*arrays: mx.array) -> list[list[mx.array]]:
    """Return the arrays of each chunk, [..., 1, C, D]."""
    return [[x[..., n : n + 1, :, :] for x in arrays] for n in range(arrays[0].shape[-3])]
