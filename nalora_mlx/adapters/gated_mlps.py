"""The modules of NA-LoRA: adapters of single projections, gated MLPs, and how they are merged."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from nalora_mlx.adapters import layouts
from nalora_mlx.adapters.forward_pass import current
from nalora_mlx.adapters.layers import Adapter, low_dtype
from nalora_mlx.adapters.layouts import Layout, Match
from nalora_mlx.core.config import NAParameters
from nalora_mlx.ops.activations import Activation
from nalora_mlx.ops.kernels import selfcheck
from nalora_mlx.ops.kernels.fused import Variant
from nalora_mlx.ops.kernels.gated_residual import gated_residual
from nalora_mlx.ops.kernels.low_rank import LowRank


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
