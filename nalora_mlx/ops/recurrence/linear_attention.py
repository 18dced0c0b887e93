"""Linear attention with one decay per head, in chunks, for training. Mamba-2 is a special case."""

import mlx.core as mx

from nalora_mlx.ops.custom_function import custom_function
from nalora_mlx.ops.recurrence.chunks import (
    LOG_ZERO,
    chunk_length,
    decay_from_start,
    decay_to_end,
    decayed_products,
    from_chunks,
    in_groups,
    to_chunks,
)


def linear_attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    log_decay: mx.array,
    state: mx.array | None = None,
    starts: mx.array | None = None,
    beta: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """Return the outputs y_t = S_t q_t of linear attention with decay, and the last state.

        S_t = g_t S_{t-1} + beta_t v_t k_t^T

    S is the state before a chunk of C tokens, and D_ij = g_{j+1} ... g_i is the decay from token j to token i:

    1. The outputs are y_i = D_i0 S q_i + sum_{j <= i} D_ij (q_i . k_j) beta_j v_j.
    2. The state after the chunk is D_C0 S + sum_j D_Cj beta_j v_j k_j^T.

    Only the recurrence of step 2 runs chunk by chunk; the rest is computed for many chunks at once. The heads of a
    group share q and k, so products with states are those of one head with H / G times as many value channels.

    Args:
        q: [B, T, G, Dk], any float dtype.
        k: [B, T, G, Dk].
        v: [B, T, H, Dv]; G divides H, and head h belongs to group h // (H / G).
        log_decay: log g, at most 0; [B, T, H], or [H] for the same decay at all tokens.
        state: S_0; [B, H, Dv, Dk], zeros if None.
        starts: [B, T], True at the first token of each packed row; the state before it is 0. None: nowhere.
        beta: [B, T, H], ones if None.

    Returns:
        The outputs [B, T, H, Dv] in the dtype of q, and the state [B, H, Dv, Dk], float32.

    Source: Transformers are SSMs (arXiv 2405.21060), section 6.
    """
    (B, T, G, Dk), (H, Dv), dtype = q.shape, v.shape[2:], q.dtype
    R = H // G  # heads per group
    chunk = chunk_length(T)
    log_decay = mx.broadcast_to(mx.maximum(log_decay.astype(mx.float32), LOG_ZERO), (B, T, H))
    if starts is not None:
        log_decay = mx.where(starts[..., None], LOG_ZERO, log_decay)
    if beta is None:
        beta = mx.ones((B, T, H))
    if state is None:
        state = mx.zeros((B, H, Dv, Dk))
    state = mx.moveaxis(state.astype(mx.float32).reshape(B, G, R, Dv, Dk), -1, 2)

    def step(q, k, v, log_decay, beta, state):
        tokens = q.shape[1]
        q, k = to_chunks(q, chunk), to_chunks(k, chunk)  # [B, G, N, C, Dk]
        log_decay, beta = (to_chunks(x.reshape(B, tokens, G, R), chunk) for x in (log_decay, beta))
        v = to_chunks(v.reshape(B, tokens, G, R * Dv), chunk)
        v = v.reshape(*v.shape[:-1], R, Dv) * beta[..., None]  # [B, G, N, C, R, Dv]
        from_start = decay_from_start(log_decay)  # [B, G, N, C, R]
        v_to_end = (v * decay_to_end(log_decay)[..., None]).flatten(-2)
        z = (k.swapaxes(-1, -2) @ v_to_end).reshape(B, G, -1, Dk, R, Dv)
        states, state = decayed_sums(from_start[..., -1, None, :, None], z, state)
        p = decayed_products(q[..., None, :, :], k[..., None, :, :], log_decay.swapaxes(-1, -2)[..., None])
        within = (p @ v.swapaxes(-2, -3)).swapaxes(-2, -3)  # [B, G, N, C, R, Dv]
        y = (q @ states.flatten(-2)).reshape(v.shape) * from_start[..., None] + within
        return from_chunks(y.flatten(-2), tokens).reshape(B, tokens, H, Dv).astype(dtype), state

    y, state = in_groups(step, [q, k, v, log_decay, beta], state)
    return y, mx.moveaxis(state, 2, -1).reshape(B, H, Dv, Dk)


