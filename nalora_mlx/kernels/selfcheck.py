"""Try kernels against the reference before they are used.

A kernel that was written without the machine it runs on must not be trusted on it. Before a model trains, each kind of
kernel that it will use runs once on a small input, forward, statistics and backward. One that is wrong, or does not
compile, is not used in this process: the reference takes its place, with one warning.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx

from nalora_mlx.kernels import fused
from nalora_mlx.kernels.backend import Kind, backend, faults
from nalora_mlx.kernels.fused import Variant
from nalora_mlx.kernels.gated_residual import by_kernel, by_reference
from nalora_mlx.kernels.low_rank import LowRank

# Largest error relative to the largest value: the dtype's own rounding, and sums in another order.
TOLERANCE = {mx.float32: 1e-5, mx.float16: 2e-3, mx.bfloat16: 1.6e-2}
FEATURES = (20, 7)  # channels in whole groups of four, and not
EXPERTS = 3


def prepare(variant: Variant, dtype: mx.Dtype, low_dtype: mx.Dtype, rank: int) -> None:
    """Check the kernels that will train one gated MLP, unless that was done; never inside a trace.

    Args:
        variant: with the statistics that are taken in training.
        dtype: of the frozen projections' outputs.
        low_dtype: of the low-rank inputs.
        rank: of the adapters, 0 without one on both branches.
    """
    chosen = backend()
    if chosen == "reference" or variant.activation.kernel is None:
        return
    ranks = {0, rank if rank <= fused.MAX_RANK else 0}
    quiet = replace(variant, statistic=None, boundaries=(), diagnose=False)
    diagnosing = [replace(variant, diagnose=True)] if variant.activation.selection else []
    for one in (variant, *diagnosing, quiet):
        for inside in ranks:
            kind = chosen, one, dtype, low_dtype if inside else None, inside
            if kind in faults:
                continue
            faults[kind] = fault(kind)
            if faults[kind] is not None:
                warnings.warn(
                    f"the {chosen} kernel of {one.activation.name} in {dtype} is not used: {faults[kind]}; "
                    "the same is computed without it, more slowly",
                    stacklevel=2,
                )


def fault(kind: Kind) -> str | None:
    """Run a kind of kernel and the reference on small inputs; what is wrong with it, None if nothing is."""
    chosen, variant, dtype, low_dtype, rank = kind
    worst = 0.0
    for features in FEATURES:
        projections, weights, dh = example(variant, dtype, low_dtype, rank, features)
        exact = tuple(_float32(p) for p in projections)
        try:
            got = _all(lambda *a: by_kernel(chosen, *a), variant, projections, weights, dh)
            mx.eval(got)
        except Exception as error:  # whatever a compiler or driver raises
            return f"it does not run ({(str(error).splitlines() or [type(error).__name__])[0]})"
        want = _all(by_reference, replace(variant, precise=True), exact, weights, dh.astype(mx.float32))
        for a, b in zip(got, want, strict=True):
            a, b = a.astype(mx.float32), b.astype(mx.float32)
            size: Any = mx.maximum(mx.abs(b).max(), 1e-30)
            off = (mx.abs(a - b).max() / size).item()
            worst = max(worst, off if math.isfinite(off) else math.inf)
    if worst > TOLERANCE[dtype]:
        return f"its result is off by {worst:.1e} of the largest value"
    return None


def example(
    variant: Variant, dtype: mx.Dtype, low_dtype: mx.Dtype | None, rank: int, features: int
) -> tuple[tuple[LowRank, ...], mx.array, mx.array]:
    """Small projections, weights of their rows with some padding, and a gradient of h, for any variant."""
    rows = fused.TILE + 5
    width = features if variant.halves == "separate" else 2 * features
    keys = iter(mx.random.split(mx.random.key(0), 16))  # keys of its own: the global state stays as it is

    def normal(*shape: int, dtype: mx.Dtype = dtype) -> mx.array:
        return mx.random.normal(shape, key=next(keys)).astype(dtype)

    experts = None
    if variant.experts:
        experts = mx.sort(mx.random.randint(0, min(EXPERTS, variant.experts), (rows,), key=next(keys)))
    lead = (rows, 1) if variant.experts else (rows,)
    projections = []
    low_dtype = low_dtype or dtype
    rank = rank or fused.MAX_RANK + 1  # so that the product is made outside
    shape = (variant.experts, width, rank) if variant.experts else (rank, width)
    for _ in range(2 if variant.halves == "separate" else 1):
        low, b = normal(*lead, rank, dtype=low_dtype), normal(*shape, dtype=low_dtype)
        projections.append(LowRank(normal(*lead, width), 0.5, low, b, experts=experts, is_sorted=True))
    weights = (mx.arange(rows) % 5 != 0).astype(mx.float32)
    return tuple(projections), weights, normal(rows, features)


def _float32(p: LowRank) -> LowRank:
    base, *arrays = (a.astype(mx.float32) for a in (p.base, *p.arrays))
    return _with(p, base, *arrays)


def _with(p: LowRank, base: mx.array, low: mx.array, b: mx.array) -> LowRank:
    return replace(p, base=base, low=low, b=b)


def _all(
    run: Callable[..., tuple[mx.array, list[mx.array]]],
    variant: Variant,
    projections: tuple[LowRank, ...],
    weights: mx.array,
    dh: mx.array,
) -> list[mx.array]:
    """h, the sums, and the gradients of bases, low-rank inputs and B, from one way of computing them."""

    def forward(*arrays: mx.array) -> list[mx.array]:
        new = (_with(p, *arrays[3 * i : 3 * i + 3]) for i, p in enumerate(projections))
        h, sums = run(variant, tuple(new), weights)
        return [h, *sums]

    arrays = [a for p in projections for a in (p.base, *p.arrays)]
    outputs = forward(*arrays)
    cotangents = [dh.astype(outputs[0].dtype), *map(mx.zeros_like, outputs[1:])]
    return [*outputs, *mx.vjp(forward, arrays, cotangents)[1]]
