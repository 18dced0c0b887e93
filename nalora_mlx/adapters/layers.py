"""Adapters of single projections, and the conversion of layers between dense and quantized weights."""

import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from nalora_mlx.adapters import layouts
from nalora_mlx.adapters.forward_pass import current_pass
from nalora_mlx.ops.kernels.low_rank import LowRank, project

QUANTIZED = (nn.QuantizedLinear, nn.QuantizedEmbedding, QuantizedSwitchLinear)


class Dropout(nn.Module):
    """Inverted dropout, y = x * keep / (1 - p), with a random key from the current ForwardPass.

    Without a key it draws from MLX's global random state. A checkpointed layer would then drop other elements when it
    is recomputed.

    Args:
        p: probability of dropping an element.
        index: of this module's key in `ForwardPass.dropout_keys`.
    """

    def __init__(self, p: float, index: int):
        super().__init__()
        self.p = p
        self.index = index

    @property
    def is_active(self) -> bool:
        """Whether the next call drops elements."""
        return self.p > 0 and self.training

    def __call__(self, x: mx.array) -> mx.array:
        """Drop elements of x, of any shape, in training; return x unchanged otherwise."""
        if not self.is_active:
            return x
        context = current_pass()
        key = None if context is None or context.dropout_keys is None else context.dropout_keys[self.index]
        keep = mx.random.bernoulli(1 - self.p, x.shape, key=key)
        return mx.where(keep, x * (1 / (1 - self.p)), 0).astype(x.dtype)


def low_rank_dtype(dtype: mx.Dtype) -> mx.Dtype:
    """Return the dtype of low-rank products for activations of a dtype.

    It is float32 for float16: the gradient of lora_a is a product with lora_b, which is tiny at first, and would
    underflow.
    """
    return mx.float32 if dtype == mx.float16 else dtype


class Adapter(nn.Module):
    """A frozen projection and its low-rank update: y = linear(x) + scale (x A) B.

    lora_a and lora_b are float32 masters, which the forward casts to the dtype of x (see `low_rank_dtype`). Children
    and parameters have mlx-lm's names, so that mlx-lm loads what is trained here.

    `routing` stands for the projection's arguments after x: none for a dense projection; with experts, the expert of
    each row and whether rows are sorted by expert.
    """

    def __init__(self, linear: nn.Module, scale: float, dropout: Dropout):
        super().__init__()
        self.linear = linear
        self.dropout = dropout
        self.scale = scale

    def down_project(self, x: mx.array, a: mx.array, *routing: Any) -> mx.array:
        """Return x A; [..., D] -> [..., r]."""
        raise NotImplementedError

    def low_rank(self, x: mx.array, *routing: Any, route: mx.array | None = None) -> LowRank:
        """Return the output of the frozen projection and the low-rank update, not yet added.

        Args:
            x: [..., D].
            routing: see the class.
            route: [F] or [E, F], a mask on the gradient of lora_a; the gradients of x and lora_b are not masked.
        """
        dtype = low_rank_dtype(x.dtype)
        scale = self.scale
        if (context := current_pass()) is not None:
            context.record_dtype(self, dtype)
            if id(self) in context.scaled:
                scale = 1.0
        a, b = self.lora_a.astype(dtype), self.lora_b.astype(dtype)
        if route is None and not routing and dtype == x.dtype and not self.dropout.is_active:
            base, low = project(self.linear, x, a)
            return LowRank(base, scale, low, b)
        base = self.linear(x, *routing)
        dropped = self.dropout(x).astype(dtype)
        if route is None:
            return LowRank(base, scale, self.down_project(dropped, a, *routing), b, None, None, *routing)
        stop = mx.stop_gradient
        low = self.down_project(dropped, stop(a), *routing)
        routed = self.down_project(stop(dropped), a, *routing)
        return LowRank(base, scale, low, b, routed, route, *routing)

    def __call__(self, x: mx.array, *routing: Any, **sorting: bool) -> mx.array:
        """Map x [..., D] to [..., F]."""
        if routing:
            return self.low_rank(x, *routing, *sorting.values()).output()
        # As rows [N, D]: with more axes, MLX would reshape each operand of each product, forward and backward.
        y = self.low_rank(x.reshape(-1, x.shape[-1])).output()
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def broadcast_channels(self, factors: mx.array) -> mx.array:
        """Reshape a factor per output channel, [F] or [E, F], to broadcast against lora_b.

        Factors of several layers, with one more axis in front, broadcast against a stack of lora_b.
        """
        raise NotImplementedError

    def delta(self) -> mx.array:
        """Return the update of the weight, in float32 and the weight's shape."""
        raise NotImplementedError

    def fuse(self, dequantize: bool = False) -> nn.Module:
        """Return the base layer with the update merged into its weight, computed in float32 and rounded once.

        The merged layer of a quantized base is quantized in the same way, unless `dequantize`.
        """
        linear = self.linear
        weight = dequantized(linear)
        dense = SwitchLinear(1, 1, 1, bias=False) if weight.ndim == 3 else nn.Linear(1, 1, bias=False)
        dense.weight = (weight.astype(mx.float32) + self.delta()).astype(weight.dtype)
        if "bias" in linear:
            dense.bias = linear.bias
        if isinstance(linear, QUANTIZED) and not dequantize:
            return quantized_like(linear, dense)
        return dense


