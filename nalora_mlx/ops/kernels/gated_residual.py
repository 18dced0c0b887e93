"""The gated residual as one operation: h = phi(z) u, its statistics, and a backward that keeps g0, u0, a_g, a_u alone.

z = g0 + s a_g B_g and u = u0 + s a_u B_u, [..., F]. Where a kernel runs and the rank is small, the products are made
inside it and neither z nor u is ever in memory; elsewhere they are made by matrix products, and the operation starts
from z and u. The backward recomputes phi and phi' in either case. With dh the gradient of h,

    dz = dh u phi'(z)        d g0 = dz, d a_g = s dz B_g^T, d B_g = s a_g^T dz
    du = dh phi(z)           likewise; and for an up branch that the activation clips, times its derivative
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import mlx.core as mx

from nalora_mlx.ops.kernels import fused, reference
from nalora_mlx.ops.kernels.backend import REFERENCE, backend_for
from nalora_mlx.ops.kernels.fused import Operands, Variant
from nalora_mlx.ops.kernels.low_rank import LowRank

_custom_function: Any = mx.custom_function  # typed as an object


def gated_residual(
    variant: Variant, projections: tuple[LowRank, ...], weights: mx.array | None = None
) -> tuple[mx.array, dict[str, mx.array]]:
    """h = phi(z) u, and sums over tokens where `variant` asks for them.

    Args:
        variant: activation, statistics and layout.
        projections: of gate and up, or the one that makes both; bases [..., F] or [..., 2F], in one dtype.
        weights: one per row, 1 for a real token and 0 for padding; without them no statistic is taken.

    Returns:
        h [..., F] in the dtype of the bases, and without gradient: responsiveness [F] or [E, F]; beyond [R-1, F] or
        [R-1, E, F] (with a partition); misalignment [2] (if diagnosed): sums of |delta rho(z0) u| and
        |z (rho(z) - rho(z0)) u| with delta = z - z0; tokens [E] (with experts).
    """
    if variant.statistic is None or weights is None:
        variant = variant.without_statistics
    if variant.activation.selection is None:
        variant = replace(variant, diagnose=False)
    shape = projections[0].base.shape
    experts = projections[0].experts
    if weights is not None:
        weights = weights.reshape(-1).astype(mx.float32)
    backend = backend_for(variant, projections)
    if backend == REFERENCE:
        h, sums = by_reference(variant, projections, weights)
    else:
        h, sums = by_kernel(backend, variant, projections, weights)
    seen = {}
    if variant.statistic is not None and weights is not None:
        count = len(variant.boundaries)
        seen["responsiveness"] = sums[0]
        if count:
            seen["above_boundary"] = mx.stack(sums[1 : 1 + count])
        if variant.diagnose:
            seen["misalignment"] = mx.stack(sums[1 + count :])
        if experts is not None:
            rows = mx.where(weights > 0, weights, 0)
            seen["tokens"] = mx.zeros((variant.experts,)).at[experts.reshape(-1)].add(rows)
    features = shape[-1] if variant.gate_up_layout == "separate" else shape[-1] // 2
    return h.reshape(*shape[:-1], features), seen


def _rows(array: mx.array) -> mx.array:
    return array.reshape(-1, array.shape[-1])


def _split(variant: Variant, arrays: tuple[mx.array, ...]) -> tuple[mx.array, mx.array]:
    """The gate's and the up branch's part of what the projections make."""
    if variant.gate_up_layout == "separate":
        return arrays[0], arrays[1]
    first, second = mx.split(arrays[0], 2, axis=-1)
    return (first, second) if variant.gate_up_layout == "gate first" else (second, first)


def _tuple(arrays: mx.array | Sequence[mx.array]) -> tuple[mx.array, ...]:
    """What MLX hands to a vjp: one array, or several."""
    return (arrays,) if isinstance(arrays, mx.array) else tuple(arrays)


# --- without a kernel ---------------------------------------------------------------------------------------------


def by_reference(
    variant: Variant, projections: tuple[LowRank, ...], weights: mx.array | None
) -> tuple[mx.array, list[mx.array]]:
    """H [N, F] and the sums as `reference.statistics` returns them, by MLX's own operations."""
    activation = variant.activation
    experts = None if projections[0].experts is None else projections[0].experts.reshape(-1)
    bases = tuple(_rows(p.base) for p in projections)
    rows = bases[0].shape[0]
    features = bases[0].shape[-1] // (1 if variant.gate_up_layout == "separate" else 2)

    def product(*ys: mx.array) -> mx.array:
        z, u = _split(variant, ys)
        return reference.gated_product(activation, z, u, variant.precise)

    def statistics(some: slice, ys: tuple[mx.array, ...]) -> list[mx.array]:
        if variant.statistic is None or weights is None:
            return []
        z, u = _split(variant, ys)
        z0 = _split(variant, tuple(base[some] for base in bases))[0] if variant.diagnose else None
        return reference.statistics(
            activation,
            variant.statistic,
            variant.boundaries,
            z0,
            z,
            u,
            weights[some],
            None if experts is None else experts[some],
            variant.experts,
        )

    @_custom_function
    def operation(*ys: mx.array) -> tuple[mx.array, ...]:
        def forward(some: slice) -> tuple[mx.array, list[mx.array]]:
            part = tuple(y[some] for y in ys)
            return product(*part), statistics(some, part)

        parts, sums = zip(*reference.by_chunks(forward, rows, features), strict=True)
        totals = (sum(one[1:], one[0]) for one in zip(*sums, strict=True))
        return (reference.joined(parts), *totals)

    @operation.vjp
    def _(ys, cotangents, _):
        dh, *_ = _tuple(cotangents)
        # After dh, or mx.compile would find the forward's phi to be the same and keep it instead of computing it again.
        ys = mx.depends(list(_tuple(ys)), [dh])

        def backward(some: slice) -> tuple[mx.array, ...]:
            return reference.gradients(product, tuple(y[some] for y in ys), dh[some])

        parts = reference.by_chunks(backward, rows, features)
        return tuple(reference.joined(part) for part in zip(*parts, strict=True))

    h, *sums = operation(*(_rows(p.output()) for p in projections))
    return h, sums


