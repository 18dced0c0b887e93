"""The causal convolution of packed rows against nn.Conv1d, row by row, and float64."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from nalora_mlx.ops.recurrence.causal_convolution import causal_convolution

E = 5
ROWS = (4, 1, 1, 9, 2, 3)  # shorter and longer than the kernel


def make_layer(taps, bias=True):
    mx.random.seed(0)
    layer = nn.Conv1d(E, E, taps, groups=E, bias=bias)
    if bias:
        layer.bias = mx.random.normal((E,))
    return layer


def pad(x, taps):
    """Put the K - 1 inputs before the first in front, as mlx-lm's layers do."""
    return mx.pad(x, [(0, 0), (taps - 1, 0), (0, 0)])


def relative_error(got, want):
    return (mx.abs(got - want).max() / mx.abs(want).max()).item()


def results(function, x, dy, *parameters):
    """Return the outputs and the gradients of all arguments."""
    (y,), gradients = mx.vjp(function, [x, *parameters], [dy])
    return [y, *gradients]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("taps", [1, 2, 4])
def test_rows_equal_convolutions_of_rows_alone(taps, compiled):
    """For outputs and the gradients of inputs, weights and biases; the rows of a batch are packed differently."""
    layer, lengths = make_layer(taps), np.array([ROWS, ROWS[::-1]])
    x, dy = mx.random.normal((2, 2, sum(ROWS), E))
    segment_ids = mx.array(np.stack([np.repeat(np.arange(len(ROWS)), row) for row in lengths]))

    def packed(x, weight, bias):
        return causal_convolution(pad(x, taps), weight, bias, segment_ids)

    def alone(x, weight, bias):
        layer.weight, layer.bias = weight, bias
        sequences = []
        for sequence, row in zip(x, lengths, strict=True):
            parts = mx.split(sequence[None], np.cumsum(row)[:-1].tolist(), axis=1)
            sequences.append(mx.concatenate([layer(pad(part, taps)) for part in parts], axis=1))
        return mx.concatenate(sequences)

    call = mx.compile(packed) if compiled else packed
    parameters = layer.weight, layer.bias
    for got, want in zip(results(call, x, dy, *parameters), results(alone, x, dy, *parameters), strict=True):
        assert relative_error(got, want) < 1e-6


@pytest.mark.parametrize("taps", [1, 4])
@pytest.mark.parametrize("length", [1, 3, 50])
@pytest.mark.parametrize("bias", [False, True])
def test_without_segments_it_is_the_convolution(taps, length, bias):
    """Earlier inputs, here not 0, count."""
    layer = make_layer(taps, bias)
    x, dy = mx.random.normal((2, length + taps - 1, E)), mx.random.normal((2, length, E))

    def convolved(x, weight):
        layer.weight = weight
        return layer(x)

    weight = layer.weight
    got = results(lambda x, weight: causal_convolution(x, weight, layer.get("bias")), x, dy, weight)
    for a, b in zip(got, results(convolved, x, dy, weight), strict=True):
        assert relative_error(a, b) < 1e-6


def test_one_segment_ignores_what_comes_before_the_first_token():
    layer = make_layer(4)
    x = mx.random.normal((1, 10 + 3, E))
    ids = mx.zeros((1, 10), mx.int32)
    got, gradient = mx.vjp(
        lambda x: causal_convolution(x, layer.weight, layer.bias, ids), [x], [mx.ones((1, 10, E))]
    )
    assert relative_error(got[0], layer(pad(x[:, 3:], 4))) < 1e-6
    assert mx.abs(gradient[0][:, :3]).max().item() == 0


def test_large_segment_ids_are_told_apart():
    layer = make_layer(4)
    x = mx.random.normal((1, 6, E))
    ids = mx.array([[1000, 1000, 1000, 1001, 1001, 1001]])
    got = causal_convolution(pad(x, 4), layer.weight, layer.bias, ids)
    assert relative_error(got[:, 3:], layer(pad(x[:, 3:], 4))) < 1e-6


def test_half_precision_is_rounded_once():
    layer = make_layer(4, bias=False)
    x, dy = (mx.random.normal(shape).astype(mx.bfloat16) for shape in ((2, 53, E), (2, 50, E)))
    weight = layer.weight.astype(mx.bfloat16)
    ids = mx.array(np.sort(np.random.default_rng(0).integers(0, 6, (2, 50))))
    got = results(lambda x, weight: causal_convolution(x, weight, None, ids), x, dy, weight)
    x, dy, weight = (z.astype(mx.float32) for z in (x, dy, weight))
    want = results(lambda x, weight: causal_convolution(x, weight, None, ids), x, dy, weight)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == mx.bfloat16
        np.testing.assert_array_equal(
            np.array(a.astype(mx.float32)), np.array(b.astype(mx.bfloat16).astype(mx.float32))
        )


def test_in_float64():
    layer = make_layer(4)
    x = mx.random.normal((1, 43, E))
    w, z = np.array(layer.weight, np.float64)[..., 0], np.array(x, np.float64)
    want = sum(z[:, k : k + 40] * w[:, k] for k in range(4)) + np.array(layer.bias)
    np.testing.assert_allclose(causal_convolution(x, layer.weight, layer.bias), want, rtol=0, atol=1e-6)


def test_it_keeps_and_needs_no_more_than_a_few_inputs():
    """Compiled, as in training: nothing is made for each tap."""
    L, channels, taps = 512, 256, 4
    weight = mx.random.normal((channels, taps, 1))
    x, dy = mx.random.normal((1, L + taps - 1, channels)), mx.random.normal((1, L, channels))
    ids = mx.arange(L)[None] // 100

    @mx.compile
    def gradient(x, dy):
        return mx.vjp(lambda x: causal_convolution(x, weight, None, ids), [x], [dy])

    mx.eval(x, dy, weight, ids, gradient(x, dy))
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(gradient(x, dy))
    assert mx.get_peak_memory() - before < 3.5 * x.nbytes
