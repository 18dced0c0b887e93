"""Tiled cross-entropy: accuracy against float64, and memory."""

from contextlib import nullcontext

import mlx.core as mx
import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from nalora_mlx.adapters.attach import adapt
from nalora_mlx.core.config import NALoRAConfig
from nalora_mlx.ops import cross_entropy
from nalora_mlx.ops.cross_entropy import (
    cross_entropy_sum,
    gather_rows,
    tiled_argmax,
    tiled_cross_entropy_sum,
)
from nalora_mlx.ops.device_sizes import device_sizes, using_sizes
from nalora_mlx.ops.fast_math import vectorized
from nalora_mlx.training.loss import SupervisedLoss
from tests.conftest import build_model, random_adapters, set_sizes


def set_columns(monkeypatch, columns):
    """Let tiles have any number of columns."""
    monkeypatch.setattr(cross_entropy, "COLUMN_MULTIPLE", 1)
    set_sizes(monkeypatch, head_columns=columns)


def make_inputs(count, width, vocabulary, size=1.0, seed=0):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(count, width)).astype(np.float32)
    weight = (size * rng.normal(size=(vocabulary, width))).astype(np.float32)
    targets = rng.integers(0, vocabulary, count).astype(np.int32)
    weights = rng.random(count).astype(np.float32) * (rng.random(count) < 0.8)
    return hidden, weight, targets, weights


def truth(hidden, weight, targets, weights):
    """Return the loss and its gradient in hidden, in float64."""
    logits = hidden.astype(np.float64) @ weight.T.astype(np.float64)
    losses = -log_softmax(logits, axis=-1)[np.arange(len(targets)), targets]
    logit_gradients = softmax(logits, axis=-1)
    logit_gradients[np.arange(len(targets)), targets] -= 1
    return (losses * weights).sum(), (logit_gradients @ weight.astype(np.float64)) * weights[:, None]


def tiled_loss(weight, hidden, targets, weights, rows=512, with_gradient=True):
    """Return the tiled loss of an output head without a bias."""
    logits_for = lambda h, entries: h @ weight[entries].T  # noqa: E731
    arrays = (mx.array(targets), mx.array(weights))
    with using_sizes(device_sizes()._replace(head_rows=rows)):
        return tiled_cross_entropy_sum(logits_for, weight.shape[0], hidden, *arrays, with_gradient)


@pytest.mark.parametrize("fast", [False, True], ids=["mlx exp", "vectorized exp"])
@pytest.mark.parametrize("columns", [7, 100, 4096])
@pytest.mark.parametrize(
    "rows", [pytest.param(1, marks=pytest.mark.slow), 5, pytest.param(37, marks=pytest.mark.slow), 64]
)
@pytest.mark.parametrize("size", [0.01, 1.0, 30.0], ids=["flat", "typical", "confident"])
def test_loss_and_gradient_match_float64(size, rows, columns, fast, monkeypatch):
    set_columns(monkeypatch, columns)
    hidden, weight, targets, weights = make_inputs(37, 16, 211, size)
    want, want_gradient = truth(hidden, weight, targets, weights)
    head = mx.array(weight)

    def loss(hidden, with_gradient=True):
        return tiled_loss(head, hidden, targets, weights, rows, with_gradient)

    with vectorized() if fast else nullcontext():
        value, gradient = mx.value_and_grad(loss)(mx.array(hidden))
        assert value.item() == pytest.approx(want, rel=1e-6)
        assert loss(mx.array(hidden), with_gradient=False).item() == pytest.approx(want, rel=1e-6)
    assert np.abs(np.array(gradient) - want_gradient).max() < 2e-6 * np.abs(want_gradient).max()


