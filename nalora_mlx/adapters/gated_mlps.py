"""Gated MLPs that NA-LoRA acts on, dense and with experts."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from nalora_mlx.adapters import layouts
from nalora_mlx.adapters.forward_pass import Gate, current_pass
from nalora_mlx.adapters.layers import Adapter, low_rank_dtype
from nalora_mlx.adapters.layouts import Layout, Match
from nalora_mlx.core.config import NAParameters
from nalora_mlx.ops.activations import Activation
from nalora_mlx.ops.kernels import selfcheck
from nalora_mlx.ops.kernels.fused import GateUpLayout, Variant
from nalora_mlx.ops.kernels.gated_residual import gated_residual
from nalora_mlx.ops.kernels.low_rank import LowRank

SORT_ROWS = 64  # from this many rows on, sorting by expert pays off: each expert's weights are read once (as in mlx-lm)


class GatedMLP(nn.Module):
    """A gated MLP whose projections may be adapters, and which collects the statistics that NA-LoRA needs.

    h = phi(z) u with z = gate(x), u = up(x); y = down(h). Children have the names of the original module's, so
    parameter paths equal those of mlx-lm's LoRA. `routing` stands for the projections' arguments after x, see
    `Adapter`.

    Args:
        match: the original module.
        layout: its layout, with `gate_first` as identified.
        activation: phi.
        projections: name -> the projection, or its adapter.
        parameters: the NA settings.

    Attributes:
        original: the original module, which merging restores; not part of the module tree.
        precise: whether the product phi(z) u is computed in float32. If not, it is rounded after every operation, as
            some models do.
        sees_tokens: whether the rows of its input are those of the batch's tokens. If not, as in a vision tower, they
            have no padding, and the module counts them itself.
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
        self.na_parameters = parameters
        self.precise = True
        self.sees_tokens = True
        # Bypasses nn.Module: the original's projections are in the module tree already, inside the adapters.
        object.__setattr__(self, "original", match.module)
        for name in layout.projections:
            self[name] = projections[name]
        if layout.norm:
            self[layout.norm] = match.module[layout.norm]

    # --- what training asks for -----------------------------------------------------------------------------

    @property
    def boundaries(self) -> tuple[float, ...]:
        """Boundaries of the partition: the config's if their number fits the activation, else the activation's own."""
        own = self.activation.boundaries
        given = self.na_parameters.boundaries
        return given if given is not None and len(given) == len(own) else own

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a value per gate channel: [F], or [E, F] with experts."""
        gate = self[self.layout.gate]
        width = layouts.output_dims(gate.linear if isinstance(gate, Adapter) else gate)
        channels = width // 2 if self.layout.is_joint else width
        return (self.experts, channels) if self.experts else (channels,)

    def step_factors(self, multipliers: mx.array) -> dict[str, mx.array]:
        """Return the factors on the optimizer steps of lora_b, by parameter path.

        Args:
            multipliers: one per gate channel, [F] or [E, F].
        """
        ones = mx.ones_like(multipliers)
        gate, up = (multipliers if b in self.na_parameters.branches else ones for b in ("gate", "up"))
        factors = {self.layout.gate: gate, self.layout.up: up}
        if self.layout.is_joint:
            factors = {self.layout.gate: self._join(gate, up)}
        return {
            f"{self.path}.{name}.lora_b": self[name].broadcast_channels(factor)
            for name, factor in factors.items()
            if isinstance(self[name], Adapter) and factor is not ones
        }

    def _join(self, gate: mx.array, up: mx.array) -> mx.array:
        """Concatenate values per channel of gate and up in the order of the joint projection."""
        return mx.concatenate([gate, up] if self.layout.gate_first else [up, gate], axis=-1)

    @property
    def variant(self) -> Variant:
        """The variant of the gated residual that this module computes in training."""
        gate_up_layout: GateUpLayout = "separate"
        if self.layout.is_joint:
            gate_up_layout = "gate first" if self.layout.gate_first else "up first"
        return Variant(
            self.activation,
            gate_up_layout,
            self.na_parameters.statistic,
            self.boundaries,
            experts=self.experts,
            precise=self.precise,
        )

    def verify_kernels(self, dtype: mx.Dtype, rank: int) -> None:
        """Check the kernels that this module will use in a model of a dtype. Must not run inside a trace."""
        all_adapted = all(isinstance(self[name], Adapter) for name in self._input_projections)
        selfcheck.verify_kernels(self.variant, dtype, low_rank_dtype(dtype), rank if all_adapted else 0)

    # --- forward --------------------------------------------------------------------------------------------

    def __call__(self, x: mx.array) -> mx.array:
        """Map x [..., D] to [..., D]."""
        if self.layout.norm:
            x = self[self.layout.norm](x)
        y = self[self.layout.down](self._product(x.reshape(-1, x.shape[-1])))
        return y.reshape(*x.shape[:-1], y.shape[-1])

    @property
    def _input_projections(self) -> tuple[str, ...]:
        """Names of the projections of x: gate and up, or the joint one."""
        return (self.layout.gate,) if self.layout.is_joint else (self.layout.gate, self.layout.up)

    def _project(self, x: mx.array, *routing: Any) -> tuple[LowRank, ...]:
        """Return the outputs of the projections of x: gate and up, or the joint one."""
        context = current_pass()
        route = None if context is None else context.routes.get(self.path)
        if route is not None and self.layout.is_joint:
            route = self._join(route, mx.ones_like(route))
        outputs = []
        for name in self._input_projections:
            module = self[name]
            if isinstance(module, Adapter):
                is_gate = name == self.layout.gate
                outputs.append(module.low_rank(x, *routing, route=route if is_gate else None))
            else:
                outputs.append(LowRank(module(x, *routing), 0.0, None, None, None, None, *routing))
        return tuple(outputs)

    def _product(self, x: mx.array, *routing: Any, tokens: mx.array | None = None) -> mx.array:
        """Return h = phi(z) u, and record statistics if a training forward asks for them.

        Args:
            x: [..., D].
            routing: see the class.
            tokens: the token of each row of x; None if row i is token i.
        """
        projections = self._project(x, *routing)
        context = current_pass()
        if context is not None and context.gates is not None:
            z, _ = self.variant.split(tuple(one.output() for one in projections))
            context.gates[self.path] = Gate(z.reshape(-1, z.shape[-1]))
        if context is None or context.token_mask is None:
            return gated_residual(self.variant, projections)[0]
        rows = math.prod(projections[0].base.shape[:-1])
        weights = context.token_mask.reshape(-1)
        if not self.sees_tokens:
            weights = mx.ones((rows,))
        elif tokens is not None:
            weights = weights[tokens]
        variant = replace(self.variant, diagnose=context.diagnose)
        h, statistics = gated_residual(variant, projections, weights)
        if not self.sees_tokens and not self.experts:
            statistics = statistics | {"tokens": mx.sum(weights)}
        context.observe(self.path, {name: mx.stop_gradient(array) for name, array in statistics.items()})
        return h


class GatedExperts(GatedMLP):
    """The gated MLPs of experts, with each row of x going to some of them.

    Statistics are per expert and channel.
    """

    def __call__(self, x: mx.array, experts: mx.array) -> mx.array:  # type: ignore[override]
        """Map x [..., D], and the k experts of each row [..., k], to [..., k, D]."""
        experts = mx.stop_gradient(experts)
        chosen = experts.reshape(-1)  # [N k]
        tokens = mx.arange(chosen.size) // experts.shape[-1]
        order = mx.argsort(chosen) if chosen.size >= SORT_ROWS else None
        if order is not None:
            chosen, tokens = chosen[order], tokens[order]
        rows = x.reshape(-1, 1, x.shape[-1])[tokens]  # [N k, 1, D]
        is_sorted = order is not None
        y = self[self.layout.down](self._product(rows, chosen, is_sorted, tokens=tokens), chosen, is_sorted)
        if order is not None:
            y = y[mx.argsort(order)]
        context = current_pass()
        if context is not None and context.gates is not None:
            context.gates[self.path] = _by_expert(context.gates[self.path].z, experts, order)
        return y.reshape(*experts.shape, y.shape[-1])


def _by_expert(z: mx.array, experts: mx.array, order: mx.array | None) -> Gate:
    """Return pre-activations with the experts of each token in the order of their numbers.

    Args:
        z: [N k, F].
        experts: [..., k].
        order: the order of the rows of z; None for that of `experts`.
    """
    if order is not None:
        z = z[mx.argsort(order)]
    experts = experts.reshape(-1, experts.shape[-1])  # [N, k]
    by_number = mx.argsort(experts, axis=-1)
    z = mx.take_along_axis(z.reshape(*experts.shape, -1), by_number[..., None], axis=1)
    return Gate(z, mx.take_along_axis(experts, by_number, axis=-1))
