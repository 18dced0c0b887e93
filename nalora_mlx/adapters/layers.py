"""The modules of NA-LoRA: adapters of single projections, gated MLPs, and how they are merged."""

import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from nalora_mlx.adapters import layouts
from nalora_mlx.adapters.forward_pass import current
from nalora_mlx.ops.kernels.low_rank import LowRank, project

QUANTIZED = (nn.QuantizedLinear, nn.QuantizedEmbedding, QuantizedSwitchLinear)


class Dropout(nn.Module):
    """Inverted dropout that draws from its own key of the current ForwardPass: y = x * keep / (1 - p).

    Without a pass it draws from MLX's global random state, which a checkpointed layer would advance twice.
    """

    def __init__(self, p: float, index: int):
        super().__init__()
        self.p = p
        self.index = index

    @property
    def drops(self) -> bool:
        """Whether this is more than the identity now."""
        return self.p > 0 and self.training

    def __call__(self, x: mx.array) -> mx.array:
        """Drop elements of x, any shape, in training; the identity otherwise."""
        if not self.drops:
            return x
        this = current()
        key = None if this is None or this.dropout_keys is None else this.dropout_keys[self.index]
        keep = mx.random.bernoulli(1 - self.p, x.shape, key=key)
        return mx.where(keep, x * (1 / (1 - self.p)), 0).astype(x.dtype)


def low_dtype(dtype: mx.Dtype) -> mx.Dtype:
    """The dtype of low-rank products beside activations of a dtype.

    In float16 the gradient of lora_a, which passes lora_b while that is still tiny, would underflow.
    """
    return mx.float32 if dtype == mx.float16 else dtype


class Adapter(nn.Module):
    """A frozen projection plus a low-rank update: y = linear(x) + scale (x A) B.

    lora_a and lora_b are float32 masters that are cast to the dtype of x in the forward (float16 apart). The
    names of children and leaves are mlx-lm's, so that its tools load what is trained here. `where` is what the
    projection takes beside x: nothing, or the experts of each row and whether they are sorted.
    """

    def __init__(self, linear: nn.Module, scale: float, dropout: Dropout):
        super().__init__()
        self.linear = linear
        self.dropout = dropout
        self.scale = scale

    def down_project(self, x: mx.array, a: mx.array, *where: Any) -> mx.array:
        """x A; [..., D] -> [..., r]."""
        raise NotImplementedError

    def low_rank(self, x: mx.array, *where: Any, route: mx.array | None = None) -> LowRank:
        """The frozen projection of x and what is added to it.

        Args:
            x: [..., D].
            where: see the class.
            route: [F] or [E, F], a mask on the gradient that reaches lora_a; x and lora_b get theirs whole.
        """
        dtype = low_dtype(x.dtype)
        a, b = self.lora_a.astype(dtype), self.lora_b.astype(dtype)
        if route is None and not where and dtype == x.dtype and not self.dropout.drops:
            base, low = project(self.linear, x, a)
            return LowRank(base, self.scale, low, b)
        base = self.linear(x, *where)
        dropped = self.dropout(x).astype(dtype)
        if route is None:
            return LowRank(base, self.scale, self.down_project(dropped, a, *where), b, None, None, *where)
        stop = mx.stop_gradient
        low = self.down_project(dropped, stop(a), *where)
        routed = self.down_project(stop(dropped), a, *where)
        return LowRank(base, self.scale, low, b, routed, route, *where)

    def __call__(self, x: mx.array, *where: Any, **sorting: bool) -> mx.array:
        """Map x [..., D] to [..., F]."""
        return self.low_rank(x, *where, *sorting.values()).output()

    def channel_factor(self, q: mx.array) -> mx.array:
        """Factors per channel in a shape that broadcasts against lora_b."""
        raise NotImplementedError

    def delta(self) -> mx.array:
        """The update of the weight in float32, of the weight's shape."""
        raise NotImplementedError

    def fuse(self, dequantize: bool = False) -> nn.Module:
        """Merge the update into the weight, computed in float32 and rounded once.

        A quantized base gets its own bits again unless `dequantize`.
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
    """The adapter of a linear layer; lora_a [D, r], lora_b [r, F]."""

    def __init__(self, linear: nn.Module, rank: int, scale: float, dropout: Dropout):
        super().__init__(linear, scale, dropout)
        dims = layouts.input_dims(linear)
        bound = 1 / math.sqrt(dims)
        self.lora_a = mx.random.uniform(-bound, bound, (dims, rank))
        self.lora_b = mx.zeros((rank, layouts.output_dims(linear)))

    def down_project(self, x, a, *where):  # noqa: D102
        return x @ a

    def channel_factor(self, q):  # noqa: D102
        return q[None, :]  # [1, F] on [r, F]

    def delta(self):  # noqa: D102
        return self.scale * (self.lora_a @ self.lora_b).T  # [F, D]


class LoRASwitchLinear(Adapter):
    """The adapter of a linear layer per expert; lora_a [E, r, D], lora_b [E, F, r]."""

    def __init__(self, linear: nn.Module, rank: int, scale: float, dropout: Dropout):
        super().__init__(linear, scale, dropout)
        dims, experts = linear.input_dims, linear.num_experts
        bound = 1 / math.sqrt(dims)
        self.lora_a = mx.random.uniform(-bound, bound, (experts, rank, dims))
        self.lora_b = mx.zeros((experts, linear.output_dims, rank))

    def down_project(self, x, a, experts, is_sorted=False):  # noqa: D102
        return mx.gather_mm(x, a.swapaxes(-1, -2), rhs_indices=experts, sorted_indices=is_sorted)

    def channel_factor(self, q):  # noqa: D102
        return q[:, :, None]  # [E, F, 1] on [E, F, r]

    def delta(self):  # noqa: D102
        return self.scale * (self.lora_b @ self.lora_a)  # [E, F, D]


def dequantized(base: nn.Module) -> mx.array:
    """Weight of a dense or quantized layer as a dense array."""
    if not isinstance(base, QUANTIZED):
        return base.weight
    how = {"group_size": base.group_size, "bits": base.bits, "mode": base.mode}
    whole = base.get("global_scale")  # one for each expert
    if whole is None:
        return mx.dequantize(base.weight, base.scales, base.get("biases"), **how)
    parts = zip(base.weight, base.scales, whole, strict=True)
    return mx.stack([mx.dequantize(w, s, **how, global_scale=g) for w, s, g in parts])


def quantized_like(base: nn.Module, dense: nn.Module) -> nn.Module:
    """A dense layer in the bits of a quantized one; experts that have a scale of their own get one again."""
    whole = {"global_scale": True} if base.get("global_scale") is not None else {}
    return dense.to_quantized(base.group_size, base.bits, base.mode, **whole)