def test_losses_near_zero_are_accurate():
    """Logits of several thousand, where the target's is the largest by little more than their rounding."""
    margins = np.array([5.0, 10.0, 14.0, 40.0])
    logits = np.zeros((4, 50), np.float32) - 4000
    logits[:, 7] += margins
    want = np.log1p(49 * np.exp(-margins))
    for i, expected in enumerate(want):
        row = mx.array(logits[i : i + 1])
        loss = lambda row: tiled_cross_entropy_sum(  # noqa: E731
            lambda h, entries: h[:, entries], 50, row, mx.array([7]), mx.ones(1)
        )
        value, gradient = mx.value_and_grad(loss)(row)
        assert value.item() == pytest.approx(expected, rel=1e-3)
        assert gradient[0, 7].item() == pytest.approx(-49 * np.exp(-margins[i] - expected), rel=1e-3)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_small_weights_do_not_underflow_in_half_precision(dtype):
    """The small weight of a token in a large optimizer update does not make its gradient vanish."""
    hidden, weight, targets, _ = make_inputs(8, 16, 101)
    weights = np.full(8, 1e-3, np.float32)
    head, h = mx.array(weight).astype(dtype), mx.array(hidden).astype(dtype)
    want = truth(np.array(h.astype(mx.float32)), np.array(head.astype(mx.float32)), targets, weights)
    loss = lambda h: tiled_loss(head, h, targets, weights, 3)  # noqa: E731
    value, gradient = mx.value_and_grad(loss)(h)
    assert gradient.dtype == dtype
    tolerance = 2e-3 if dtype == mx.float16 else 2e-2
    assert value.item() == pytest.approx(want[0], rel=tolerance)
    assert np.abs(np.array(gradient.astype(mx.float32)) - want[1]).max() < tolerance * np.abs(want[1]).max()


def test_rows_without_weight_may_hold_nan():
    hidden, weight, targets, weights = make_inputs(12, 16, 50)
    weights[[2, 9]] = 0
    with_nan = hidden.copy()
    with_nan[[2, 9]] = np.nan
    head = mx.array(weight)
    loss = lambda h: tiled_loss(head, h, targets, weights, 5)  # noqa: E731
    want, got = (mx.value_and_grad(loss)(mx.array(h)) for h in (hidden, with_nan))
    assert got[0].item() == want[0].item()
    np.testing.assert_array_equal(np.array(got[1]), np.array(want[1]))
    plain = cross_entropy_sum(mx.array(with_nan) @ head.T, mx.array(targets), mx.array(weights))
    assert plain.item() == pytest.approx(want[0].item(), rel=1e-6)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("with_gradient", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(("ahead", "most"), [(False, 8), (True, 18)], ids=["memory limit", "no limit"])
def test_few_tiles_of_logits_are_live(compiled, with_gradient, ahead, most, monkeypatch):
    """MLX starts about ten operations ahead of time and allocates their outputs, unless a memory limit prevents it."""
    set_columns(monkeypatch, 256)
    count, width, vocabulary, tile_rows = 1024, 8, 2048, 256
    hidden, weight, targets, weights = (mx.array(a) for a in make_inputs(count, width, vocabulary))
    mx.eval(hidden, weight, targets, weights)

    def loss(hidden):
        return tiled_loss(weight, hidden, targets, weights, tile_rows, with_gradient)

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
        tiles = (mx.get_peak_memory() - before) / (4 * tile_rows * 256)
    finally:
        mx.set_memory_limit(limit)
    assert 1 <= tiles < most  # out of 32


def test_the_largest_logit_is_found_in_tiles(monkeypatch):
    set_columns(monkeypatch, 128)
    logits = np.random.default_rng(0).normal(size=(9, 500)).astype(np.float32)
    logits[0, [3, 200, 499]] = 50  # the first of equal ones
    logits[1, 499] = logits[2, 0] = 50
    logits[3] = -1e30
    found = tiled_argmax(lambda h, entries: h[:, entries], 500, mx.array(logits))
    assert found.tolist() == logits.argmax(axis=1).tolist()
    assert found.tolist()[:4] == [3, 499, 0, 0]


def test_gather_rows_matches_indexing():
    array = mx.random.normal((7, 3))
    rows, weights = mx.array([4, 0, 6, 0, 0]), mx.array([1.0, 1.0, 1.0, 0.0, 0.0])
    factors = mx.random.normal((5, 3)) * weights[:, None]
    value, gradient = mx.value_and_grad(lambda a: (gather_rows(a, rows, weights) * factors).sum())(array)
    want, want_gradient = mx.value_and_grad(lambda a: (a[rows] * factors).sum())(array)
    assert value.item() == want.item()
    np.testing.assert_array_equal(np.array(gradient), np.array(want_gradient))


@pytest.mark.parametrize("training", [True, False])
def test_output_head_is_found_despite_dropout(training):
    """With nonzero adapters, as after resuming, no two forward passes of the model are the same."""
    model = build_model()
    adapt(model, NALoRAConfig(num_layers=-1, dropout=0.4))
    random_adapters(model, size=0.5)
    model.train(training)
    assert SupervisedLoss(model).head is not None
    assert model.training == training
