"""Temporal importance of gate channels, and the mask and step scales that follow from it.

For each adapted layer and gate channel c, over the tokens n of an optimizer update t with weights w_n:

1. Responsiveness:  d_c(t) = sum_n w_n |phi'(z_{n,c})| / sum_n w_n
2. Importance:      s_c(t) = beta s_c(t-1) + (1 - beta) d_c(t), bias-corrected by 1 - beta^k after k updates
3. Mask:            m_c(t) = rule(s(t))
4. Step scale:      g_c(t) = sum_R p_{R,c}(t) gamma_R, with the share p of tokens in region R smoothed like s
5. Multiplier:      q_c(t) = preserve(min(m_c g_c, max_multiplier))

All functions are pure: they take a state and return a new one, on float32 arrays, and trace under mx.compile. Channels
are the last axis, so layers with experts, [E, F] with token counts [E], need no code of their own.

Source: NA-LoRA (arXiv 2606.31717), in the reading that docs/method.md states.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import mlx.core as mx

from nalora_mlx.core.config import NAParameters

WEAK = 0.1  # channels with a mask below this hardly move
FILE_NAMES = {"above_boundary": "beyond"}  # fields of LayerState with another name in checkpoints


class LayerStatistics(NamedTuple):
    """Sums over the tokens of a layer's forward passes, with token weights w."""

    responsiveness: mx.array  # sum w |phi'(z)|, or sum w |phi'(z) u|; [..., F]
    above_boundary: mx.array | None = None  # sum w [z > boundary i]; [R-1, ..., F], None without a partition
    # sum w; [E] or []. None for layers that see every token: their count is kept once, as mx.compile fails on equal
    # outputs.
    tokens: mx.array | None = None

    def add(self, other: "LayerStatistics") -> "LayerStatistics":
        """Return the sums over the tokens of both."""
        pairs: Any = zip(self, other, strict=True)
        sums: Any = (None if one is None else one + two for one, two in pairs)
        return LayerStatistics(*sums)


class LayerState(NamedTuple):
    """What a layer keeps from update to update."""

    importance: mx.array  # uncorrected average; divide by 1 - beta^k to read it; [..., F]
    updates: mx.array  # k, the number of updates with tokens; []  or [E]
    mask: mx.array  # m as last computed; [..., F]
    above_boundary: mx.array | None = None  # uncorrected average share of tokens; [R-1, ..., F]
    misalignment: mx.array | None = None  # feature and selection sums as last measured, never smoothed; [2]


def init(shape: tuple[int, ...], regions: int, self_gated: bool = True) -> LayerState:
    """Return the state before the first update.

    Args:
        shape: [..., F], of a value per gate channel.
        regions: R, regions of the activation's partition; 0 without one.
        self_gated: whether the activation has a selection weight, so that misalignment is defined.
    """
    return LayerState(
        importance=mx.zeros(shape),
        updates=mx.zeros(shape[:-1]),
        mask=mx.ones(shape),
        above_boundary=mx.zeros((regions - 1, *shape)) if regions else None,
        misalignment=mx.zeros(2) if self_gated else None,
    )


def observe(state: LayerState, statistics: LayerStatistics, beta: float) -> LayerState:
    """Fold the statistics of one update into the averages.

    s <- beta s + (1 - beta) d with d = responsiveness / tokens, and likewise for the shares above each boundary.
    Experts without tokens keep their state.
    """
    assert statistics.tokens is not None
    tokens = statistics.tokens.astype(mx.float32)  # [...]
    any_token = tokens > 0
    count = mx.where(any_token, tokens, 1)[..., None]  # [..., 1]

    def average(old: mx.array, total: mx.array) -> mx.array:
        return mx.where(any_token[..., None], beta * old + (1 - beta) * (total / count), old)

    new = state._replace(
        importance=average(state.importance, statistics.responsiveness),
        updates=state.updates + any_token.astype(mx.float32),
    )
    if state.above_boundary is not None and statistics.above_boundary is not None:
        new = new._replace(above_boundary=average(state.above_boundary, statistics.above_boundary))
    return new


def _bias_correction(state: LayerState, beta: float) -> mx.array:
    """Return 1 - beta^k, or 1 before the first update so that a zero average stays zero; [..., 1]."""
    updates = state.updates[..., None]
    return mx.where(updates > 0, 1 - mx.power(beta, updates), 1)


def importance(state: LayerState, beta: float) -> mx.array:
    """Return the bias-corrected importance s; [..., F], float32."""
    return state.importance / _bias_correction(state, beta)


def occupancy(state: LayerState, beta: float) -> mx.array:
    """Return the smoothed share p_{R,c} of tokens in each region of the partition; [R, ..., F], sums to 1 over R."""
    assert state.above_boundary is not None
    above = state.above_boundary / _bias_correction(state, beta)  # [R-1, ..., F], decreasing in R
    ones = mx.ones_like(above[:1])
    upper = mx.concatenate([above, mx.zeros_like(ones)])
    return mx.concatenate([ones, above]) - upper


