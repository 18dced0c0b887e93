"""The gated residual h = phi(z) u as one operation, with its statistics and its own backward.

z = g0 + s a_g B_g and u = u0 + s a_u B_u, [..., F].

Forward:

1. Where a kernel runs and the rank is small, the kernel computes the low-rank products itself, and z and u are never
   written to memory. Only g0, u0, a_g and a_u are stored for the backward.
2. Elsewhere, matrix products compute z and u, and the operation starts from these. It stores z and u.

Backward, given the gradient dh of h. It recomputes phi and phi':

    dz = dh u phi'(z)        d g0 = dz, d a_g = s dz B_g^T, d B_g = s a_g^T dz
    du = dh phi(z)           likewise for u0, a_u and B_u

If the activation transforms the up branch (clips it, for example), u in h and dz is the transformed one, and du is
multiplied by the transform's derivative.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

import mlx.core as mx

from nalora_mlx.ops.custom_function import custom_function
from nalora_mlx.ops.kernels import fused, reference
from nalora_mlx.ops.kernels.backend import REFERENCE, backend_for
from nalora_mlx.ops.kernels.fused import Operands, Variant
from nalora_mlx.ops.kernels.low_rank import LowRank


def gated_residual(
    variant: Variant, projections: tuple[LowRank, ...], weights: mx.array | None = None
) -> tuple[mx.array, dict[str, mx.array]]:
    """Return h = phi(z) u, and the sums over tokens that `variant` asks for.

    Args:
        variant: activation, layout of gate and up, and statistics.
        projections: gate and up with bases [..., F], or the one projection that computes both, [..., 2 F]; all bases
            in one dtype.
        weights: one per row, 1 for tokens and 0 for padding; without weights there are no statistics.

    Returns:
        h [..., F] in the dtype of the bases, and float32 statistics without gradient:

        responsiveness: [F] or [E, F].
        above_boundary: [R - 1, F] or [R - 1, E, F], with a partition.
        misalignment: [2], if `variant.diagnose`: the sums of |delta rho(z0) u| and |z (rho(z) - rho(z0)) u| with
            delta = z - z0.
        tokens: [E], with experts.
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
        h, sums = run_reference(variant, projections, weights)
    else:
        h, sums = run_kernel(backend, variant, projections, weights)
    statistics = {}
    if variant.statistic is not None and weights is not None:
        count = len(variant.boundaries)
        statistics["responsiveness"] = sums[0]
        if count:
            statistics["above_boundary"] = mx.stack(sums[1 : 1 + count])
        if variant.diagnose:
            statistics["misalignment"] = mx.stack(sums[1 + count :])
        if experts is not None:
            row_weights = mx.where(weights > 0, weights, 0)
            statistics["tokens"] = mx.zeros((variant.experts,)).at[experts.reshape(-1)].add(row_weights)
    return h.reshape(*shape[:-1], variant.features(shape[-1])), statistics


def _flatten_rows(array: mx.array) -> mx.array:
    """Return the array as [N, F]."""
    return array.reshape(-1, array.shape[-1])


def _as_tuple(arrays: mx.array | Sequence[mx.array]) -> tuple[mx.array, ...]:
    """Return the arguments of a vjp as a tuple; MLX passes a single array as it is."""
    return (arrays,) if isinstance(arrays, mx.array) else tuple(arrays)


# --- without a kernel ---------------------------------------------------------------------------------------------


