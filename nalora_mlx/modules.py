"""The modules of NA-LoRA, and what a training step tells its forward and hears from it."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear
from mlx_lm.tuner.dora import DoRAEmbedding, DoRALinear
from mlx_lm.tuner.lora import LoRAEmbedding, LoRASwitchLinear

from nalora_mlx import layouts
from nalora_mlx.activations import Activation
from nalora_mlx.config import NAParameters
from nalora_mlx.kernels import reference
from nalora_mlx.layouts import Layout

QUANTIZED = (nn.QuantizedLinear, nn.QuantizedEmbedding, QuantizedSwitchLinear)


@dataclass
class ForwardPass:
    """One training forward: what the adapters need beside x, and what they observed.

    Attributes:
        weights: [B, L], 1 for real tokens, 0 for padding; None if nothing is to be observed.
        routes: path of a gated MLP -> mask [F] on the gradient that reaches the gate's lora_a.
        dropout_keys: [n, 2], a random key per dropout, the same in a recomputation as in the forward.
        seen: path of a gated MLP -> its sums over tokens, written during the forward.
    """

    weights: mx.array | None
    routes: Mapping[str, mx.array] = field(default_factory=dict)
    dropout_keys: mx.array | None = None
    seen: dict[str, dict[str, mx.array]] = field(default_factory=dict)


_current: ContextVar[ForwardPass | None] = ContextVar("forward_pass", default=None)


@contextmanager
def forward_pass(this: ForwardPass) -> Iterator[ForwardPass]:
    """Make a ForwardPass the current one; it must span the backward too, where checkpointing runs forwards again."""
    token = _current.set(this)
    try:
        yield this
    finally:
        _current.reset(token)


# --- modules ------------------------------------------------------------------------------------------------


class Dropout(nn.Module):
    """Inverted dropout that draws from its own key of the current ForwardPass: y = x * keep / (1 - p).

    Without a pass it draws from MLX's global random state, which a checkpointed layer would advance twice.
    """

    def __init__(self, p: float, index: int):
        super().__init__()
        self.p = p
        self.index = index

    def __call__(self, x: mx.array) -> mx.array:
        """Drop elements of x, any shape, in training; the identity otherwise."""
        if self.p == 0 or not self.training:
            return x
        this = _current.get()
        key = None if this is None or this.dropout_keys is None else this.dropout_keys[self.index]
        keep = mx.random.bernoulli(1 - self.p, x.shape, key=key)
        return mx.where(keep, x * (1 / (1 - self.p)), 0).astype(x.dtype)


class LoRALinear(nn.Module):
    """A frozen linear layer plus a low-rank update: y = linear(x) + scale (x A) B.

    lora_a is [D, r], lora_b [r, F], both float32 masters that are cast to the dtype of x in the forward. The names
    of children and leaves are mlx-lm's, so that its tools load what is trained here.
    """

    def __init__(self, linear: nn.Module, rank: int, scale: float, dropout: Dropout):
        super().__init__()
        dims = layouts.input_dims(linear)
        bound = 1 / math.sqrt(dims)
        self.linear = linear
        self.dropout = dropout
        self.scale = scale
        self.lora_a = mx.random.uniform(-bound, bound, (dims, rank))
        self.lora_b = mx.zeros((rank, layouts.output_dims(linear)))

    def low_rank_input(self, x: mx.array) -> mx.array:
        """dropout(x) A; x [..., D] -> [..., r], in the dtype of x."""
        return self.dropout(x) @ self.lora_a.astype(x.dtype)

    def __call__(self, x: mx.array) -> mx.array:
        """Map x [..., D] to [..., F]."""
        return reference.low_rank(self.linear(x), self.low_rank_input(x), self.lora_b, self.scale)

    def fuse(self, dequantize: bool = False) -> nn.Module:
        """Merge the update, W + scale (A B)^T, computed in float32 and rounded once.

        A quantized base gets its own bits again unless `dequantize`.
        """
        linear = self.linear
        weight = _dequantized(linear)
        dense = nn.Linear(1, 1, bias=False)
        delta = self.scale * (self.lora_a @ self.lora_b).T  # [F, D]
        dense.weight = (weight.astype(mx.float32) + delta).astype(weight.dtype)
        if "bias" in linear:
            dense.bias = linear.bias
        if isinstance(linear, QUANTIZED) and not dequantize:
            return dense.to_quantized(linear.group_size, linear.bits, linear.mode)
        return dense


class GatedMLP(nn.Module):
    """A gated MLP whose gate, up and down projections carry adapters; it sees what the mask needs.

    h = phi(z) u with z = gate(x), u = up(x); y = down(h). The children have the names that the original module
    gave them, so that parameter paths are those of mlx-lm's own LoRA.
    """

    def __init__(
        self,
        path: str,
        original: nn.Module,
        layout: Layout,
        activation: Activation,
        projections: Mapping[str, nn.Module],
        parameters: NAParameters,
    ):
        super().__init__()
        self.path = path
        self.layout = layout
        self.activation = activation
        self.parameters_na = parameters
        # Outside the module tree: its projections are already in it, through the adapters.
        object.__setattr__(self, "original", original)
        for name in layout.projections:
            self[name] = projections[name]

    @property
    def boundaries(self) -> tuple[float, ...]:
        """Boundaries of the partition in use: the config's where it fits the activation, else the activation's own."""
        own = self.activation.boundaries
        given = self.parameters_na.boundaries
        return given if given is not None and len(given) == len(own) else own

    @property
    def channels(self) -> int:
        """Number of gate channels F."""
        gate = self[self.layout.gate]
        return layouts.output_dims(gate.linear if isinstance(gate, LoRALinear) else gate)

    def scaled_paths(self) -> list[str]:
        """Full paths of the lora_b whose steps the method scales."""
        names = {"gate": self.layout.gate, "up": self.layout.up}
        return [
            f"{self.path}.{names[branch]}.lora_b"
            for branch in self.parameters_na.branches
            if isinstance(self[names[branch]], LoRALinear)
        ]

    def __call__(self, x: mx.array) -> mx.array:
        """Map x [..., D] to [..., D]."""
        this = _current.get()
        gate, up = self[self.layout.gate], self[self.layout.up]
        u = up(x)
        if isinstance(gate, LoRALinear):
            z0 = gate.linear(x)
            route = None if this is None else this.routes.get(self.path)
            if route is None:
                z = reference.low_rank(z0, gate.low_rank_input(x), gate.lora_b, gate.scale)
            else:
                z = _routed(gate, x, z0, route)
        else:
            z = z0 = gate(x)
        if this is not None and this.weights is not None:
            this.seen[self.path] = reference.statistics(
                self.activation, self.parameters_na.statistic, self.boundaries, z0, z, u, this.weights
            )
        return self[self.layout.down](reference.gated_product(self.activation, z, u))

    def fuse(self, bits: int | None, dequantize: bool) -> nn.Module:
        """Give back the original module with every adapter merged into its projection, see `fuse_module`."""
        for name in self.layout.projections:
            self.original[name] = fuse_module(self[name], bits, dequantize)
        return self.original


def _routed(gate: LoRALinear, x: mx.array, z0: mx.array, mask: mx.array) -> mx.array:
    """Gate pre-activation whose gradient reaches lora_a through the mask [F], and x and lora_b whole."""
    dropped = gate.dropout(x)
    a = gate.lora_a.astype(x.dtype)
    to_x = dropped @ mx.stop_gradient(a)
    to_a = mx.stop_gradient(dropped) @ a
    product: Any = reference.routed_product(to_x, to_a, gate.lora_b.astype(x.dtype), mask)
    return z0 + (gate.scale * product).astype(z0.dtype)


def _dequantized(base: nn.Module) -> mx.array:
    """Weight of a dense or quantized layer as a dense array."""
    if not isinstance(base, QUANTIZED):
        return base.weight
    return mx.dequantize(
        base.weight,
        base.scales,
        base.get("biases"),
        group_size=base.group_size,
        bits=base.bits,
        mode=base.mode,
    )


def fuse_module(module: nn.Module, bits: int | None, dequantize: bool) -> nn.Module:
    """Merge one adapter into its base; a module without an adapter comes back as it is.

    Args:
        module: any module.
        bits: what a quantized base becomes; None for the bits that it has.
        dequantize: leave a quantized base dense instead.
    """
    if not isinstance(module, LoRALinear | LoRASwitchLinear | LoRAEmbedding | DoRALinear | DoRAEmbedding):
        return module
    base = module.get("linear", module.get("embedding"))
    dense = module.fuse(dequantize=True)
    if dequantize or not isinstance(base, QUANTIZED):
        return dense
    if bits in (None, base.bits):
        return dense.to_quantized(base.group_size, base.bits, base.mode)
    # Only affine quantization knows other widths, in groups of 32, 64 or 128.
    return dense.to_quantized(base.group_size if base.mode == "affine" else 32, bits, "affine")


@contextmanager
def recomputed(layers: list[nn.Module]) -> Iterator[None]:
    """Recompute these layers' activations in the backward pass instead of keeping them.

    Layers may be of several classes. A class is changed only inside the context, and only for the layers named.
    """
    chosen = {id(layer) for layer in layers}
    forwards = {cls: cls.__call__ for cls in {type(layer) for layer in layers}}

    def patched(forward):
        def call(layer, *args, **kwargs):
            if id(layer) not in chosen:
                return forward(layer, *args, **kwargs)

            def inner(parameters, *args, **kwargs):
                layer.update(parameters)
                return forward(layer, *args, **kwargs)

            return mx.checkpoint(inner)(layer.trainable_parameters(), *args, **kwargs)

        return call

    try:
        for cls, forward in forwards.items():
            cls.__call__ = patched(forward)
        yield
    finally:
        for cls, forward in forwards.items():
            cls.__call__ = forward