class LoRALinear(Adapter):
    """The adapter of a linear layer, with lora_a [D, r] and lora_b [r, F]."""

    def __init__(self, linear: nn.Module, rank: int, scale: float, dropout: Dropout):
        super().__init__(linear, scale, dropout)
        dims = layouts.input_dims(linear)
        bound = 1 / math.sqrt(dims)
        self.lora_a = mx.random.uniform(-bound, bound, (dims, rank))
        self.lora_b = mx.zeros((rank, layouts.output_dims(linear)))

    def down_project(self, x, a, *routing):  # noqa: D102
        return x @ a

    def broadcast_channels(self, factors):  # noqa: D102
        return factors[..., None, :]  # [1, F] on [r, F]

    def delta(self):  # noqa: D102
        return self.scale * (self.lora_a @ self.lora_b).T  # [F, D]


class LoRASwitchLinear(Adapter):
    """The adapter of a linear layer with experts, with lora_a [E, r, D] and lora_b [E, F, r]."""

    def __init__(self, linear: nn.Module, rank: int, scale: float, dropout: Dropout):
        super().__init__(linear, scale, dropout)
        dims, experts = linear.input_dims, linear.num_experts
        bound = 1 / math.sqrt(dims)
        self.lora_a = mx.random.uniform(-bound, bound, (experts, rank, dims))
        self.lora_b = mx.zeros((experts, linear.output_dims, rank))

    def down_project(self, x, a, experts, is_sorted=False):  # noqa: D102
        return mx.gather_mm(x, a.swapaxes(-1, -2), rhs_indices=experts, sorted_indices=is_sorted)

    def broadcast_channels(self, factors):  # noqa: D102
        return factors[..., None]  # [E, F, 1] on [E, F, r]

    def delta(self):  # noqa: D102
        return self.scale * (self.lora_b @ self.lora_a)  # [E, F, D]


def dequantized(base: nn.Module) -> mx.array:
    """Return the weight of a dense or quantized layer as a dense array."""
    if not isinstance(base, QUANTIZED):
        return base.weight
    settings = {"group_size": base.group_size, "bits": base.bits, "mode": base.mode}
    expert_scales = base.get("global_scale")
    if expert_scales is None:
        return mx.dequantize(base.weight, base.scales, base.get("biases"), **settings)
    experts = zip(base.weight, base.scales, expert_scales, strict=True)
    return mx.stack([mx.dequantize(w, s, **settings, global_scale=g) for w, s, g in experts])


def quantized_like(base: nn.Module, dense: nn.Module) -> nn.Module:
    """Quantize a dense layer as a quantized one is: same bits, group size and mode, and a scale per expert if any."""
    expert_scales = {"global_scale": True} if base.get("global_scale") is not None else {}
    return dense.to_quantized(base.group_size, base.bits, base.mode, **expert_scales)
