"""Families of activations whose parameters a model sets; see `activations` for what a row holds.

They have no partition, since clipping moves or removes the zero of phi'. Comparisons let NaN through. Their constants
are their parameters, in the order in which kernels/metal/common.metal reads them.
"""

import math

import mlx.core as mx

from nalora_mlx.ops.activations import ACTIVATIONS, Activation, float32
from nalora_mlx.ops.fast_math import sigmoid

_silu, _gelu_tanh = ACTIVATIONS["silu"], ACTIVATIONS["gelu_tanh"]


def swiglu_oai(alpha: float, limit: float) -> Activation:
    """The clipped SwiGLU of gpt-oss: phi(z) = m sigmoid(alpha m) with m = min(z, limit), times clip(u) + 1."""

    def phi(z):
        m = mx.minimum(z, limit)
        return m * sigmoid(alpha * m)

    def derivative(z):
        a = alpha * mx.minimum(z, limit)
        return mx.where(z >= limit, 0, sigmoid(a) * (1 + a * sigmoid(-a)))

    return Activation(
        "swiglu_oai",
        float32(phi),
        float32(derivative),
        None,
        None,
        up=lambda u: mx.clip(u, -limit, limit) + 1,
        kernel="swiglu_oai",
        constants=(alpha, limit),
    )


def swiglu_input_clamped(limit: float) -> Activation:
    """SwiGLU with both inputs clamped: phi(z) = silu(min(z, limit)), times clip(u)."""

    def phi(z):
        return _silu.phi(mx.minimum(z, limit))

    def derivative(z):
        return mx.where(z >= limit, 0, _silu.derivative(z))

    return Activation(
        "swiglu_input_clamped",
        float32(phi),
        float32(derivative),
        None,
        None,
        up=lambda u: mx.clip(u, -limit, limit),
        kernel="swiglu_input_clamped",
        constants=(limit,),
    )


def swiglu_output_clamped(limit: float) -> Activation:
    """SwiGLU with its gate clamped after the activation: phi(z) = min(silu(z), limit), times clip(u)."""

    def phi(z):
        return mx.minimum(_silu.phi(z), limit)

    def derivative(z):
        return mx.where(_silu.phi(z) >= limit, 0, _silu.derivative(z))

    return Activation(
        "swiglu_output_clamped",
        float32(phi),
        float32(derivative),
        None,
        None,
        up=lambda u: mx.clip(u, -limit, limit),
        kernel="swiglu_output_clamped",
        constants=(limit,),
    )


def situ(beta: float, linear_beta: float | None) -> Activation:
    """The saturating SiLU of Kimi K3: phi(z) = b tanh(z / b) sigmoid(z), times l tanh(u / l) (or u without l)."""

    def phi(z):
        return beta * mx.tanh(z / beta) * sigmoid(z)

    def derivative(z):
        t = mx.tanh(z / beta)
        return sigmoid(z) * ((1 - t * t) + beta * t * sigmoid(-z))

    up = None if linear_beta is None else lambda u: linear_beta * mx.tanh(u / linear_beta)
    constants = (beta, linear_beta or 0.0)
    return Activation(
        "situ", float32(phi), float32(derivative), None, None, up=up, kernel="situ", constants=constants
    )


def gelu_topk(deviations: float) -> Activation:
    """The sparse GELU of Gemma 3n: phi(z) = gelu_tanh(max(0, z - c)), c = mean + deviations * std of the row.

    The cutoff c is of the whole row of channels [..., F]; phi' is the derivative with c held.
    """

    def above(z):
        cutoff = mx.mean(z, axis=-1, keepdims=True) + deviations * mx.std(z, axis=-1, keepdims=True)
        return z - cutoff

    def phi(z):
        return _gelu_tanh.phi(mx.maximum(0, above(z)))

    def derivative(z):
        over = above(z)
        return mx.where(over <= 0, 0, _gelu_tanh.derivative(over))

    # No kernel: the cutoff is a sum over all channels of a row, and has a gradient.
    return Activation("gelu_topk", float32(phi), float32(derivative), None, None, constants=(deviations,))


def xielu(alpha_p: float, alpha_n: float, beta: float, eps: float) -> Activation:
    """The learned xIELU: a z^2 + b z above 0, n (exp(min(z, eps)) - 1 - z) + b z below.

    With a = softplus(alpha_p), n = b + softplus(alpha_n), b = beta, as a checkpoint holds them.
    """
    a, n = _softplus(alpha_p), beta + _softplus(alpha_n)

    def phi(z):
        low = (mx.expm1(mx.minimum(z, eps)) - z) * n
        return mx.where(z > 0, a * z * z, low) + beta * z

    def derivative(z):
        slope = mx.where(z >= eps, 0, mx.exp(mx.minimum(z, eps))) - 1
        return mx.where(z > 0, 2 * a * z, slope * n) + beta

    constants = (a, n, beta, eps)
    return Activation(
        "xielu", float32(phi), float32(derivative), None, None, kernel="xielu", constants=constants
    )


def _softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))