def run_reference(
    variant: Variant, projections: tuple[LowRank, ...], weights: mx.array | None
) -> tuple[mx.array, list[mx.array]]:
    """Return h [N, F] and the sums of `reference.statistics`, computed by MLX's own operations.

    Forward and backward run on chunks of rows. The backward recomputes phi and phi' from z and u.
    """
    activation = variant.activation
    experts = None if projections[0].experts is None else projections[0].experts.reshape(-1)
    bases = tuple(_flatten_rows(p.base) for p in projections)
    rows = bases[0].shape[0]
    features = variant.features(bases[0].shape[-1])

    def product(*outputs: mx.array) -> mx.array:
        z, u = variant.split(outputs)
        return reference.gated_product(activation, z, u, variant.precise)

    def chunk_statistics(chunk: slice, outputs: tuple[mx.array, ...]) -> list[mx.array]:
        if variant.statistic is None or weights is None:
            return []
        z, u = variant.split(outputs)
        z0 = variant.split(tuple(base[chunk] for base in bases))[0] if variant.diagnose else None
        return reference.statistics(
            activation,
            variant.statistic,
            variant.boundaries,
            z0,
            z,
            u,
            weights[chunk],
            None if experts is None else experts[chunk],
            variant.experts,
        )

    @custom_function
    def operation(*outputs: mx.array) -> tuple[mx.array, ...]:
        def forward(chunk: slice) -> tuple[mx.array, list[mx.array]]:
            chunk_outputs = tuple(y[chunk] for y in outputs)
            return product(*chunk_outputs), chunk_statistics(chunk, chunk_outputs)

        chunks, sums = zip(*reference.map_row_chunks(forward, rows, features), strict=True)
        totals = (sum(per_chunk[1:], per_chunk[0]) for per_chunk in zip(*sums, strict=True))
        return (reference.concatenate_chunks(chunks), *totals)

    @operation.vjp
    def _(outputs, cotangents, _):
        dh, *_ = _as_tuple(cotangents)
        # Wait for dh. Otherwise mx.compile would identify this phi with the forward's, and store it.
        outputs = mx.depends(list(_as_tuple(outputs)), [dh])

        def backward(chunk: slice) -> tuple[mx.array, ...]:
            return reference.gradients(product, tuple(y[chunk] for y in outputs), dh[chunk])

        chunks = reference.map_row_chunks(backward, rows, features)
        return tuple(reference.concatenate_chunks(part) for part in zip(*chunks, strict=True))

    h, *sums = operation(*(_flatten_rows(p.output()) for p in projections))
    return h, sums


# --- with a kernel ------------------------------------------------------------------------------------------------


def run_kernel(
    backend: str, variant: Variant, projections: tuple[LowRank, ...], weights: mx.array | None
) -> tuple[mx.array, list[mx.array]]:
    """Return the same as `run_reference`, computed by a Metal or CUDA kernel.

    1. If the low-rank products do not fit in the kernel, compute z and u first. They become the bases.
    2. Run the forward kernel, which returns h and the sums per tile of rows.
    3. Add up the sums of all tiles, per expert if there are experts.

    The backward kernel returns the gradients of the bases. Small matrix products turn these into the gradients of the
    low-rank inputs and B.
    """
    experts = projections[0].experts
    tiles = None
    if experts is not None:
        tiles = fused.expert_tiles(experts.reshape(-1), variant.experts)
    fits = fused.fits_in_kernel(projections)
    if not fits:
        z0 = _flatten_rows(projections[0].base) if variant.diagnose else None
        projections = tuple(LowRank(p.output(), experts=p.experts) for p in projections)
    else:
        z0 = None
    scales = (projections[0].scale, projections[-1].scale)

    def group(primals: tuple[mx.array, ...]) -> list[tuple[mx.array, ...]]:
        """Return (base, low, b[, routed]) of each projection."""
        remaining = iter(primals)
        return [tuple(islice(remaining, 1 + len(p.lora_arrays))) for p in projections]

    def operands(primals: tuple[mx.array, ...]) -> Operands:
        groups = group(primals)
        lows, bs = ([arrays[i] for arrays in groups] if fits else () for i in (1, 2))
        bases = tuple(_flatten_rows(arrays[0]) for arrays in groups)
        return Operands(bases, tuple(map(_flatten_rows, lows)), tuple(bs), scales, z0, weights, tiles)

    @custom_function
    def operation(*primals: mx.array) -> tuple[mx.array, ...]:
        return fused.forward(backend, variant, operands(primals))

    @operation.vjp
    def _(primals, cotangents, _):
        primals, (dh, *_) = _as_tuple(primals), _as_tuple(cotangents)
        gradients = []
        base_gradients = fused.backward(backend, variant, operands(primals), dh)
        for p, (base, *arrays), d in zip(projections, group(primals), base_gradients, strict=True):
            d = d.reshape(base.shape)
            gradients.append(d)
            if arrays:
                gradients += p.gradients(tuple(arrays), d, p.scale)
        return tuple(gradients)

    h, tile_sums = operation(*(a for p in projections for a in (p.base, *p.lora_arrays)))
    if variant.statistic is None:
        return h, []
    if tiles is None:
        sums = list(tile_sums.sum(axis=1))
    else:
        zeros = mx.zeros((variant.experts, tile_sums.shape[-1]))
        sums = [zeros.at[tiles[:, 0]].add(one) for one in tile_sums]
    count = 1 + len(variant.boundaries)
    return h, sums[:count] + [one.sum() for one in sums[count:]]
