"""Families of activations whose parameters come from the model; see `activations.Activation` for the fields.

They have no partition, because clipping moves or removes the zero of phi'. NaN propagates through their comparisons.
Their `constants` are their parameters, in the order that kernels/metal/common.metal expects.
"""

import math

import mlx.core as mx

from nalora_mlx.ops.activations import ACTIVATIONS, Activation, in_float32
from nalora_mlx.ops.fast_math import sigmoid

_silu, _gelu_tanh = ACTIVATIONS["silu"], ACTIVATIONS["gelu_tanh"]


def swiglu_oai(alpha: float, limit: float) -> Activation:
    """Return the clipped SwiGLU of gpt-oss.

    phi(z) = m sigmoid(alpha m) with m = min(z, limit); the up branch becomes clip(u, -limit, limit) + 1.
    """

    def phi(z):
        m = mx.minimum(z, limit)
        return m * sigmoid(alpha * m)

    def derivative(z):
        a = alpha * mx.minimum(z, limit)
        return mx.where(z >= limit, 0, sigmoid(a) * (1 + a * sigmoid(-a)))

    return Activation(
        "swiglu_oai",
        in_float32(phi),
        in_float32(derivative),
        None,
        None,
        up=lambda u: mx.clip(u, -limit, limit) + 1,
        kernel="swiglu_oai",
        constants=(alpha, limit),
    )


def swiglu_input_clamped(limit: float) -> Activation:
    """Return SwiGLU with both inputs clamped.

    phi(z) = silu(min(z, limit)); the up branch becomes clip(u, -limit, limit).
    """

    def phi(z):
        return _silu.phi(mx.minimum(z, limit))

    def derivative(z):
        return mx.where(z >= limit, 0, _silu.derivative(z))

    return Activation(
        "swiglu_input_clamped",
        in_float32(phi),
        in_float32(derivative),
        None,
        None,
        up=lambda u: mx.clip(u, -limit, limit),
        kernel="swiglu_input_clamped",
        constants=(limit,),
    )


def swiglu_output_clamped(limit: float) -> Activation:
    """Return SwiGLU with the gate clamped after the activation.

    phi(z) = min(silu(z), limit); the up branch becomes clip(u, -limit, limit).
    """

    def phi(z):
        return mx.minimum(_silu.phi(z), limit)

    def derivative(z):
        return mx.where(_silu.phi(z) >= limit, 0, _silu.derivative(z))

    return Activation(
        "swiglu_output_clamped",
        in_float32(phi),
        in_float32(derivative),
        None,
        None,
        up=lambda u: mx.clip(u, -limit, limit),
        kernel="swiglu_output_clamped",
        constants=(limit,),
    )


def situ(beta: float, linear_beta: float | None) -> Activation:
    """Return the saturating SiLU of Kimi K3.

    phi(z) = beta tanh(z / beta) sigmoid(z); the up branch becomes linear_beta tanh(u / linear_beta), or stays u if
    linear_beta is None.
    """

    def phi(z):
        return beta * mx.tanh(z / beta) * sigmoid(z)

    def derivative(z):
        t = mx.tanh(z / beta)
        return sigmoid(z) * ((1 - t * t) + beta * t * sigmoid(-z))

    up = None if linear_beta is None else lambda u: linear_beta * mx.tanh(u / linear_beta)
    constants = (beta, linear_beta or 0.0)
    return Activation(
        "situ", in_float32(phi), in_float32(derivative), None, None, up=up, kernel="situ", constants=constants
    )


def gelu_topk(deviations: float) -> Activation:
    """Return the sparse GELU of Gemma 3n.

    phi(z) = gelu_tanh(max(0, z - c)) with the cutoff c = mean(z) + deviations * std(z) over the channels, [..., F]. The
    derivative treats c as a constant.
    """

    def minus_cutoff(z):
        cutoff = mx.mean(z, axis=-1, keepdims=True) + deviations * mx.std(z, axis=-1, keepdims=True)
        return z - cutoff

    def phi(z):
        return _gelu_tanh.phi(mx.maximum(0, minus_cutoff(z)))

    def derivative(z):
        x = minus_cutoff(z)
        return mx.where(x <= 0, 0, _gelu_tanh.derivative(x))

    # No kernel, because the cutoff is a sum over all channels of a row, and has a gradient.
    return Activation(
        "gelu_topk", in_float32(phi), in_float32(derivative), None, None, constants=(deviations,)
    )


def xielu(alpha_p: float, alpha_n: float, beta: float, eps: float) -> Activation:
    """Return xIELU with the learned parameters of a checkpoint.

    phi(z) = a z^2 + beta z for z > 0 and n (exp(min(z, eps)) - 1 - z) + beta z otherwise, with a = softplus(alpha_p)
    and n = beta + softplus(alpha_n).
    """
    a, n = _softplus(alpha_p), beta + _softplus(alpha_n)

    def phi(z):
        negative = (mx.expm1(mx.minimum(z, eps)) - z) * n
        return mx.where(z > 0, a * z * z, negative) + beta * z

    def derivative(z):
        slope = mx.where(z >= eps, 0, mx.exp(mx.minimum(z, eps))) - 1
        return mx.where(z > 0, 2 * a * z, slope * n) + beta

    constants = (a, n, beta, eps)
    return Activation(
        "xielu", in_float32(phi), in_float32(derivative), None, None, kernel="xielu", constants=constants
    )


def _softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))
