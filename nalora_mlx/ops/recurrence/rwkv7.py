"""The recurrence of RWKV-7 in chunks, for training."""

import mlx.core as mx

from nalora_mlx.ops.recurrence.chunks import (
    LOG_ZERO,
    chunk_length,
    decay_from_start,
    decay_to_end,
    decayed_products,
    from_chunks,
    in_groups,
    invert_unit_lower,
    matrix_recurrence,
    to_chunks,
)


def rwkv7(
    r: mx.array,
    log_decay: mx.array,
    k: mx.array,
    v: mx.array,
    a: mx.array,
    b: mx.array,
    state: mx.array | None = None,
    starts: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """Return the outputs y_t = S_t r_t of the recurrence of RWKV-7, and the last state.

        S_t = S_{t-1} diag(w_t) + S_{t-1} a_t b_t^T + v_t k_t^T

    In a chunk with the state S before it, and D_ij = w_{j+1} ... w_i, the decay between tokens:

    1. The vectors u_t = S_{t-1} a_t solve (I - A) u = (a_i * D_{i-1,0}) S + A' v, with A_ij = (a_i * D_{i-1,j}) . b_j
       below the diagonal, and A' the same with k for b. With T = (I - A)^-1, u = W S + U, where W = T (a_i * D_{i-1,0})
       and U = T A' v.
    2. The outputs are y = (r * D_i0) S + P u + P' v with P_ij = (r_i * D_ij) . b_j, on and below the diagonal, and P'
       the same with k for b. As D_ij = w_i * D_{i-1,j} below the diagonal, all four matrices are computed at once.
    3. The state after the chunk is D_C0 S + (b * D_Ci)^T u + (k * D_Ci)^T v, which is linear in S: F S + Z.

    All but the recurrence S <- F S + Z is computed for all chunks of a group at once.

    Args:
        r: [B, T, H, D], any float dtype.
        log_decay: log w, at most 0; [B, T, H, D].
        k: [B, T, H, D].
        v: [B, T, H, D].
        a: [B, T, H, D].
        b: [B, T, H, D].
        state: S_0; [B, H, D, D], of v's by k's channels, zeros if None.
        starts: [B, T], True at the first token of each packed row; the state before it is 0. None: nowhere.

    Returns:
        The outputs [B, T, H, D] in the dtype of r, and the state [B, H, D, D], float32.

    Source: RWKV-7 (arXiv 2503.14456), section 4.
    """
    B, T, H, D = r.shape
    chunk = chunk_length(T)
    log_decay = mx.maximum(log_decay.astype(mx.float32), LOG_ZERO)
    if starts is not None:
        starts = starts[..., None, None]
        log_decay = mx.where(starts, LOG_ZERO, log_decay)
        a = mx.where(starts, 0, a)  # a reads the state before its decay
    if state is None:
        state = mx.zeros((B, H, D, D))
    state = state.astype(mx.float32).swapaxes(-1, -2)

    def step(r, log_decay, k, v, a, b, state):
        tokens = r.shape[1]
        r, log_decay, k, v, a, b = (
            to_chunks(x, chunk) for x in (r, log_decay, k, v, a, b)
        )  # [B, H, N, C, D]
        from_start = decay_from_start(log_decay)
        a_from_start = a * decay_from_start(log_decay, inclusive=False)
        ar, bk = mx.stack([a, r * mx.exp(log_decay)]), mx.stack([b, k])
        products = decayed_products(ar[:, None], bk, log_decay, own_decay=False, diagonal=False)
        (a_b, a_k), p = products  # [B, H, N, C, C] each
        p_b, p_k = p + mx.eye(chunk) * mx.sum(r * bk, axis=-1, keepdims=True)
        t = invert_unit_lower(-a_b)
        u, w = t @ (a_k @ v), t @ a_from_start
        b_to_end, k_to_end = (bk * decay_to_end(log_decay)).swapaxes(-1, -2)
        whole = from_start[..., -1:, :].swapaxes(-1, -2)  # [..., D, 1], the decay over the chunk
        f = mx.eye(D) * whole + b_to_end @ w
        states, state = matrix_recurrence(f, b_to_end @ u + k_to_end @ v, state)
        y = (r * from_start + p_b @ w) @ states + p_b @ u + p_k @ v
        return from_chunks(y, tokens).astype(r_dtype), state

    r_dtype = r.dtype
    y, state = in_groups(step, [r, log_decay, k, v, a, b], state, decays_of_channels=True)
    return y, state.swapaxes(-1, -2)
