"""Vectorized exp, exp2, sigmoid, tanh and log-sum-exp on the CPU against float64, and their gradients."""

import re

import mlx.core as mx
import numpy as np
import pytest
from scipy.special import expit, logsumexp

from nalora_mlx.ops import fast_math
from nalora_mlx.ops.cross_entropy import cross_entropy_sum


@pytest.fixture(autouse=True)
def vectorized():
    with fast_math.vectorized():
        yield


def test_exp2_is_accurate_and_flushes_small_results_to_zero():
    x = np.linspace(-86, 0, 1_000_001).astype(np.float32)
    got = np.array(fast_math.exp2_nonpositive(mx.array(x))).astype(np.float64)
    assert np.abs(got / np.exp2(x.astype(np.float64)) - 1).max() < 3e-7
    small = np.array(fast_math.exp2_nonpositive(mx.array([-86.01, -127.0, -1e30, -np.inf, np.nan])))
    assert small[:4].tolist() == [0, 0, 0, 0]
    assert np.isnan(small[4])


def test_exp_has_no_bias_near_zero_and_flushes_small_results_to_zero():
    x = np.concatenate([np.linspace(-60, 0, 1_000_001), -np.geomspace(1e-6, 1e-2, 1001)]).astype(np.float32)
    error = (
        np.array(fast_math.exp_nonpositive(mx.array(x))).astype(np.float64) / np.exp(x.astype(np.float64)) - 1
    )
    assert np.abs(error).max() < 2e-7
    assert abs(error[-1001:].mean()) < 1e-8
    special = np.array(fast_math.exp_nonpositive(mx.array([0.0, -60.01, -127.0, -1e30, -np.inf, np.nan])))
    assert special[:5].tolist() == [1, 0, 0, 0, 0]
    assert np.isnan(special[5])


def test_mx_sigmoid_is_restored():
    original = mx.sigmoid
    z = mx.array([-3.0, 0.5])
    with fast_math.vectorized_models():
        assert mx.sigmoid is not original
        for got in (mx.sigmoid(z), mx.sigmoid(z, stream=mx.cpu)):
            np.testing.assert_allclose(got, expit(np.array(z)), rtol=2.5e-7)
    assert mx.sigmoid is original


def test_sigmoid_is_accurate_in_both_tails():
    z = np.linspace(-87, 87, 1_000_001).astype(np.float32)
    got = np.array(fast_math.sigmoid(mx.array(z))).astype(np.float64)
    assert np.abs(got / expit(z.astype(np.float64)) - 1).max() < 2.5e-7
    assert np.diff(got).min() > -1.2e-7  # monotonic up to rounding


@pytest.mark.parametrize("z", [-np.inf, -1e4, -90.0, -88.5, -0.0, 0.0, 88.5, 1e4, np.inf, np.nan])
def test_sigmoid_at_special_values(z):
    got = fast_math.sigmoid(mx.array(z, dtype=mx.float32)).item()
    np.testing.assert_allclose(got, expit(z), rtol=2.5e-7, atol=2e-38)


def test_compiled_sigmoid_reads_no_constant_from_memory(tmp_path):
    """A constant that MLX does not fuse keeps the loop from being vectorized, and makes it four times as slow."""
    z = mx.random.normal((64, 64))
    mx.eval(z)  # otherwise the graph includes the random generator
    out = mx.compile(fast_math.sigmoid)(z)
    mx.export_to_dot(str(tmp_path / "graph.dot"), out)
    operations = re.findall(r'label ="([^"]*)", shape=rectangle', (tmp_path / "graph.dot").read_text())
    assert any(name.startswith("Compiled") for name in operations)
    assert not {"Broadcast", "Full"} & set(operations)


def test_sigmoid_gradient():
    z = mx.array(np.linspace(-20, 20, 1001).astype(np.float32))
    for gradient in (
        mx.grad(lambda z: fast_math.sigmoid(z).sum()),
        mx.compile(mx.grad(lambda z: fast_math.sigmoid(z).sum())),
    ):
        exact = expit(np.array(z).astype(np.float64))
        np.testing.assert_allclose(gradient(z), exact * (1 - exact), rtol=1e-5, atol=1e-7)


def test_tanh():
    z = np.linspace(-50, 50, 100_001).astype(np.float32)
    np.testing.assert_allclose(fast_math.tanh(mx.array(z)), np.tanh(z.astype(np.float64)), atol=2e-7)


@pytest.mark.parametrize(
    ("name", "dtype"), [("sigmoid", mx.bfloat16), ("tanh", mx.float16), ("tanh", mx.bfloat16)]
)
def test_half_precision_uses_mlx(name, dtype):
    z = mx.random.normal((64,)).astype(dtype)
    assert mx.array_equal(getattr(fast_math, name)(z), getattr(mx, name)(z))


@pytest.mark.parametrize("name", ["sigmoid", "tanh"])
def test_outside_the_context_results_are_bitwise_those_of_mlx(name):
    z, ours, theirs = mx.random.normal((4096,)), getattr(fast_math, name), getattr(mx, name)
    assert not mx.array_equal(ours(z), theirs(z))
    token = fast_math._enabled.set(False)
    assert mx.array_equal(ours(z), theirs(z))
    fast_math._enabled.reset(token)


def test_logsumexp():
    x = (20 * np.random.default_rng(0).standard_normal((7, 1000))).astype(np.float32)
    x[0] += 300
    x[1, :999] = -np.inf
    got = np.array(fast_math.logsumexp(mx.array(x)))
    np.testing.assert_allclose(got, logsumexp(x.astype(np.float64), axis=-1, keepdims=True), rtol=3e-7)


@pytest.mark.parametrize("compiled", [False, True])
def test_cross_entropy_and_its_gradient(compiled):
    """Compare with float64. A row without weight may hold NaN."""
    rng = np.random.default_rng(1)
    logits = (8 * rng.standard_normal((6, 500))).astype(np.float32)
    logits[4] = np.nan
    targets, weights = rng.integers(0, 500, 6), np.array([1, 0.5, 0, 2, 0, 1], np.float32)
    f = mx.value_and_grad(cross_entropy_sum)
    value, gradient = (mx.compile(f) if compiled else f)(
        mx.array(logits), mx.array(targets), mx.array(weights)
    )
    exact = logits.astype(np.float64)
    lse = logsumexp(exact, axis=-1, keepdims=True)
    losses = lse[:, 0] - exact[np.arange(6), targets]
    counts = weights > 0
    np.testing.assert_allclose(value, (losses * weights)[counts].sum(), rtol=1e-6)
    want = (np.exp(exact - lse) - np.eye(500)[targets]) * weights[:, None]
    want[~counts] = 0
    np.testing.assert_allclose(gradient, want, rtol=2e-6, atol=1e-7)
