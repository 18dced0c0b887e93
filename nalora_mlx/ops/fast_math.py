"""2^x, sigmoid, tanh and log-sum-exp, which take most of a training step's elementwise time on a CPU.

There MLX calls the C library for each element. What is here is made of operations of which a C++ compiler makes vector
instructions, ten times as fast and no less accurate. Elsewhere, in half types, and outside `vectorized`, MLX's own are
used: a model that is not being trained gives the bits that mlx-lm's gives.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import mlx.core as mx

LOG2_E = math.log2(math.e)
_LN_2 = (0.693359375, -2.12194440e-4)  # in two parts, of which small multiples of the first are exact
# e^r = 1 + r + r^2 (c0 + c1 r + ...) for |r| <= ln(2) / 2, relative error 3e-9; from a minimax fit.
_EXP = (0.49999993, 0.16666521, 0.04166839, 0.00836872, 0.00138146)
_ROUNDER = 1.5 * 2**23 + 127  # added to |x| < 2^22 it rounds, and leaves round(x) + 127 in the last bits
_POWER = (1.00000007, 0.693146967, 0.240221197, 0.0555071327, 0.00967554133, 0.00132764715)

_custom_function: Any = mx.custom_function
_mlx_sigmoid = mx.sigmoid

_on: ContextVar[bool] = ContextVar("vectorized", default=False)


@contextmanager
def vectorized() -> Iterator[None]:
    """Use the fast forms of this room where they pay; it must span the backward too."""
    token = _on.set(True)
    try:
        yield
    finally:
        _on.reset(token)


@contextmanager
def vectorized_models() -> Iterator[None]:
    """Let models that call mx.sigmoid run the fast one, their own gated MLPs too; around the tracing of a graph alone.

    Run eagerly, functions that models compile for themselves would keep it.
    """

    def call(z: mx.array, *, stream: Any = None) -> mx.array:
        return sigmoid(z) if stream is None else _mlx_sigmoid(z, stream=stream)

    mx.sigmoid = call
    try:
        yield
    finally:
        mx.sigmoid = _mlx_sigmoid


def _pays(x: mx.array) -> bool:
    return _on.get() and x.dtype == mx.float32 and mx.default_device() == mx.Device(mx.cpu)


def _power_of_2(rounded: mx.array) -> mx.array:
    """2^n of what _ROUNDER made of n in [-126, 128], by its bits; 128 gives infinity."""
    return mx.view(mx.view(rounded, mx.int32) << 23, mx.float32)


def exp2_nonpositive(x: mx.array) -> mx.array:
    """2^x for float32 x <= 0, relative error 3e-7; 0 below -86, for products with less are denormal and slow.

    2^x = 2^n 2^f with n = round(x) and |f| <= 1/2, 2^f by the polynomial of degree 5 of least relative error, 7.5e-8,
    in Estrin's form: MLX makes one loop of at most eleven operations in a row. NaN stays. No gradient passes it.
    """
    if not _pays(x):
        return mx.where(x < -86, 0, mx.exp(x * math.log(2)))
    y = mx.maximum(x, -126)
    rounded = y + _ROUNDER
    f = y - (rounded - _ROUNDER)
    f2 = f * f
    a, b, c, d, e, g = _POWER
    p = ((a + b * f) + (c + d * f) * f2) + (e + g * f) * (f2 * f2)
    return p * mx.where(x < -86, 0, _power_of_2(rounded))


def logsumexp(x: mx.array) -> mx.array:
    """log sum exp(x) over the last axis, which stays with size 1. No gradient passes it."""
    if not _pays(x):
        return mx.logsumexp(x, axis=-1, keepdims=True)
    largest = mx.max(x, axis=-1, keepdims=True)
    return largest + mx.log(mx.sum(exp2_nonpositive((x - largest) * LOG2_E), axis=-1, keepdims=True))


@_custom_function
def _logistic(z: mx.array) -> mx.array:
    """With t = exp(-|z|) = 2^n e^r, n = round(-|z| / ln 2): t / (1 + t) below 0 and 1 / (1 + t) above; error 2.4e-7.

    Not one operation longer: from the twelfth in a row on MLX reads constants from memory, and loops are scalar.
    """
    x = mx.maximum(-mx.abs(z), -87.3)  # 2^-126
    rounded = x * LOG2_E + _ROUNDER
    n = rounded - _ROUNDER
    r = (x - n * _LN_2[0]) - n * _LN_2[1]
    r2 = r * r
    a, b, c, d, e = _EXP
    p = ((1 + r) + (a + b * r) * r2) + ((c + d * r) + e * r2) * (r2 * r2)
    t = p * _power_of_2(rounded)
    return mx.where(z < 0, t, 1) / (1 + t)


@_logistic.vjp
def _(_z, ds, s):
    return ds * (s * (1 - s))


def sigmoid(z: mx.array) -> mx.array:
    """1 / (1 + exp(-z)), in the dtype of z."""
    return _logistic(z) if _pays(z) else _mlx_sigmoid(z)


def tanh(z: mx.array) -> mx.array:
    """tanh(z) to an absolute error of 2e-7, in the dtype of z."""
    return 2 * _logistic(2 * z) - 1 if _pays(z) else mx.tanh(z)
