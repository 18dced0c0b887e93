"""The chunked cross entropy against float64, and what it holds in memory."""

import mlx.core as mx
import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from nalora_mlx.adapters import adapt
from nalora_mlx.config import NALoRAConfig
from nalora_mlx.losses import chunked_cross_entropy_sum, cross_entropy_sum
from nalora_mlx.step import ScoredLoss
from tests.conftest import build_model, random_adapters


def rows(count, width, vocabulary, size=1.0, seed=0):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(count, width)).astype(np.float32)
    weight = (size * rng.normal(size=(vocabulary, width))).astype(np.float32)
    targets = rng.integers(0, vocabulary, count).astype(np.int32)
    weights = rng.random(count).astype(np.float32) * (rng.random(count) < 0.8)
    return hidden, weight, targets, weights


def truth(hidden, weight, targets, weights):
    """Loss and its gradient in hidden, in float64."""
    logits = hidden.astype(np.float64) @ weight.T.astype(np.float64)
    losses = -log_softmax(logits, axis=-1)[np.arange(len(targets)), targets]
    slopes = softmax(logits, axis=-1)
    slopes[np.arange(len(targets)), targets] -= 1
    return (losses * weights).sum(), (slopes @ weight.astype(np.float64)) * weights[:, None]


@pytest.mark.parametrize("chunk", [1, 5, 37, 64])
@pytest.mark.parametrize("size", [0.01, 1.0, 30.0], ids=["flat", "usual", "certain"])
def test_loss_and_gradient_are_those_of_float64(size, chunk):
    hidden, weight, targets, weights = rows(37, 16, 211, size)
    want, slope = truth(hidden, weight, targets, weights)
    head = mx.array(weight)

    def loss(hidden, with_gradient=True):
        arrays = (mx.array(targets), mx.array(weights))
        return chunked_cross_entropy_sum(lambda h: h @ head.T, hidden, *arrays, chunk, with_gradient)

    value, gradient = mx.value_and_grad(loss)(mx.array(hidden))
    assert value.item() == pytest.approx(want, rel=1e-6)
    assert loss(mx.array(hidden), with_gradient=False).item() == pytest.approx(want, rel=1e-6)
    assert np.abs(np.array(gradient) - slope).max() < 2e-6 * np.abs(slope).max()


def test_a_loss_near_zero_keeps_its_digits():
    """Logits of several thousand, of which the target's is the largest by a little more than rounding can see."""
    margins = np.array([5.0, 10.0, 14.0])
    logits = np.zeros((3, 50), np.float32) - 4000
    logits[:, 7] += margins
    want = np.log1p(49 * np.exp(-margins))
    for i, expected in enumerate(want):
        row = mx.array(logits[i : i + 1])
        got = chunked_cross_entropy_sum(lambda h: h, row, mx.array([7]), mx.ones(1), 1)
        assert got.item() == pytest.approx(expected, rel=1e-3, abs=2e-7)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_types_keep_a_small_weight(dtype):
    """A weight of one in a million tokens does not make the gradient vanish."""
    hidden, weight, targets, _ = rows(8, 16, 101)
    weights = np.full(8, 1e-3, np.float32)
    head, h = mx.array(weight).astype(dtype), mx.array(hidden).astype(dtype)
    want = truth(np.array(h.astype(mx.float32)), np.array(head.astype(mx.float32)), targets, weights)
    loss = lambda h: chunked_cross_entropy_sum(  # noqa: E731
        lambda h: h @ head.T, h, mx.array(targets), mx.array(weights), 3
    )
    value, gradient = mx.value_and_grad(loss)(h)
    assert gradient.dtype == dtype
    tolerance = 2e-3 if dtype == mx.float16 else 2e-2
    assert value.item() == pytest.approx(want[0], rel=tolerance)
    assert np.abs(np.array(gradient.astype(mx.float32)) - want[1]).max() < tolerance * np.abs(want[1]).max()


def test_what_does_not_count_may_be_anything():
    hidden, weight, targets, weights = rows(12, 16, 50)
    weights[[2, 9]] = 0
    spoilt = hidden.copy()
    spoilt[[2, 9]] = np.nan
    head = mx.array(weight)
    loss = lambda h: chunked_cross_entropy_sum(  # noqa: E731
        lambda h: h @ head.T, h, mx.array(targets), mx.array(weights), 5
    )
    want, got = (mx.value_and_grad(loss)(mx.array(h)) for h in (hidden, spoilt))
    assert got[0].item() == want[0].item()
    np.testing.assert_array_equal(np.array(got[1]), np.array(want[1]))
    plain = cross_entropy_sum(mx.array(spoilt) @ head.T, mx.array(targets), mx.array(weights))
    assert plain.item() == pytest.approx(want[0].item(), rel=1e-6)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("with_gradient", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(("ahead", "most"), [(False, 8), (True, 14)], ids=["in step", "ahead"])
def test_the_logits_of_one_chunk_exist_at_a_time(compiled, with_gradient, ahead, most):
    """MLX allocates for some ten operations that wait for others, unless its memory limit keeps it from that."""
    count, width, vocabulary, chunk = 4096, 8, 2048, 64
    hidden, weight, targets, weights = (mx.array(a) for a in rows(count, width, vocabulary))
    mx.eval(hidden, weight, targets, weights)

    def loss(hidden):
        return chunked_cross_entropy_sum(
            lambda h: h @ weight.T, hidden, targets, weights, chunk, with_gradient
        )

    run = mx.value_and_grad(loss) if with_gradient else loss
    run = mx.compile(run) if compiled else run
    limit = mx.set_memory_limit(0)
    if ahead:
        mx.set_memory_limit(limit)
    try:
        mx.eval(run(hidden))
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(run(hidden))
        chunks = (mx.get_peak_memory() - before) / (4 * chunk * vocabulary)
    finally:
        mx.set_memory_limit(limit)
    assert 1 <= chunks < most  # arrays of that size at a time, of 64 chunks


@pytest.mark.parametrize("training", [True, False])
def test_a_head_is_found_under_dropout(training):
    """Adapters that already do something, as on resuming: no two runs of the model are the same."""
    model = build_model()
    adapt(model, NALoRAConfig(num_layers=-1, dropout=0.4))
    random_adapters(model, size=0.5)
    model.train(training)
    assert ScoredLoss(model).head is not None
    assert model.training == training
