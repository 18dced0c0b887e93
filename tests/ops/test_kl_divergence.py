"""The tiled KL divergence against float64."""

import mlx.core as mx
import numpy as np
import pytest
from scipy.special import log_softmax

from nalora_mlx.ops import cross_entropy
from nalora_mlx.ops.kl_divergence import tiled_kl_divergence
from tests.conftest import set_sizes


def inputs(count=21, width=6, vocabulary=45, size=1.0, change=0.5):
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(count, width)).astype(np.float32)
    other = (hidden + change * rng.normal(size=(count, width))).astype(np.float32)
    return hidden, other, (size * rng.normal(size=(vocabulary, width))).astype(np.float32)


def truth(hidden, other, weight):
    p, q = (log_softmax(x.astype(np.float64) @ weight.T.astype(np.float64), -1) for x in (hidden, other))
    return (np.exp(p) * (p - q)).sum(-1)


def divergence(hidden, other, weight, dtype=mx.float32):
    weight = mx.array(weight).astype(dtype)
    arrays = (mx.array(x).astype(dtype) for x in (hidden, other))
    return np.array(tiled_kl_divergence(lambda h, v: h @ weight[v].T, weight.shape[0], *arrays))


@pytest.mark.parametrize("columns", [7, 44, 45, 4096])
@pytest.mark.parametrize("rows", [4, 21, 64])
@pytest.mark.parametrize("size", [0.3, 30.0])
def test_tiles_give_the_divergence_of_whole_distributions(columns, rows, size, monkeypatch):
    monkeypatch.setattr(cross_entropy, "COLUMN_MULTIPLE", 1)
    set_sizes(monkeypatch, head_columns=columns, head_rows=rows)
    arrays = inputs(size=size)
    want = truth(*arrays)
    found = divergence(*arrays)
    assert found.shape == want.shape
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=2e-5 * max(1, size))


def test_equal_distributions_have_none(monkeypatch):
    monkeypatch.setattr(cross_entropy, "COLUMN_MULTIPLE", 1)
    set_sizes(monkeypatch, head_columns=7)
    hidden, _, weight = inputs(size=20.0)
    assert (divergence(hidden, hidden, weight) == 0).all()
    assert (divergence(*inputs(change=1e-4)) >= 0).all()


def test_half_precision_is_summed_in_float32():
    hidden, other, weight = inputs(vocabulary=3000)
    rounded = [np.array(mx.array(x).astype(mx.float16).astype(mx.float32)) for x in (hidden, other, weight)]
    np.testing.assert_allclose(
        divergence(hidden, other, weight, mx.float16), truth(*rounded), rtol=0.02, atol=5e-3
    )


def test_entries_that_a_head_rules_out_do_not_count():
    """Their logits are -inf in both distributions."""
    hidden, other, weight = inputs()

    def logits(h, entries):
        numbers = mx.arange(weight.shape[0])[entries]
        return mx.where(numbers % 5 == 0, -mx.inf, h @ mx.array(weight)[entries].T)

    found = np.array(tiled_kl_divergence(logits, weight.shape[0], mx.array(hidden), mx.array(other)))
    kept = weight[np.arange(weight.shape[0]) % 5 != 0]
    np.testing.assert_allclose(found, truth(hidden, other, kept), rtol=1e-4, atol=1e-5)


def test_logits_are_computed_in_tiles(monkeypatch):
    monkeypatch.setattr(cross_entropy, "COLUMN_MULTIPLE", 1)
    set_sizes(monkeypatch, head_columns=7, head_rows=4)
    hidden, other, weight = inputs()
    shapes = []

    def logits(h, entries):
        found = h @ mx.array(weight)[entries].T
        shapes.append(found.shape)
        return found

    mx.eval(tiled_kl_divergence(logits, weight.shape[0], mx.array(hidden), mx.array(other)))
    assert max(shapes) == (4, 7)
    assert sum(rows * columns for rows, columns in shapes) == 2 * 21 * 45
