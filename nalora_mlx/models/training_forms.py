"""Training forms of functions of mlx-lm and mlx-vlm, with the signatures of the originals.

Each computes what the original computes, with a few operations per chunk instead of many per token. In a packed batch,
each also resets its state at the first token of a row. They are used for whole sequences with an empty cache only,
because training never continues a sequence.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from nalora_mlx.ops.recurrence.causal_convolution import causal_convolution
from nalora_mlx.ops.recurrence.gated_delta import gated_delta_rule
from nalora_mlx.ops.recurrence.linear_attention import linear_attention, state_space_duality
from nalora_mlx.ops.recurrence.rwkv7 import rwkv7
from nalora_mlx.ops.recurrence.segments import current_segment_ids, row_starts
from nalora_mlx.ops.recurrence.selective_scan import selective_scan

_MLX_LM, _MLX_VLM = "mlx_lm.models", "mlx_vlm.models"
_argpartition = mx.argpartition


def gated_delta_update(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    a: mx.array,
    b: mx.array,
    A_log: mx.array,
    dt_bias: mx.array,
    state: mx.array | None = None,
    mask: mx.array | None = None,
    *,
    use_kernel: bool = True,
    lower_bound: float | None = None,
    allow_neg_eigval: bool = False,
    cache: None = None,
) -> tuple[mx.array, mx.array]:
    """Compute gated_delta_update of mlx-lm and mlx-vlm in chunks; see `gated_delta_rule`."""
    beta = mx.sigmoid(b) * (2 if allow_neg_eigval else 1)
    rate = mx.exp(A_log.astype(mx.float32))
    if lower_bound is None:
        log_decay = -rate * nn.softplus(a + dt_bias)
    else:
        log_decay = lower_bound * mx.sigmoid(rate * (a.astype(mx.float32) + dt_bias))
    if mask is not None:  # masked tokens leave the state unchanged
        beta = mx.where(mask[..., None], beta, 0)
        log_decay = mx.where(mask.reshape(*mask.shape, *(1,) * (log_decay.ndim - 2)), log_decay, 0)
    return gated_delta_rule(q, k, v, log_decay, beta, state, row_starts())


def ssm_update(
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
) -> tuple[mx.array, mx.array]:
    """Compute ssm_update of mlx-lm and mlx-vlm, the recurrence of Mamba-2, in chunks; see `state_space_duality`."""
    return state_space_duality(
        hidden_states, A_log, B, C, D, dt, dt_bias, state, time_step_limit, mask, starts=row_starts()
    )


def recurrent_gla(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    g: mx.array,
    scale: float,
    h: mx.array | None = None,
    mask: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """Compute recurrent_gla of mlx_lm.models.bailing_hybrid in chunks; see `linear_attention`.

    Args:
        q: [B, H, L, K].
        k: [B, H, L, K].
        v: [B, H, L, V].
        g: log decay of each head; [H].
        scale: factor on the outputs.
        h: state; [B, H, K, V].
        mask: [B, L], False for tokens that leave the state unchanged.
    """
    q, k, v = (x.swapaxes(1, 2) for x in (q * scale, k, v))
    log_decay = mx.broadcast_to(g, q.shape[:3])
    if mask is not None:
        k = mx.where(mask[..., None, None], k, 0)
        log_decay = mx.where(mask[..., None], log_decay, 0)
    state = None if h is None else h.swapaxes(-1, -2)
    y, state = linear_attention(q, k, v, log_decay, state, row_starts())
    return y.swapaxes(1, 2), state.swapaxes(-1, -2)


def mamba_process_sequence(
    block: Any, x: mx.array, conv_cache: mx.array | None, state_cache: mx.array | None
) -> tuple[mx.array, tuple[mx.array, mx.array]]:
    """Compute MambaBlock._process_sequence of mlx_lm.models.mamba in chunks; see `selective_scan`."""
    x, z = block.in_proj(x).split(2, axis=-1)
    history = block.conv_kernel_size - 1
    if conv_cache is None:
        padded = mx.pad(x, [(0, 0), (history, 0), (0, 0)])
    else:
        padded = mx.concatenate([conv_cache, x], axis=1)
    x = nn.silu(block.conv1d(padded))
    sizes = [block.time_step_rank, block.time_step_rank + block.ssm_state_size]
    delta, b, c = mx.split(block.x_proj(x), sizes, axis=-1)
    if block.use_bcdt_rms:
        delta, b, c = (mx.fast.rms_norm(part, None, block.args.mixer_rms_eps) for part in (delta, b, c))
    delta = nn.softplus(block.dt_proj(delta))
    a = -mx.exp(block.A_log)
    x = x.astype(mx.result_type(x, a))  # as in the original, if only the decays are float32
    y, state = selective_scan(x, delta, a, b, c, block.D, state_cache, row_starts())
    return block.out_proj(nn.silu(z) * y), (padded[:, -history:], state)


def jamba_ssm_step(
    mixer: Any, x: mx.array, A: mx.array, state: mx.array | None = None
) -> tuple[mx.array, mx.array]:
    """Compute JambaMambaMixer.ssm_step of mlx_lm.models.jamba in chunks; see `selective_scan`."""
    sizes = [mixer.time_step_rank, mixer.time_step_rank + mixer.ssm_state_size]
    delta, b, c = mx.split(mixer.x_proj(x), sizes, axis=-1)
    delta = nn.softplus(mixer.dt_proj(mixer.dt_layernorm(delta)))
    b, c = mixer.b_layernorm(b), mixer.c_layernorm(c)
    return selective_scan(x, delta, A, b, c, mixer.D, state, row_starts())


def rwkv7_recurrence(
    mixing: Any,
    r: mx.array,
    w: mx.array,
    k: mx.array,
    v: mx.array,
    a: mx.array,
    b: mx.array,
    state: mx.array | None,
) -> tuple[mx.array, mx.array]:
    """Compute Rwkv7TimeMixing._wkv7 of mlx_lm.models.rwkv7 in chunks; see `rwkv7`."""
    return rwkv7(r, mx.log(w.astype(mx.float32)), k, v, a, b, state, row_starts())


def rwkv7_token_shift(shift: Any, x: mx.array, state: mx.array | None) -> mx.array:
    """Compute TokenShift of mlx_lm.models.rwkv7: each token's predecessor in its row, 0 for the first token."""
    first = mx.zeros((x.shape[0], 1, x.shape[2]), x.dtype) if state is None else state
    shifted = mx.concatenate([first, x[:, :-1]], axis=1)
    starts = row_starts()
    return shifted if starts is None else mx.where(starts[..., None], 0, shifted)


