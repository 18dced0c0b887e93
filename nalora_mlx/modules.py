"""The modules of NA-LoRA: adapters of single projections, gated MLPs, and how they are merged."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from nalora_mlx import layouts
from nalora_mlx.activations import Activation
from nalora_mlx.config import NAParameters
from nalora_mlx.forward import current
from nalora_mlx.kernels import selfcheck
from nalora_mlx.kernels.fused import Variant
from nalora_mlx.kernels.gated_residual import gated_residual
from nalora_mlx.kernels.low_rank import LowRank, project
from nalora_mlx.layouts import Layout, Match

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

    def times_a(self, x: mx.array, a: mx.array, *where: Any) -> mx.array:
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
            return LowRank(base, self.scale, self.times_a(dropped, a, *where), b, None, None, *where)
        stop = mx.stop_gradient
        low = self.times_a(dropped, stop(a), *where)
        routed = self.times_a(stop(dropped), a, *where)
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
            return _quantized_like(linear, dense)
        return dense


class LoRALinear(Adapter):
    """The adapter of a linear layer; lora_a [D, r], lora_b [r, F]."""

    def __init__(self, linear: nn.Module, rank: int, scale: float, dropout: Dropout):
        super().__init__(linear, scale, dropout)
        dims = layouts.input_dims(linear)
        bound = 1 / math.sqrt(dims)
        self.lora_a = mx.random.uniform(-bound, bound, (dims, rank))
        self.lora_b = mx.zeros((rank, layouts.output_dims(linear)))

    def times_a(self, x, a, *where):  # noqa: D102
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

    def times_a(self, x, a, experts, is_sorted=False):  # noqa: D102
        return mx.gather_mm(x, a.swapaxes(-1, -2), rhs_indices=experts, sorted_indices=is_sorted)

    def channel_factor(self, q):  # noqa: D102
        return q[:, :, None]  # [E, F, 1] on [E, F, r]

    def delta(self):  # noqa: D102
        return self.scale * (self.lora_b @ self.lora_a)  # [E, F, D]


class GatedMLP(nn.Module):
    """A gated MLP whose projections carry adapters; it sees what the mask needs.

    h = phi(z) u with z = gate(x), u = up(x); y = down(h). The children have the names that the original module
    gave them, so that parameter paths are those of mlx-lm's own LoRA.
    """

    def __init__(
        self,
        match: Match,
        layout: Layout,
        activation: Activation,
        projections: Mapping[str, nn.Module],
        parameters: NAParameters,
    ):
        super().__init__()
        self.path = match.path
        self.experts = match.experts
        self.layout = layout
        self.activation = activation
        self.parameters_na = parameters
        self.precise = True  # whether the model computes the product in float32; `adapt` finds out
        # Outside the module tree: its projections are already in it, through the adapters.
        object.__setattr__(self, "original", match.module)
        for name in layout.projections:
            self[name] = projections[name]
        if layout.norm:
            self[layout.norm] = match.module[layout.norm]

    @property
    def boundaries(self) -> tuple[float, ...]:
        """Boundaries of the partition in use: the config's where it fits the activation, else the activation's own."""
        own = self.activation.boundaries
        given = self.parameters_na.boundaries
        return given if given is not None and len(given) == len(own) else own

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a value per gate channel: [F], or [E, F] with experts."""
        gate = self[self.layout.gate]
        width = layouts.output_dims(gate.linear if isinstance(gate, Adapter) else gate)
        channels = width // 2 if self.layout.shared else width
        return (self.experts, channels) if self.experts else (channels,)

    def step_factors(self, q: mx.array) -> dict[str, mx.array]:
        """Factors on the steps of lora_b, by full path, from a multiplier per gate channel, [F] or [E, F]."""
        one = mx.ones_like(q)
        gate, up = (q if branch in self.parameters_na.branches else one for branch in ("gate", "up"))
        factors = {self.layout.gate: gate, self.layout.up: up}
        if self.layout.shared:
            factors = {self.layout.gate: self._join(gate, up)}
        return {
            f"{self.path}.{name}.lora_b": self[name].channel_factor(factor)
            for name, factor in factors.items()
            if isinstance(self[name], Adapter) and factor is not one
        }

    def _join(self, gate: mx.array, up: mx.array) -> mx.array:
        return mx.concatenate([gate, up] if self.layout.gate_first else [up, gate], axis=-1)

    @property
    def variant(self) -> Variant:
        """The gated residual of this module, with the statistics that training takes."""
        halves = "separate"
        if self.layout.shared:
            halves = "gate first" if self.layout.gate_first else "up first"
        parameters = self.parameters_na
        return Variant(
            self.activation,
            halves,
            parameters.statistic,
            self.boundaries,
            experts=self.experts,
            precise=self.precise,
        )

    @property
    def _inputs(self) -> tuple[str, ...]:
        """Names of the projections of x: gate and up, or the one that makes both."""
        return (self.layout.gate,) if self.layout.shared else (self.layout.gate, self.layout.up)

    def prepare(self, dtype: mx.Dtype, rank: int) -> None:
        """Check the kernels that this module will use in a model that computes in `dtype`; outside of any trace."""
        inside = all(isinstance(self[name], Adapter) for name in self._inputs)
        selfcheck.prepare(self.variant, dtype, low_dtype(dtype), rank if inside else 0)

    def _projections(self, x: mx.array, *where: Any) -> tuple[LowRank, ...]:
        """Gate and up of x, or the one projection that makes both."""
        this = current()
        route = None if this is None else this.routes.get(self.path)
        if route is not None and self.layout.shared:
            route = self._join(route, mx.ones_like(route))
        found = []
        for name in self._inputs:
            module = self[name]
            if isinstance(module, Adapter):
                found.append(module.low_rank(x, *where, route=route if name == self.layout.gate else None))
            else:
                found.append(LowRank(module(x, *where), 0.0, None, None, None, None, *where))
        return tuple(found)

    def _product(self, x: mx.array, *where: Any, tokens: mx.array | None = None) -> mx.array:
        """h = phi(z) u; `tokens` says which token each row of x is, in order if None."""
        projections = self._projections(x, *where)
        this = current()
        if this is None or this.weights is None:
            return gated_residual(self.variant, projections)[0]
        rows = math.prod(projections[0].base.shape[:-1])
        weights = this.weights.reshape(-1)
        if tokens is not None:
            weights = weights[tokens]
        elif weights.size != rows:
            # Rows that are no text tokens, such as patches of an image: all are real.
            weights = mx.ones((rows,))
        variant = replace(self.variant, diagnose=this.diagnose)
        h, seen = gated_residual(variant, projections, weights)
        this.observe(self.path, {name: mx.stop_gradient(array) for name, array in seen.items()})
        return h

    def __call__(self, x: mx.array) -> mx.array:
        """Map x [..., D] to [..., D]."""
        if self.layout.norm:
            x = self[self.layout.norm](x)
        return self[self.layout.down](self._product(x))

    def fuse(self, bits: int | None, dequantize: bool) -> nn.Module:
        """Give back the original module with every adapter merged into its projection, see `fuse_module`."""
        for name in self.layout.projections:
            self.original[name] = fuse_module(self[name], bits, dequantize)
        return self.original


