"""The gated delta rule in chunks, for training."""

import platform
import re
import warnings
from typing import Any

import mlx.core as mx

from nalora_mlx.ops.kernels.backend import backend
from nalora_mlx.ops.kernels.selfcheck import PRODUCT_TOLERANCE
from nalora_mlx.ops.recurrence.chunks import (
    LOG_ZERO,
    chunk_length,
    decay_from_start,
    decay_to_end,
    decayed_products,
    delta_recurrence,
    from_chunks,
    in_groups,
    invert_unit_lower,
    to_chunks,
)


def gated_delta_rule(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    log_decay: mx.array,
    beta: mx.array,
    state: mx.array | None = None,
    starts: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """Return the outputs y_t = S_t q_t of the gated delta rule, and the last state.

        S_t = S_{t-1} diag(g_t) + beta_t (v_t - S_{t-1} diag(g_t) k_t) k_t^T

    In a chunk with the state S before it, and D_ij = g_{j+1} ... g_i, the decay between tokens:

    1. The corrections u_t, for which S_t = S_{t-1} diag(g_t) + u_t k_t^T, solve (I + A) u = beta v - beta (k * D_i0) S
       with A_ij = beta_i (k_i * D_ij) . k_j below the diagonal. With T = (I + A)^-1 diag(beta), u = T v - W S, where
       W = T (k * D_i0).
    2. The outputs are y = (q * D_i0) S + P u with P_ij = (q_i * D_ij) . k_j, on and below the diagonal.
    3. The state after the chunk is D_C0 S + (k * D_Ci)^T u.

    All but u = T v - W S and the next S is computed for all chunks of a group at once.

    Args:
        q: [B, T, Hk, Dk], any float dtype.
        k: [B, T, Hk, Dk].
        v: [B, T, Hv, Dv]; Hk divides Hv, and value head h belongs to key head h // (Hv / Hk).
        log_decay: log g, at most 0; [B, T, Hv], or [B, T, Hv, Dk] for a decay of each key channel.
        beta: [B, T, Hv].
        state: S_0; [B, Hv, Dv, Dk], zeros if None.
        starts: [B, T], True at the first token of each packed row; the state before it is 0. None: nowhere.

    Returns:
        The outputs [B, T, Hv, Dv] in the dtype of q, and the state [B, Hv, Dv, Dk], float32.

    Source: Gated Delta Networks (arXiv 2412.06464), section 3.3; with decays of channels, Kimi Linear (arXiv
    2510.26692).
    """
    (B, _, Hk, Dk), (Hv, Dv) = q.shape, v.shape[2:]
    state = mx.zeros((B, Hv, Dv, Dk)) if state is None else state.astype(mx.float32)
    by_kernel = starts is None and log_decay.ndim == 3 and _kernel_is_usable(Hk, Hv, Dk, Dv)
    log_decay = mx.maximum(log_decay.astype(mx.float32), LOG_ZERO)
    if starts is not None:
        log_decay = mx.where(starts.reshape(*starts.shape, *[1] * (log_decay.ndim - 2)), LOG_ZERO, log_decay)
    rule = _by_kernel if by_kernel else _in_chunks
    arrays = [q, k, v, log_decay, beta]
    return in_groups(rule, arrays, state, decays_of_channels=log_decay.ndim == 4)


def _in_chunks(
    q: mx.array, k: mx.array, v: mx.array, log_decay: mx.array, beta: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    (B, T, Hk, Dk), (Hv, Dv), dtype = q.shape, v.shape[2:], q.dtype
    chunk = chunk_length(T)
    heads = Hk, Hv // Hk  # key heads, and value heads of each
    q, k = (to_chunks(x[:, :, :, None], chunk) for x in (q, k))  # [B, Hk, 1, N, C, Dk]
    v, log_decay, beta = (
        to_chunks(x.reshape(B, T, *heads, -1), chunk) for x in (v, log_decay, beta)
    )  # [B, Hk, Hv / Hk, N, C, ...]
    state = state.reshape(B, *heads, Dv, Dk).swapaxes(-1, -2)
    from_start = decay_from_start(log_decay)
    products = decayed_products(mx.stack([q, k]), k, log_decay)
    p, a = products[0], beta * products[1]  # A is what is below the diagonal
    t = invert_unit_lower(a) * beta.swapaxes(-1, -2)
    k_to_end = k * decay_to_end(log_decay)
    whole = from_start[..., -1:, :].swapaxes(-1, -2)  # [..., 1 or Dk, 1], the decay over the chunk
    u, states, state = delta_recurrence(t @ v, t @ (k * from_start), k_to_end, whole, state)
    y = (q * from_start) @ states + p @ u
    y = from_chunks(y, T).reshape(B, T, Hv, Dv).astype(dtype)
    return y, state.swapaxes(-1, -2).reshape(B, Hv, Dv, Dk)


# MLX's kernel, `mx.fast.gated_delta_update`, has a backward on Metal (MLX 0.32.4). On GPUs without matrix units, those
# before M5, it holds a state for each token, 2 MB with 32 heads, and adds up the gradients of q and k by atomic
# operations, in an order that differs from run to run. On GPUs with matrix units it holds a state for 256 tokens, and
# only the heads that share a key head are added up that way; for two of them the order does not matter. So it is used
# on the latter, for at most two value heads per key head.

KERNEL_CHANNELS = 128
KERNEL_HEADS = {(16, 16), (16, 32), (24, 24), (32, 32)}  # (Hk, Hv)
CHECKED_TOKENS = 270  # more than the kernel has a state for, and no multiple of its chunks

_usable: dict[tuple[int, int], bool] = {}  # by heads: whether the kernel passed its self-check


def _by_kernel(
    q: mx.array, k: mx.array, v: mx.array, log_decay: mx.array, beta: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    # The kernel reads all inputs in one dtype, and in half precision a decay of 0.999 is 1.
    dtype = q.dtype
    q, k, v, decay, beta = (x.astype(mx.float32) for x in (q, k, v, mx.exp(log_decay), beta))
    y, state = mx.fast.gated_delta_update(q, k, v, decay, beta, initial_state=state)
    return y.astype(dtype), state


def _kernel_is_usable(Hk: int, Hv: int, Dk: int, Dv: int) -> bool:
    """Return whether MLX's kernel is used for these heads: where it is a gain and passes its self-check.

    The self-check runs on first use. If it fails, there is one warning, and chunks are used from then on.
    """
    if (Hk, Hv) not in KERNEL_HEADS or (Dk, Dv) != (KERNEL_CHANNELS, KERNEL_CHANNELS):
        return False
    if backend() != "metal" or not _gpu_has_matrix_units() or not hasattr(mx.fast, "gated_delta_update"):
        return False
    if (Hk, Hv) not in _usable:
        error = _find_kernel_error(Hk, Hv)
        _usable[Hk, Hv] = error is None
        if error is not None:
            warnings.warn(
                f"MLX's kernel of the gated delta rule failed its self-check for {Hk} key and {Hv} value heads: "
                f"{error}; MLX's other operations run instead, which is slower",
                stacklevel=3,
            )
    return _usable[Hk, Hv]


def _gpu_has_matrix_units() -> bool:
    """Return whether MLX uses the matrix units of this GPU: from generation 17 and macOS 26.2 on."""
    match = re.search(r"g(\d+)(\w?)$", str(mx.device_info().get("architecture", "")))
    macos = tuple(int(part) for part in platform.mac_ver()[0].split(".")[:2] if part)
    return match is not None and int(match[1]) >= (18 if match[2] == "p" else 17) and macos >= (26, 2)


def _find_kernel_error(Hk: int, Hv: int) -> str | None:
    """Compare the kernel with chunks on small inputs, outputs and gradients. Return what is wrong, or None."""
    keys = iter(mx.random.split(mx.random.key(0), 8))  # leaves MLX's global random state alone

    def normal(*shape: int) -> mx.array:
        return mx.random.normal(shape, key=next(keys))

    T, D = CHECKED_TOKENS, KERNEL_CHANNELS
    q, k, v = normal(1, T, Hk, D), normal(1, T, Hk, D) / D**0.5, normal(1, T, Hv, D)
    arrays = [q, k, v, -mx.exp(normal(1, T, Hv) - 2), mx.sigmoid(normal(1, T, Hv)), normal(1, Hv, D, D)]
    cotangents = [normal(1, T, Hv, D), normal(1, Hv, D, D)]
    with mx.stream(mx.cpu):  # computes matrix products in full float32
        want = mx.vjp(_in_chunks, arrays, cotangents)
    try:
        got = mx.vjp(_by_kernel, arrays, cotangents)
        mx.eval(got)
    except Exception as error:  # compilers and drivers raise anything
        return f"it does not run ({(str(error).splitlines() or [type(error).__name__])[0]})"
    for a, b in zip((*got[0], *got[1]), (*want[0], *want[1]), strict=True):
        relative: Any = (mx.abs(a - b).max() / mx.abs(b).max()).item()
        if not relative <= PRODUCT_TOLERANCE:
            return f"a result is off by {relative:.1e} of the largest value"
    return None
