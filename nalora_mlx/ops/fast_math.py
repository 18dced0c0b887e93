"""Vectorized exp, exp2, log-sum-exp, sigmoid and tanh for training on a CPU.

On a CPU, MLX calls the C library for each element, and these functions take most of a training step's elementwise time.
The versions here consist of operations that a C++ compiler turns into vector instructions. They are ten times as fast
and no less accurate. Outside `vectorized`, in half-precision dtypes, and on a GPU, they call MLX's own functions, so a
model that is not being trained returns the same bits as in mlx-lm.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import mlx.core as mx

from nalora_mlx.ops.custom_function import custom_function

LOG2_E = math.log2(math.e)
_LN_2_HIGH, _LN_2_LOW = (
    0.693359375,
    -2.12194440e-4,
)  # ln 2 = high + low; n * high is exact for the n used here
# Minimax fit: e^r = 1 + r + r^2 (c0 + c1 r + ...) for |r| <= ln(2) / 2, relative error 3e-9.
_EXP_COEFFICIENTS = (0.49999993, 0.16666521, 0.04166839, 0.00836872, 0.00138146)
# Minimax fit: 2^f = c0 + c1 f + ... for |f| <= 1/2, relative error 7.5e-8.
_EXP2_COEFFICIENTS = (1.00000007, 0.693146967, 0.240221197, 0.0555071327, 0.00967554133, 0.00132764715)
# Adding this to |x| < 2^22 rounds x to the nearest integer and leaves round(x) + 127, a biased float32 exponent, in the
# low bits of the sum.
_ROUND_TO_EXPONENT = 1.5 * 2**23 + 127

_mlx_sigmoid = mx.sigmoid

_enabled: ContextVar[bool] = ContextVar("vectorized", default=False)


@contextmanager
def vectorized() -> Iterator[None]:
    """Use the vectorized functions of this module where they pay off.

    The context must span the forward and the backward.
    """
    token = _enabled.set(True)
    try:
        yield
    finally:
        _enabled.reset(token)


@contextmanager
def vectorized_models() -> Iterator[None]:
    """Make models that call mx.sigmoid use the vectorized `sigmoid`.

    Enter this context only while a graph is traced. Some models compile functions of their own; run eagerly, these
    would keep the replacement.
    """

    def call(z: mx.array, *, stream: Any = None) -> mx.array:
        return sigmoid(z) if stream is None else _mlx_sigmoid(z, stream=stream)

    mx.sigmoid = call
    try:
        yield
    finally:
        mx.sigmoid = _mlx_sigmoid


def _use_vectorized(x: mx.array) -> bool:
    return _enabled.get() and x.dtype == mx.float32 and mx.default_device() == mx.Device(mx.cpu)


def _exp2_from_exponent(rounded: mx.array) -> mx.array:
    """Return 2^n for rounded = n + _ROUND_TO_EXPONENT with integer n in [-126, 128]; n = 128 gives infinity.

    Moves the biased exponent from the low bits to where float32 stores it.
    """
    return mx.view(mx.view(rounded, mx.int32) << 23, mx.float32)


def exp2_nonpositive(x: mx.array) -> mx.array:
    """Return 2^x for float32 x <= 0, with a relative error of 3e-7.

    Results below 2^-86 are 0, because products with smaller numbers are denormal, and slow. NaN propagates. The
    function has no gradient.

    1. Round: n = round(x), f = x - n, so that |f| <= 1/2.
    2. Compute 2^f by a polynomial of degree 5, in Estrin's form.
    3. Multiply by 2^n, which is made of its exponent bits.

    MLX compiles this to a single loop only while at most eleven operations follow one another.

    Args:
        x: float32, any shape, x <= 0.
    """
    if not _use_vectorized(x):
        return mx.where(x < -86, 0, mx.exp(x * math.log(2)))
    y = mx.maximum(x, -126)
    rounded = y + _ROUND_TO_EXPONENT
    f = y - (rounded - _ROUND_TO_EXPONENT)
    f2 = f * f
    c0, c1, c2, c3, c4, c5 = _EXP2_COEFFICIENTS
    p = ((c0 + c1 * f) + (c2 + c3 * f) * f2) + (c4 + c5 * f) * (f2 * f2)
    return p * mx.where(x < -86, 0, _exp2_from_exponent(rounded))


def _exp_factors(x: mx.array) -> tuple[mx.array, mx.array]:
    """Return e^r and 2^n, whose product is e^x, for float32 x in [-87.3, 0]; e^-87.3 is about 2^-126."""
    rounded = x * LOG2_E + _ROUND_TO_EXPONENT
    n = rounded - _ROUND_TO_EXPONENT
    r = (x - n * _LN_2_HIGH) - n * _LN_2_LOW
    r2 = r * r
    c0, c1, c2, c3, c4 = _EXP_COEFFICIENTS
    p = ((1 + r) + (c0 + c1 * r) * r2) + ((c2 + c3 * r) + c4 * r2) * (r2 * r2)
    return p, _exp2_from_exponent(rounded)


def exp_nonpositive(x: mx.array) -> mx.array:
    """Return e^x for float32 x <= 0, with a relative error of 2e-7, and exactly 1 for 0.

    Products of many decays need it exact at 0: `exp2_nonpositive` is 1e-7 too large there, and each factor adds to the
    error. Results below e^-60 are 0. NaN propagates. The function has no gradient.

    Args:
        x: float32, any shape, x <= 0.
    """
    if not _use_vectorized(x):
        return mx.where(x < -60, 0, mx.exp(x))
    p, power = _exp_factors(mx.maximum(x, -87.3))
    return p * mx.where(x < -60, 0, power)  # a shorter chain of operations than selecting after the product


def logsumexp(x: mx.array) -> mx.array:
    """Return log(sum(exp(x))) over the last axis, [..., V] -> [..., 1].

    The function has no gradient in its vectorized form.
    """
    if not _use_vectorized(x):
        return mx.logsumexp(x, axis=-1, keepdims=True)
    row_max = mx.max(x, axis=-1, keepdims=True)
    return row_max + mx.log(mx.sum(exp2_nonpositive((x - row_max) * LOG2_E), axis=-1, keepdims=True))


@custom_function
def _vectorized_sigmoid(z: mx.array) -> mx.array:
    """Return sigmoid(z) with a relative error of 2.4e-7.

    1. Write t = exp(-|z|) as 2^n e^r with n = round(-|z| / ln 2), so that |r| <= ln(2) / 2.
    2. Compute e^r by a polynomial of degree 6, in Estrin's form, and 2^n from its exponent bits.
    3. Return t / (1 + t) for z < 0 and 1 / (1 + t) otherwise.

    Do not add an operation: from the twelfth consecutive operation on, MLX reads constants from memory, and the
    compiled loop is no longer vectorized.
    """
    p, power = _exp_factors(mx.maximum(-mx.abs(z), -87.3))
    t = p * power
    return mx.where(z < 0, t, 1) / (1 + t)


@_vectorized_sigmoid.vjp
def _(_z, ds, s):
    return ds * (s * (1 - s))


def sigmoid(z: mx.array) -> mx.array:
    """Return 1 / (1 + exp(-z)) in the shape and dtype of z."""
    return _vectorized_sigmoid(z) if _use_vectorized(z) else _mlx_sigmoid(z)


def tanh(z: mx.array) -> mx.array:
    """Return tanh(z) = 2 sigmoid(2 z) - 1 in the shape and dtype of z, with an absolute error of 2e-7."""
    return 2 * _vectorized_sigmoid(2 * z) - 1 if _use_vectorized(z) else mx.tanh(z)