# --- with one -----------------------------------------------------------------------------------------------------


def by_kernel(
    backend: str, variant: Variant, projections: tuple[LowRank, ...], weights: mx.array | None
) -> tuple[mx.array, list[mx.array]]:
    """The same by a Metal or CUDA kernel."""
    experts = projections[0].experts
    tiles = None
    if experts is not None:
        tiles = fused.expert_tiles(experts.reshape(-1), variant.experts)
    inside = fused.fits(projections)
    if not inside:
        z0 = _rows(projections[0].base) if variant.diagnose else None
        projections = tuple(LowRank(p.output(), experts=p.experts) for p in projections)
    else:
        z0 = None
    scales = (projections[0].scale, projections[-1].scale)

    def parts(primals: tuple[mx.array, ...]) -> list[tuple[mx.array, ...]]:
        """Base, low, b (and routed, where the gradient is split) of each projection."""
        left = iter(primals)
        return [tuple(islice(left, 1 + len(p.arrays))) for p in projections]

    def operands(primals: tuple[mx.array, ...]) -> Operands:
        found = parts(primals)
        lows, bs = ([part[i] for part in found] if inside else () for i in (1, 2))
        bases = tuple(_rows(part[0]) for part in found)
        return Operands(bases, tuple(map(_rows, lows)), tuple(bs), scales, z0, weights, tiles)

    @_custom_function
    def operation(*primals: mx.array) -> tuple[mx.array, ...]:
        return fused.forward(backend, variant, operands(primals))

    @operation.vjp
    def _(primals, cotangents, _):
        primals, (dh, *_) = _tuple(primals), _tuple(cotangents)
        found = []
        ds = fused.backward(backend, variant, operands(primals), dh)
        for p, (base, *arrays), d in zip(projections, parts(primals), ds, strict=True):
            d = d.reshape(base.shape)
            found.append(d)
            if arrays:
                found += p.gradients(tuple(arrays), d, p.scale)
        return tuple(found)

    h, sums = operation(*(a for p in projections for a in (p.base, *p.arrays)))
    if variant.statistic is None:
        return h, []
    if tiles is None:
        totals = list(sums.sum(axis=1))
    else:
        empty = mx.zeros((variant.experts, sums.shape[-1]))
        totals = [empty.at[tiles[:, 0]].add(one) for one in sums]
    count = 1 + len(variant.boundaries)
    return h, totals[:count] + [one.sum() for one in totals[count:]]
