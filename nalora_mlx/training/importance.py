"""Temporal importance of gate channels, the mask and the step scales: pure functions (state, observation) -> state.

Per adapted layer and gate channel c, over the tokens n of an optimizer step with weights w_n,

    d_c(t) = sum_n w_n |phi'(z_{n,c})| / sum_n w_n
    s_c(t) = beta s_c(t-1) + (1 - beta) d_c(t),   bias-corrected by 1 - beta^k
    m_c(t) = rule(s(t))                           mechanism 1, the mask
    g_c(t) = sum_R p_{R,c}(t) gamma_R             mechanism 2, the step scale; p smoothed like s
    q_c(t) = preserve(min(m_c g_c, max_multiplier))

All reductions over channels are over the last axis, so that a vector per expert, [E, F] with counts [E], needs
nothing of its own. Every function works on plain dicts of float32 arrays and traces under mx.compile.
Source: NA-LoRA (arXiv 2606.31717) in the reading that the README states.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import mlx.core as mx

if TYPE_CHECKING:
    from nalora_mlx.core.config import NAParameters

# What a layer's forward saw, summed over tokens (and over micro-batches, experts apart):
#   tokens          sum w                                        [...]
#   responsiveness  sum w |phi'(z)|, or sum w |phi'(z) u|        [..., F]
#   above_boundary          sum w [z above boundary i], R - 1 rows       [R-1, ..., F]   (absent without a partition)
#   misalignment    sums of the diagnostic, see `misalignment`   [2]             (only where it is measured)
WEAK = 0.1  # a mask below this leaves a channel hardly any step
Observation = dict[str, mx.array]
LayerState = dict[str, mx.array]


def init(shape: tuple[int, ...], regions: int, self_gated: bool = True) -> LayerState:
    """Make the state of a layer that has seen nothing; shape [..., F], regions R (0 without a partition)."""
    state = {
        "importance": mx.zeros(shape),  # [..., F] raw average; divide by 1 - beta^k to read it
        "updates": mx.zeros(shape[:-1]),  # [...] k, the number of updates that this vector has had
        "mask": mx.ones(shape),  # [..., F] m as last computed
    }
    if regions:
        state["above_boundary"] = mx.zeros(
            (regions - 1, *shape)
        )  # raw average of the share above each boundary
    if self_gated:
        state["misalignment"] = mx.zeros(2)  # as last measured: a diagnostic, never smoothed
    return state


def observe(state: LayerState, seen: Observation, beta: float) -> LayerState:
    """Fold one optimizer step's observation into the state; a vector that saw no token keeps all of it.

    s <- beta s + (1 - beta) d with d = responsiveness / tokens, and the same for the partition's shares.
    """
    tokens = seen["tokens"].astype(mx.float32)  # [...]
    any_token = tokens > 0
    count = mx.where(any_token, tokens, 1)[..., None]  # [..., 1]

    def average(old: mx.array, total: mx.array) -> mx.array:
        return mx.where(any_token[..., None], beta * old + (1 - beta) * (total / count), old)

    new = dict(state)
    new["importance"] = average(state["importance"], seen["responsiveness"])
    new["updates"] = state["updates"] + any_token.astype(mx.float32)
    if "above_boundary" in state:
        new["above_boundary"] = average(state["above_boundary"], seen["above_boundary"])
    return new


def _correction(state: LayerState, beta: float) -> mx.array:
    """1 - beta^k, and 1 where nothing was seen yet, so that a zero average stays zero; [..., 1]."""
    updates = state["updates"][..., None]
    return mx.where(updates > 0, 1 - mx.power(beta, updates), 1)


def importance(state: LayerState, beta: float) -> mx.array:
    """Bias-corrected temporal importance s_c; [..., F], float32."""
    return state["importance"] / _correction(state, beta)


def occupancy(state: LayerState, beta: float) -> mx.array:
    """Smoothed fraction p_{R,c} of tokens in each region of the partition; [R, ..., F], sums to 1 over R."""
    above_boundary = state["above_boundary"] / _correction(state, beta)  # [R-1, ..., F], decreasing in R
    edge = mx.ones_like(above_boundary[:1])
    upper = mx.concatenate([above_boundary, mx.zeros_like(edge)])
    return mx.concatenate([edge, above_boundary]) - upper


def mask(s: mx.array, parameters: NAParameters) -> mx.array:
    """Multipliers m = rule(s) of the channels' steps; [..., F], all 1 for a layer whose s is all zero.

    soft: m = s / mean_c(s).  hard: 1 for the top keep_fraction of the channels (at least one), else 0; of equal
    channels the first is kept.  off: 1.
    """
    if parameters.mask == "off":
        return mx.ones_like(s)
    if parameters.mask == "soft":
        mean = mx.mean(s, axis=-1, keepdims=True)
        return mx.where(mean > 0, s / mx.where(mean > 0, mean, 1), 1)
    channels = s.shape[-1]
    keep = max(1, round(parameters.keep_fraction * channels))
    # Rank by a stable sort, not by a threshold, so that ties cannot keep more channels than asked.
    rank = mx.argsort(mx.argsort(-s, axis=-1), axis=-1)
    any_response = mx.any(s > 0, axis=-1, keepdims=True)
    return mx.where(any_response, (rank < keep).astype(s.dtype), 1)


def refresh(state: LayerState, step: mx.array, parameters: NAParameters) -> LayerState:
    """Recompute the mask where step t says so: none in the warm-up, then at its end and every mask_every steps.

    `step` is t, counted from 1, an integer scalar.
    """
    if parameters.mask == "off":
        return state
    after = step - (parameters.mask_warmup + 1)  # 0 at the first masked step
    due = mx.logical_and(after >= 0, after % parameters.mask_every == 0)
    fresh = mask(importance(state, parameters.beta), parameters)
    return {**state, "mask": mx.where(due, fresh, state["mask"])}


def step_scale(state: LayerState, parameters: NAParameters) -> mx.array | None:
    """g_c = sum_R p_{R,c} gamma_R, or None where the layer has no partition or the rule is off; [..., F].

    A partition of two regions (dead, homogeneous) takes the first and the last gamma.
    """
    if not parameters.step_scaling or "above_boundary" not in state:
        return None
    p = occupancy(state, parameters.beta)  # [R, ..., F]
    gamma = parameters.gamma if p.shape[0] == 3 else (parameters.gamma[0], parameters.gamma[-1])
    return sum((p[i] * g for i, g in enumerate(gamma)), mx.zeros(p.shape[1:]))


def sparsity(mask: mx.array) -> mx.array:
    """Share of channels that hardly move: m below 0.1 (of a hard mask, those at 0); a scalar."""
    return mx.mean((mask < WEAK).astype(mx.float32))


def effective_share(mask: mx.array) -> mx.array:
    """Share of channels over which a mask spreads: (sum m)^2 / (F sum m^2), the mean of the experts; a scalar.

    1 if all channels have the same m, k if a share k of them has it and the others 0.
    """
    return mx.mean(mx.square(mx.mean(mask, axis=-1)) / mx.mean(mx.square(mask), axis=-1))


def multiplier(state: LayerState, parameters: NAParameters) -> mx.array:
    """The factor q_c of each channel's optimizer step; [..., F].

    q = min(m g, max_multiplier), then per layer (or expert):
    rms: mean_c q^2 = 1.  mean: mean_c q = 1.  function: sum_c q_c s_c = sum_c s_c.  none: as it is.
    """
    q = state["mask"]
    scale = step_scale(state, parameters)
    if scale is not None:
        q = q * scale
    q = mx.minimum(q, parameters.max_multiplier)
    if parameters.preserve == "none":
        return q
    if parameters.preserve == "rms":
        norm = mx.sqrt(mx.mean(mx.square(q), axis=-1, keepdims=True))
    elif parameters.preserve == "mean":
        norm = mx.mean(q, axis=-1, keepdims=True)
    else:
        s = importance(state, parameters.beta)
        total = mx.sum(s, axis=-1, keepdims=True)
        # Without any response the first-order change is zero under every q: keep the mean instead.
        weights = mx.where(total > 0, s / mx.where(total > 0, total, 1), 1 / s.shape[-1])
        norm = mx.sum(q * weights, axis=-1, keepdims=True)
    return mx.where(norm > 0, q / mx.where(norm > 0, norm, 1), q)


def misalignment(seen: Mapping[str, mx.array]) -> mx.array:
    """Selection misalignment SM = selection / (feature + selection) of summed observations, in [0, 1]; 0 for 0/0.

    With delta = z - z0: feature = sum |delta rho(z0) u|, selection = sum |z (rho(z) - rho(z0)) u|, the selection
    change weighted with the new z.
    """
    feature, selection = seen["misalignment"][0], seen["misalignment"][1]
    total = feature + selection
    return mx.where(total > 0, selection / mx.where(total > 0, total, 1), 0)
