"""Rotary positions by token, against the rotation in float64."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from nalora_mlx.ops.rope import rope_positions

POSITIONS = np.array([[0, 1, 2, 3, 2, 3, 4], [0, 1, 1, 2, 3, 1, 0]], np.int32)


def rotated(x, positions, dims, traditional, base=10000.0, scale=1.0):
    """Return x [B, H, L, D] with its first `dims` features rotated, in float64."""
    y = np.array(x, np.float64)
    angles = scale * positions[:, None, :, None] * base ** (-np.arange(0, dims, 2) / dims)
    cos, sin = np.cos(angles), np.sin(angles)
    first, second = (
        (slice(0, dims, 2), slice(1, dims, 2))
        if traditional
        else (
            slice(0, dims // 2),
            slice(dims // 2, dims),
        )
    )
    a, b = y[..., first].copy(), y[..., second].copy()
    y[..., first], y[..., second] = a * cos - b * sin, a * sin + b * cos
    return y


def values(heads=3, size=8):
    return np.random.default_rng(0).normal(size=(2, heads, 7, size)).astype(np.float32)


@pytest.mark.parametrize("traditional", [False, True])
@pytest.mark.parametrize("dims", [8, 4])
@pytest.mark.parametrize("heads", [1, 7])
def test_each_token_is_rotated_by_its_position(traditional, dims, heads):
    x, layer = values(heads), nn.RoPE(dims, traditional, base=100.0, scale=0.5)
    with rope_positions(mx.array(POSITIONS)):
        y = layer(mx.array(x), offset=5)  # an offset does not count
    np.testing.assert_allclose(np.array(y), rotated(x, POSITIONS, dims, traditional, 100.0, 0.5), atol=1e-5)
    np.testing.assert_allclose(
        np.array(layer(mx.array(x))),
        rotated(x, np.broadcast_to(np.arange(7), (2, 7)), dims, traditional, 100.0, 0.5),
        atol=1e-5,
    )


def test_positions_in_order_give_the_bits_of_mlx():
    x, layer = mx.array(values()), nn.RoPE(8)
    with rope_positions(mx.broadcast_to(mx.arange(7), (2, 7))):
        inside = layer(x)
    assert mx.array_equal(inside, layer(x))


@pytest.mark.parametrize("compiled", [False, True])
def test_the_gradient_is_the_inverse_rotation(compiled):
    x, weights, layer = values(), values()[::-1].copy(), nn.RoPE(8)

    def gradient(x):
        with rope_positions(mx.array(POSITIONS)):
            return mx.grad(lambda x: mx.sum(layer(x) * mx.array(weights)))(x)

    found = (mx.compile(gradient) if compiled else gradient)(mx.array(x))
    np.testing.assert_allclose(np.array(found), rotated(weights, -POSITIONS, 8, False), atol=1e-5)


def test_frequencies_of_a_layer_count():
    freqs = np.array([1.0, 3.0, 10.0, 40.0])
    x = values()
    with rope_positions(mx.array(POSITIONS)):
        y = mx.fast.rope(
            mx.array(x), 8, traditional=False, base=None, scale=1.0, offset=0, freqs=mx.array(freqs)
        )
    angles = POSITIONS[:, None, :, None] / freqs
    a, b = np.float64(x[..., :4]), np.float64(x[..., 4:])
    want = np.concatenate(
        [a * np.cos(angles) - b * np.sin(angles), a * np.sin(angles) + b * np.cos(angles)], -1
    )
    np.testing.assert_allclose(np.array(y), want, atol=1e-5)


def test_other_shapes_and_what_follows_are_left_alone():
    """Also after an error."""
    layer, other = nn.RoPE(8), mx.array(values()[:, :, :5])
    plain, before = layer(other), mx.fast.rope
    with rope_positions(mx.array(POSITIONS)):
        assert mx.array_equal(layer(other), plain)
        assert mx.array_equal(layer(other[0]), plain[0])
    with pytest.raises(ValueError, match="stop"), rope_positions(mx.array(POSITIONS)):
        raise ValueError("stop")
    assert mx.fast.rope is before
    with rope_positions(None):
        assert mx.fast.rope is before
