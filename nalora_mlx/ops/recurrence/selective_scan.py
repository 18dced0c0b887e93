"""The selective scan of Mamba, in chunks, for training."""

import math

import mlx.core as mx

from nalora_mlx.ops.custom_function import custom_function
from nalora_mlx.ops.device_sizes import device_sizes
from nalora_mlx.ops.fast_math import exp_nonpositive
from nalora_mlx.ops.recurrence.chunks import in_groups

MAX_CHUNK = 16  # tokens; those of a chunk follow one another, and the chunks of a group run side by side
SLOWEST = -1e-25  # the rate that stands for 0, so that a step of RESET decays every state to 0
RESET = 1e30


def selective_scan(
    x: mx.array,
    delta: mx.array,
    A: mx.array,
    B: mx.array,
    C: mx.array,
    D: mx.array | None = None,
    state: mx.array | None = None,
    starts: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """Return the outputs of a diagonal state space whose step, input and output depend on the token, and its state.

        h_t = exp(delta_t A) * h_{t-1} + (delta_t x_t) B_t^T
        y_t = h_t C_t + D x_t

    Groups of tokens are recomputed in the backward, so a forward keeps its inputs and one state per group.

    Args:
        x: [batch, T, E], any float dtype.
        delta: step sizes, at least 0; [batch, T, E].
        A: rates, at most 0; [E, N].
        B: [batch, T, N].
        C: [batch, T, N].
        D: [E]; zeros if None.
        state: h_0; [batch, E, N], zeros if None.
        starts: [batch, T], True at the first token of each packed row; the state before it is 0. None: nowhere.

    Returns:
        The outputs [batch, T, E] in the dtype of x, and the state [batch, E, N], float32.

    Source: Mamba (arXiv 2312.00752), section 3.
    """
    (batch, T, E), N = x.shape, A.shape[1]
    length = max(device_sizes().scan_elements // (batch * E * N), 1)
    chunk = min(MAX_CHUNK, max(math.isqrt(length // 2), 1), T)
    length -= length % chunk
    if starts is None:
        starts = mx.zeros((batch, T))
    if D is None:
        D = mx.zeros((E,))
    if state is None:
        state = mx.zeros((batch, E, N))

    def step(x, delta, starts, B, C, A, D, state):
        tokens, dtype = x.shape[1], x.dtype
        x, delta, starts, B, C = (_to_chunks(z, chunk) for z in (x, delta, starts, B, C))
        y, state = _scan(mx.where(starts > 0, RESET, delta), delta * x, A, B, C, state)
        return (y + D * x).reshape(batch, -1, E)[:, :tokens].astype(dtype), state

    # The states are [N, E] in here, so that the long axis is the contiguous one.
    state = state.astype(mx.float32).swapaxes(1, 2)
    shared = [A.astype(mx.float32).T, D.astype(mx.float32)]
    arrays = [x, delta, starts.astype(mx.float32)[..., None], B, C]
    y, state = in_groups(step, arrays, state, shared, length)
    return y, state.swapaxes(1, 2)


def _to_chunks(x: mx.array, chunk: int) -> mx.array:
    """Split tokens into chunks, padded with 0: [B, T, D] -> [B, n, c, D], float32."""
    padding = -x.shape[1] % chunk
    if padding:
        x = mx.pad(x, [(0, 0), (0, padding), (0, 0)])
    return x.astype(mx.float32).reshape(x.shape[0], -1, chunk, x.shape[2])


@custom_function
def _scan(
    step: mx.array, u: mx.array, A: mx.array, B: mx.array, C: mx.array, state: mx.array
) -> list[mx.array]:
    """Compute h_t = exp(step_t A) * h_{t-1} + B_t u_t and y_t = C_t^T h_t.

    1. Run all chunks side by side from a state of 0, token by token. This gives what each chunk adds to the state.
    2. Carry the state from chunk to chunk.
    3. Run all chunks side by side from these states.

    With r_t, the gradient of h_t through later tokens, the gradient is the same kind of recurrence in reverse:

        dh_t = r_t + C_t dy_t
        r_{t-1} = exp(step_t A) * dh_t

    Args:
        step: [B, n, c, E], for the c tokens of n chunks.
        u: [B, n, c, E].
        A: [N, E].
        B: [B, n, c, N].
        C: [B, n, c, N].
        state: h_0; [B, N, E].

    Returns:
        y [B, n, c, E], and the last state [B, N, E].
    """
    states, _ = _states(step, u, A, B, state)
    y = [c @ h for c, h in zip(_tokens(C), states[1:], strict=True)]
    return [mx.concatenate(y, axis=2), states[-1][:, -1]]


@_scan.vjp
def _(primals, cotangents, _outputs):
    step, u, A, B, C, state = primals
    dy, d_state = cotangents
    states, decays = _states(step, u, A, B, state)
    inputs = (_tokens(x) for x in (step, u, B, C, dy))
    tokens = list(zip(*inputs, states[:-1], states[1:], decays, strict=True))[::-1]
    r = mx.zeros_like(states[0])
    if step.shape[1] > 1:
        for *_, c, d, _, _, decay in tokens:
            r = decay * (r + _column(c) * d)
    whole = _decay(mx.sum(step, axis=2, keepdims=True), mx.minimum(A, SLOWEST))
    r = _carry(whole, r, d_state, reverse=True)
    dA, gradients = mx.zeros_like(A), []
    for s, v, b, c, d, before, after, decay in tokens:
        dh = r + _column(c) * d
        r = decay * dh
        d_exponent = r * before  # of step_t A
        dA = dA + mx.sum(d_exponent * s, axis=(0, 1))
        d_step = mx.sum(d_exponent * A, axis=2, keepdims=True)
        gradients.append((d_step, b @ dh, v @ dh.swapaxes(2, 3), d @ after.swapaxes(2, 3)))
    d_step, du, dB, dC = (mx.concatenate(list(d), axis=2) for d in zip(*gradients[::-1], strict=True))
    return d_step, du, dA, dB, dC, r[:, 0]


def _states(
    step: mx.array, u: mx.array, A: mx.array, B: mx.array, state: mx.array
) -> tuple[list[mx.array], list[mx.array]]:
    """Return the states before each token of the chunks and after the last, c + 1 times [B, n, N, E], and decays."""
    rates = mx.minimum(A, SLOWEST)
    tokens = [
        (_decay(s, rates), _column(b), v) for s, v, b in zip(*(_tokens(x) for x in (step, u, B)), strict=True)
    ]
    h = mx.zeros((*u.shape[:2], *A.shape))
    if u.shape[1] > 1:
        for decay, b, v in tokens:
            h = decay * h + b * v
    states = [_carry(_decay(mx.sum(step, axis=2, keepdims=True), rates), h, state)]
    for decay, b, v in tokens:
        states.append(decay * states[-1] + b * v)
    return states, [decay for decay, *_ in tokens]


def _carry(decay: mx.array, added: mx.array, state: mx.array, reverse: bool = False) -> mx.array:
    """Return the state that enters each chunk, or, in reverse, leaves it.

    Args:
        decay: over each chunk, [B, n, N, E].
        added: by each chunk to the state that enters it, [B, n, N, E].
        state: that enters the first, or leaves the last; [B, N, E].
    """
    order = range(decay.shape[1])[:: -1 if reverse else 1]
    states = [state[:, None]]
    for i in order[:-1]:
        states.append(decay[:, i : i + 1] * states[-1] + added[:, i : i + 1])
    return mx.concatenate(states[:: -1 if reverse else 1], axis=1)


def _decay(step: mx.array, rates: mx.array) -> mx.array:
    """Return exp(step rates): [B, n, 1, E] -> [B, n, N, E]."""
    return exp_nonpositive(step * rates)


def _tokens(x: mx.array) -> list[mx.array]:
    """Return each token of the chunks: [B, n, c, D] -> c times [B, n, 1, D]."""
    return [x[:, :, t : t + 1] for t in range(x.shape[2])]


def _column(x: mx.array) -> mx.array:
    return x.swapaxes(2, 3)