class GatedExperts(GatedMLP):
    """Gated MLPs of experts, each row of x going to some of them; the importance is per expert and channel."""

    def __call__(self, x: mx.array, experts: mx.array) -> mx.array:  # type: ignore[override]
        """Map x [..., D] and the k experts of each row [..., k] to [..., k, D]."""
        experts = mx.stop_gradient(experts)
        chosen = experts.reshape(-1)  # [N k]
        order = tokens = mx.arange(chosen.size) // experts.shape[-1]
        # From so many rows on, sorted ones make each expert's weights be read once (the bound is mlx-lm's).
        is_sorted = chosen.size >= 64
        if is_sorted:
            order = mx.argsort(chosen)
            chosen, tokens = chosen[order], tokens[order]
        rows = x.reshape(-1, 1, x.shape[-1])[tokens]  # [N k, 1, D]
        y = self[self.layout.down](self._product(rows, chosen, is_sorted, tokens=tokens), chosen, is_sorted)
        if is_sorted:
            y = y[mx.argsort(order)]
        return y.reshape(*experts.shape, y.shape[-1])


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


def _quantized_like(base: nn.Module, dense: nn.Module) -> nn.Module:
    """A dense layer in the bits of a quantized one; experts that have a scale of their own get one again."""
    whole = {"global_scale": True} if base.get("global_scale") is not None else {}
    return dense.to_quantized(base.group_size, base.bits, base.mode, **whole)


def fuse_module(module: nn.Module, bits: int | None, dequantize: bool) -> nn.Module:
    """Merge one adapter into its base; a module without an adapter comes back as it is.

    Args:
        module: any module.
        bits: what a quantized base becomes; None for the bits that it has.
        dequantize: leave a quantized base dense instead.
    """
    if "lora_a" not in module or not hasattr(module, "fuse"):
        return module
    base = module.get("linear", module.get("embedding"))
    dense = module.fuse(dequantize=True)
    if dequantize or not isinstance(base, QUANTIZED):
        return dense
    if bits is None:
        return _quantized_like(base, dense)
    # Affine, because only it knows all widths and because eight bits of it are finer than those of mxfp8; its
    # groups are of 32, 64 or 128.
    return dense.to_quantized(base.group_size if base.mode == "affine" else 32, bits, "affine")
