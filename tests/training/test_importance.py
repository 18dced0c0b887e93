"""Importance, masks and step scales against NumPy in float64, and their invariants."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nalora_mlx.core.config import NAParameters
from nalora_mlx.training import importance
from nalora_mlx.training.importance import LayerStatistics

CHANNELS, REGIONS = 11, 3


def observations(steps=14, seed=0, shape=(CHANNELS,), empty=()):
    rng = np.random.default_rng(seed)
    observed = []
    for step in range(steps):
        tokens = np.full(shape[:-1], rng.integers(3, 40), dtype=np.float64)
        if step in empty:
            tokens[..., 0] = 0
        d = rng.gamma(0.7, size=shape)
        high = rng.random(shape)
        low = high + (1 - high) * rng.random(shape)
        observed.append(
            {
                "tokens": tokens,
                "responsiveness": d * tokens[..., None],
                "above_boundary": np.stack([low, high]) * tokens[..., None],
            }
        )
    return observed


def reference(observed, p: NAParameters, shape=(CHANNELS,)):
    """Compute docs/method.md line by line in float64; return (s, p_R, m, q) per step."""
    s_raw, above_raw = np.zeros(shape), np.zeros((REGIONS - 1, *shape))
    k, m, out = np.zeros(shape[:-1]), np.ones(shape), []
    for t, statistics in enumerate(observed, 1):
        n = statistics["tokens"][..., None]
        live = n > 0
        safe = np.where(live, n, 1)
        s_raw = np.where(live, p.beta * s_raw + (1 - p.beta) * statistics["responsiveness"] / safe, s_raw)
        above_raw = np.where(
            live, p.beta * above_raw + (1 - p.beta) * statistics["above_boundary"] / safe, above_raw
        )
        k = k + (statistics["tokens"] > 0)
        correction = np.where(k > 0, 1 - p.beta**k, 1)[..., None]
        s, above = s_raw / correction, above_raw / correction
        occupancy = np.stack([1 - above[0], above[0] - above[1], above[1]])
        if p.mask != "off" and t > p.mask_warmup and (t - p.mask_warmup - 1) % p.mask_every == 0:
            if p.mask == "soft":
                m = s / s.mean(-1, keepdims=True)
            else:
                keep = max(1, round(p.keep_fraction * shape[-1]))
                m = (np.argsort(np.argsort(-s, axis=-1, kind="stable"), axis=-1) < keep).astype(float)
        q = m.copy()
        if p.step_scaling:
            q = q * sum(g * o for g, o in zip(p.gamma, occupancy, strict=True))
        q = np.minimum(q, p.max_multiplier)
        if p.preserve == "rms":
            q = q / np.sqrt((q**2).mean(-1, keepdims=True))
        elif p.preserve == "mean":
            q = q / q.mean(-1, keepdims=True)
        elif p.preserve == "function":
            q = q * s.sum(-1, keepdims=True) / (q * s).sum(-1, keepdims=True)
        out.append((s, occupancy, m, q))
    return out


def run(observed, p, shape=(CHANNELS,)):
    state = importance.init(shape, REGIONS)
    out = []

    @mx.compile
    def step(state, statistics, t):
        state = importance.refresh(importance.observe(state, statistics, p.beta), t, p)
        return (
            state,
            importance.importance(state, p.beta),
            importance.occupancy(state, p.beta),
            importance.multiplier(state, p),
        )

    for t, sums in enumerate(observed, 1):
        statistics = LayerStatistics(**{name: mx.array(a.astype(np.float32)) for name, a in sums.items()})
        state, s, occupancy, q = step(state, statistics, mx.array(t))
        out.append(tuple(np.array(a) for a in (s, occupancy, state.mask, q)))
    return out


VARIANTS = [
    NAParameters(),
    NAParameters(mask="hard", keep_fraction=0.3),
    NAParameters(mask="off"),
    NAParameters(step_scaling=False, preserve="mean"),
    NAParameters(preserve="function", gamma=(0.2, 1.5, 0.7)),
    NAParameters(preserve="none", max_multiplier=1.5),
    NAParameters(mask_every=3, mask_warmup=4, beta=0.5),
    NAParameters(mask="hard", mask_warmup=0, mask_every=2, step_scaling=False, preserve="none"),
    NAParameters(beta=0.0),
]


@pytest.mark.parametrize("parameters", VARIANTS, ids=str)
@pytest.mark.parametrize("shape", [(CHANNELS,), (4, CHANNELS)], ids=["dense", "experts"])
def test_the_state_equals_numpy_in_float64(parameters, shape):
    observed = observations(shape=shape)
    steps = zip(run(observed, parameters, shape), reference(observed, parameters, shape), strict=True)
    for result, expected in steps:
        for a, b in zip(result, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)


def test_an_expert_without_tokens_keeps_its_state():
    observed = observations(shape=(3, CHANNELS), empty=(2, 5))
    p = NAParameters(mask_warmup=0)
    result, expected = run(observed, p, (3, CHANNELS)), reference(observed, p, (3, CHANNELS))
    np.testing.assert_allclose(result[2][0][0], result[1][0][0], rtol=1e-6)
    assert not np.allclose(result[2][0][1], result[1][0][1])
    np.testing.assert_allclose(result[-1][3], expected[-1][3], rtol=2e-5)


def test_the_mask_of_a_layer_without_response_is_all_ones():
    for rule in ("soft", "hard"):
        assert np.array(importance.mask(mx.zeros(5), NAParameters(mask=rule))).tolist() == [1] * 5


def test_the_hard_mask_keeps_exactly_keep_fraction_even_with_ties():
    m = np.array(importance.mask(mx.ones(10), NAParameters(mask="hard", keep_fraction=0.3)))
    assert m.tolist() == [1, 1, 1, 0, 0, 0, 0, 0, 0, 0]
    assert np.array(importance.mask(mx.ones(10), NAParameters(mask="hard", keep_fraction=0.01))).sum() == 1


@settings(max_examples=40, deadline=None)
@given(
    s=st.lists(st.floats(0, 100, width=32), min_size=2, max_size=30),
    rule=st.sampled_from(["soft", "hard", "off"]),
    preserve=st.sampled_from(["rms", "mean", "function"]),
)
def test_preserve_keeps_its_statistic_at_one(s, rule, preserve):
    p = NAParameters(mask=rule, preserve=preserve, step_scaling=False, mask_warmup=0, max_multiplier=1e6)
    statistics = LayerStatistics(mx.array(s), mx.zeros((2, len(s))), mx.array(1.0))
    state = importance.observe(importance.init((len(s),), 3), statistics, p.beta)
    state = importance.refresh(state, mx.array(1), p)
    q = np.array(importance.multiplier(state, p), dtype=np.float64)
    assert np.isfinite(q).all()
    assert (q >= 0).all()
    preserved = {"rms": np.sqrt((q**2).mean()), "mean": q.mean()}
    weights = np.array(s)
    preserved["function"] = (q * weights).sum() / weights.sum() if weights.sum() > 0 else q.mean()
    assert preserved[preserve] == pytest.approx(1, rel=1e-4)


def test_misalignment_without_change_is_zero():
    assert importance.misalignment(mx.zeros(2)).item() == 0
    assert importance.misalignment(mx.array([3.0, 1.0])).item() == 0.25
