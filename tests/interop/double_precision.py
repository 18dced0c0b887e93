"""float64 in MLX, transformers and TRL, to compare formulas without the errors of float32.

MLX has float64 on the CPU, but computes exp, sin, cos and what is made of them as precisely as in float32, and some of
its fast operations in float32. Many functions convert to float32 by name; here this name means float64.
"""

import types
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from nalora_mlx.ops import fast_math

F64 = mx.float64


@mx.custom_function
def exp(x):
    power = mx.expm1(mx.abs(x)) + 1  # expm1, log1p and tanh are precise
    return mx.where(x < 0, 1 / power, power)


@exp.vjp
def _(_x, cotangent, output):
    return cotangent * output


def sigmoid(x):
    return 1 / (1 + exp(-x))


def log_sigmoid(x):
    return mx.minimum(x, 0) - mx.log1p(exp(-mx.abs(x)))


def logsumexp(x, axis, keepdims):
    high = mx.stop_gradient(mx.max(x, axis=axis, keepdims=keepdims))
    return high + mx.log(mx.sum(exp(x - high), axis=axis, keepdims=keepdims))


def rms_norm(x, weight, eps):
    return x * mx.rsqrt(mx.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def rope(x, dims, *, traditional, base, scale, offset):
    assert (dims, traditional, scale) == (x.shape[-1], False, 1)
    offsets = np.reshape(np.array(offset), (-1, 1, 1))  # of each sequence, or one for all
    angles = (np.arange(x.shape[-2]) + offsets)[..., None] / base ** (np.arange(0, dims, 2) / dims)
    cos, sin = mx.array(np.cos(angles), dtype=F64), mx.array(np.sin(angles), dtype=F64)
    first, second = mx.split(x, 2, axis=-1)
    return mx.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)


def attention(q, k, v, *, scale, mask, sinks=None):
    assert sinks is None
    (batch, heads, length, size), groups = q.shape, k.shape[1]
    scores = q.reshape(batch, groups, -1, length, size) * scale @ k[:, :, None].swapaxes(-1, -2)
    if isinstance(mask, str):
        mask = mx.tri(length, dtype=mx.bool_)[None, None]
    scores = mx.where(mask[:, :, None], scores, -1e30)
    weights = exp(scores - mx.stop_gradient(mx.max(scores, axis=-1, keepdims=True)))
    weights = weights / mx.sum(weights, axis=-1, keepdims=True)
    return (weights @ v[:, :, None]).reshape(batch, heads, length, size)


@contextmanager
def float64_in_mlx():
    """Make MLX's float32 mean float64, and its functions precise, while the context is open."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mx, "float32", F64)
        patch.setattr(nn, "log_sigmoid", log_sigmoid)
        for name, function in {"exp": exp, "sigmoid": sigmoid, "logsumexp": logsumexp}.items():
            patch.setattr(mx, name, function)
        patch.setattr(fast_math, "_mlx_sigmoid", sigmoid)
        fast = {"rms_norm": rms_norm, "rope": rope, "scaled_dot_product_attention": attention}
        for name, function in fast.items():
            patch.setattr(mx.fast, name, function)
        mx.disable_compile()  # what is already compiled would keep MLX's functions
        try:
            yield
        finally:
            mx.enable_compile()


@contextmanager
def float64_in_torch():
    """Make conversions to float32 in transformers' Llama and in TRL give float64 while the context is open."""
    import torch
    from transformers.models.llama import modeling_llama
    from trl.kernels import chunked_logprob

    double = types.ModuleType("torch")
    double.__dict__.update(vars(torch), float32=torch.float64, float=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        patch.setattr(modeling_llama, "torch", double)
        patch.setattr(chunked_logprob, "torch", double)
        yield