def state_space_duality(
    hidden_states: mx.array,
    A_log: mx.array,
    B: mx.array,
    C: mx.array,
    D: mx.array,
    dt: mx.array,
    dt_bias: mx.array,
    state: mx.array | None = None,
    time_step_limit: tuple[float, float] = (0.001, 100.0),
    mask: mx.array | None = None,
    lengths: mx.array | None = None,
    starts: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """Return the outputs y_t = S_t C_t + D x_t of the state space model of Mamba-2, and the last state.

        S_t = exp(-exp(A_log) dt_t) S_{t-1} + dt_t x_t B_t^T

    The arguments, except `starts`, and the dtypes of the results are those of `ssm_update` in mlx-lm. Outputs at masked
    tokens are undefined.

    Args:
        hidden_states: x; [B, T, H, Dv].
        A_log: [H].
        B: [B, T, G, Dk]; G divides H.
        C: [B, T, G, Dk].
        D: [H].
        dt: step sizes before their bias, softplus and limits; [B, T, H].
        dt_bias: [H].
        state: S_0; [B, H, Dv, Dk], zeros if None.
        time_step_limit: the smallest and the largest step size.
        mask: [B, T], False at tokens that leave the state unchanged.
        lengths: [B], the number of tokens of each sequence; later positions leave the state unchanged.
        starts: [B, T], True at the first token of each packed row; the state before it is 0. None: nowhere.

    Returns:
        The outputs [B, T, H, Dv], and the state [B, H, Dv, Dk], float32.
    """
    dt = mx.clip(mx.logaddexp(dt.astype(mx.float32) + dt_bias, 0), *time_step_limit)
    if lengths is not None:
        present = mx.arange(dt.shape[1]) < lengths[:, None]
        mask = present if mask is None else mx.logical_and(mask, present)
    if mask is not None:
        dt = mx.where(mask[..., None], dt, 0)  # no decay and no input
    log_decay = dt * -mx.exp(A_log).astype(mx.float32)
    y, state = linear_attention(C, B, hidden_states, log_decay, state, starts, beta=dt)
    return y.astype(hidden_states.dtype) + hidden_states * D[:, None], state


@custom_function
def decayed_sums(decay: mx.array, z: mx.array, state: mx.array) -> list[mx.array]:
    """Compute S_{n+1} = decay_n S_n + Z_n.

    The gradient is dS_n = decay_n dS_{n+1} + dY_n, the same recurrence backwards, dZ_n = dS_{n+1} and
    d decay_n = dS_{n+1} . S_n, where dY are the gradients of the returned states.

    Args:
        decay: [B, G, N, 1, R, 1].
        z: [B, G, N, Dk, R, Dv].
        state: S_0; [B, G, Dk, R, Dv].

    Returns:
        S_0 to S_{N-1}, [B, G, N, Dk, R, Dv], and S_N, [B, G, Dk, R, Dv].
    """
    states = []
    for n in range(z.shape[2]):
        states.append(state)
        state = decay[:, :, n] * state + z[:, :, n]
    return [mx.stack(states, axis=2), state]


@decayed_sums.vjp
def _(primals, cotangents, outputs):
    decay = primals[0]
    d_states, d_state = cotangents
    after = []
    for n in reversed(range(decay.shape[2])):
        after.append(d_state)
        d_state = decay[:, :, n] * d_state + d_states[:, :, n]
    dz = mx.stack(after[::-1], axis=2)
    return (dz * outputs[0]).sum(axis=(3, 5), keepdims=True), dz, d_state