def constant_argpartition(*args: Any, **kwargs: Any) -> mx.array:
    """Compute mx.argpartition without a gradient. The gradient of indices raises an error in DeepSeek V4.1."""
    return mx.stop_gradient(_argpartition(*args, **kwargs))


def packed_convolution(convolution: nn.Conv1d, x: mx.array) -> mx.array:
    """Compute nn.Conv1d.__call__ for a depthwise causal convolution; see `causal_convolution`."""
    return causal_convolution(x, convolution.weight, convolution.get("bias"), current_segment_ids())


class TrainingForm(NamedTuple):
    """The replacement for a function, a method, or a Metal kernel without a gradient.

    Attributes:
        module: the module with the original. A function is replaced wherever it was imported.
        name: the original's name, such as ssm_update or MambaBlock._process_sequence.
        replacement: the function to call instead. None removes a kernel; the model then uses plain operations.
        compared: whether to compare outputs and gradients with the original's before use.
    """

    module: str
    name: str
    replacement: Callable[..., Any] | None
    compared: bool = True


TRAINING_FORMS = (
    TrainingForm(f"{_MLX_LM}.gated_delta", "gated_delta_update", gated_delta_update),
    TrainingForm(f"{_MLX_LM}.ssm", "ssm_update", ssm_update),
    TrainingForm(f"{_MLX_LM}.bailing_moe_linear", "recurrent_gla", recurrent_gla),
    TrainingForm(f"{_MLX_LM}.bailing_hybrid", "recurrent_gla", recurrent_gla),
    TrainingForm(f"{_MLX_LM}.mamba", "MambaBlock._process_sequence", mamba_process_sequence),
    TrainingForm(f"{_MLX_LM}.jamba", "JambaMambaMixer.ssm_step", jamba_ssm_step),
    TrainingForm(f"{_MLX_LM}.rwkv7", "Rwkv7TimeMixing._wkv7", rwkv7_recurrence),
    TrainingForm(f"{_MLX_LM}.rwkv7", "TokenShift.__call__", rwkv7_token_shift),
    TrainingForm(f"{_MLX_LM}.deepseek_v41", "_sinkhorn_kernel", None, compared=False),
    TrainingForm(f"{_MLX_LM}.deepseek_v41", "mx.argpartition", constant_argpartition, compared=False),
    TrainingForm(f"{_MLX_LM}.kimi_k3", "_attn_res_kernel", None, compared=False),
    TrainingForm(f"{_MLX_VLM}.gated_delta", "gated_delta_update", gated_delta_update),
    TrainingForm(f"{_MLX_VLM}.qwen3_5.gated_delta", "gated_delta_update", gated_delta_update),
    TrainingForm(f"{_MLX_VLM}.ssm", "ssm_update", ssm_update),
)
