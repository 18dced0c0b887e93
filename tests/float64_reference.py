"""Activations in float64 NumPy, written from their definitions, independently of the code under test."""

import numpy as np
from scipy.special import erfc, erfcx, expit

from nalora_mlx.ops import activation_families

SQRT_2_OVER_PI = np.sqrt(2 / np.pi)


def tanh_w(z):
    return SQRT_2_OVER_PI * (z + 0.044715 * z**3)


def gelu_kappa(z):
    # z pdf / Phi by erfcx, which neither underflows nor cancels
    ratio = np.sqrt(2 / np.pi) / erfcx(-z / np.sqrt(2))
    return 1 + z * np.where(z < 25, ratio, 0.0)


# name -> (phi, phi', rho, kappa); None where undefined
TRUTH = {
    "silu": (
        lambda z: z * expit(z),
        lambda z: expit(z) + z * expit(z) * expit(-z),
        expit,
        lambda z: 1 + z * expit(-z),
    ),
    "gelu": (
        lambda z: z * 0.5 * erfc(-z / np.sqrt(2)),
        lambda z: 0.5 * erfc(-z / np.sqrt(2)) + z * np.exp(-z * z / 2) / np.sqrt(2 * np.pi),
        lambda z: 0.5 * erfc(-z / np.sqrt(2)),
        gelu_kappa,
    ),
    "gelu_tanh": (
        lambda z: z * expit(2 * tanh_w(z)),
        lambda z: (
            expit(2 * tanh_w(z))
            + z
            * expit(2 * tanh_w(z))
            * expit(-2 * tanh_w(z))
            * 2
            * SQRT_2_OVER_PI
            * (1 + 3 * 0.044715 * z**2)
        ),
        lambda z: expit(2 * tanh_w(z)),
        lambda z: 1 + 2 * z * expit(-2 * tanh_w(z)) * SQRT_2_OVER_PI * (1 + 3 * 0.044715 * z**2),
    ),
    "relu": (
        lambda z: np.maximum(z, 0),
        lambda z: (z > 0) * 1.0,
        lambda z: (z > 0) * 1.0,
        lambda z: (z > 0) * 1.0,
    ),
    "relu2": (
        lambda z: np.maximum(z, 0) ** 2,
        lambda z: 2 * np.maximum(z, 0),
        lambda z: np.maximum(z, 0),
        lambda z: (z > 0) * 2.0,
    ),
    "sigmoid": (expit, lambda z: expit(z) * expit(-z), None, lambda z: z * expit(-z)),
}


def situ_truth(z):
    return 1.5 * np.tanh(z / 1.5) * expit(z)


def xielu_truth(z):
    a, n, b = np.log1p(np.exp(0.3)), 0.5 + np.log1p(np.exp(-0.7)), 0.5
    with np.errstate(over="ignore"):
        return np.where(z > 0, a * z**2 + b * z, (np.expm1(np.minimum(z, -1e-6)) - z) * n + b * z)


def gelu_topk_truth(z):
    over = np.maximum(z - (z.mean(-1, keepdims=True) + 0.5 * z.std(-1, keepdims=True)), 0)
    return TRUTH["gelu_tanh"][0](over)


# family -> (a member, its phi in float64, its transform of the up branch in float64)
FAMILIES = {
    "swiglu_oai": (
        activation_families.swiglu_oai(1.702, 7.0),
        lambda z: np.minimum(z, 7) * expit(1.702 * np.minimum(z, 7)),
        lambda u: np.clip(u, -7, 7) + 1,
    ),
    "swiglu_input_clamped": (
        activation_families.swiglu_input_clamped(5.0),
        lambda z: np.minimum(z, 5) * expit(np.minimum(z, 5)),
        lambda u: np.clip(u, -5, 5),
    ),
    "swiglu_output_clamped": (
        activation_families.swiglu_output_clamped(2.0),
        lambda z: np.minimum(z * expit(z), 2),
        lambda u: np.clip(u, -2, 2),
    ),
    "situ": (activation_families.situ(1.5, 2.0), situ_truth, lambda u: 2 * np.tanh(u / 2)),
    "situ without a bound on u": (activation_families.situ(1.5, None), situ_truth, lambda u: u),
    "xielu": (activation_families.xielu(0.3, -0.7, 0.5, -1e-6), xielu_truth, lambda u: u),
    "gelu_topk": (activation_families.gelu_topk(0.5), gelu_topk_truth, lambda u: u),
}