def mask(s: mx.array, parameters: NAParameters) -> mx.array:
    """Return the mask m = rule(s); [..., F], all ones for a layer whose importance is all zero.

    soft: m = s / mean_c(s).  hard: 1 for the top `keep_fraction` of the channels (at least one), else 0; among equal
    channels the first are kept.  off: 1.
    """
    if parameters.mask == "off":
        return mx.ones_like(s)
    if parameters.mask == "soft":
        mean = mx.mean(s, axis=-1, keepdims=True)
        return mx.where(mean > 0, s / mx.where(mean > 0, mean, 1), 1)
    channels = s.shape[-1]
    keep = max(1, round(parameters.keep_fraction * channels))
    # Ranks from a stable sort, not a threshold: ties must not keep more channels than asked.
    rank = mx.argsort(mx.argsort(-s, axis=-1), axis=-1)
    any_response = mx.any(s > 0, axis=-1, keepdims=True)
    return mx.where(any_response, (rank < keep).astype(s.dtype), 1)


def refresh(state: LayerState, step: mx.array, parameters: NAParameters) -> LayerState:
    """Recompute the mask if it is due: first after the warm-up, then every `mask_every` updates.

    Args:
        state: of a layer.
        step: t, the number of this update from 1; an integer scalar.
        parameters: the NA settings.
    """
    if parameters.mask == "off":
        return state
    after = step - (parameters.mask_warmup + 1)  # 0 at the first masked update
    due = mx.logical_and(after >= 0, after % parameters.mask_every == 0)
    new = mask(importance(state, parameters.beta), parameters)
    return state._replace(mask=mx.where(due, new, state.mask))


def step_scale(state: LayerState, parameters: NAParameters) -> mx.array | None:
    """Return g_c = sum_R p_{R,c} gamma_R; [..., F], or None without a partition or with step scaling off.

    A partition of two regions (dead, homogeneous) uses the first and the last gamma.
    """
    if not parameters.step_scaling or state.above_boundary is None:
        return None
    p = occupancy(state, parameters.beta)  # [R, ..., F]
    gamma = parameters.gamma if p.shape[0] == 3 else (parameters.gamma[0], parameters.gamma[-1])
    return sum((p[i] * g for i, g in enumerate(gamma)), mx.zeros(p.shape[1:]))


def multiplier(state: LayerState, parameters: NAParameters) -> mx.array:
    """Return the factor q_c on each channel's optimizer step; [..., F].

    q = min(m g, max_multiplier), then normalized per layer (or expert) as `preserve` says:
    rms: mean_c q^2 = 1.  mean: mean_c q = 1.  function: sum_c q_c s_c = sum_c s_c.  none: not at all.
    """
    q = state.mask
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
        # Without any response the first-order change is zero for every q: preserve the mean instead.
        weights = mx.where(total > 0, s / mx.where(total > 0, total, 1), 1 / s.shape[-1])
        norm = mx.sum(q * weights, axis=-1, keepdims=True)
    return mx.where(norm > 0, q / mx.where(norm > 0, norm, 1), q)


def sparsity(mask: mx.array) -> mx.array:
    """Return the share of channels with a mask below 0.1, which hardly move; a scalar."""
    return mx.mean((mask < WEAK).astype(mx.float32))


def effective_share(mask: mx.array) -> mx.array:
    """Return the participation ratio (sum m)^2 / (F sum m^2) of a mask, averaged over experts; a scalar.

    It is 1 if all channels have the same mask, and k if a share k of them has it and the others have 0.
    """
    return mx.mean(mx.square(mx.mean(mask, axis=-1)) / mx.mean(mx.square(mask), axis=-1))


def misalignment(sums: mx.array) -> mx.array:
    """Return selection misalignment, selection / (feature + selection), in [0, 1]; 0 for 0/0.

    With delta = z - z0: feature = sum |delta rho(z0) u|, selection = sum |z (rho(z) - rho(z0)) u|, so the change of the
    selection is weighted with the new z.

    Args:
        sums: feature and selection; [2].
    """
    feature, selection = sums[0], sums[1]
    total = feature + selection
    return mx.where(total > 0, selection / mx.where(total > 0, total, 1), 0)


def to_tree(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the importance state of a training step as nested dicts of arrays, for a checkpoint."""
    return dict(state) | {
        "layers": {
            path: {
                FILE_NAMES.get(name, name): array
                for name, array in layer._asdict().items()
                if array is not None
            }
            for path, layer in state["layers"].items()
        },
    }


def from_tree(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the importance state that `to_tree` wrote."""
    fields = {FILE_NAMES.get(name, name): name for name in LayerState._fields}
    return dict(tree) | {
        "layers": {
            path: LayerState(**{fields[name]: array for name, array in layer.items()})
            for path, layer in tree["layers"].items()
        },
    }
