"""Try kernels against the reference before they are used.

A kernel that was written without the machine it runs on must not be trusted on it. Before a model trains, each kind of
kernel that it will use runs once on small inputs: forward, statistics and backward. At the first that is wrong, or does
not compile, there is one warning, and the reference takes the place of all kernels of this process.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx

from nalora_mlx.ops.kernels import fused
from nalora_mlx.ops.kernels.backend import REFERENCE, Kind, backend, checked, refused
from nalora_mlx.ops.kernels.fused import Variant
from nalora_mlx.ops.kernels.gated_residual import by_kernel, by_reference
from nalora_mlx.ops.kernels.low_rank import LowRank

# Largest error relative to the largest value: a result's own rounding, and float32 sums in another order. The inputs
# are such that z and u have no rounding in any dtype.
TOLERANCE = {mx.float32: 1e-5, mx.float16: 2e-3, mx.bfloat16: 1.6e-2}
PRODUCT_TOLERANCE = (
    2e-3  # of matrix products, at least: a GPU may round what it multiplies to eleven bits (TF32)
)
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
    if chosen == REFERENCE or variant.activation.kernel is None:
        return
    ranks = {0, rank if rank <= fused.MAX_RANK else 0}
    diagnosing = [replace(variant, diagnose=True)] if variant.activation.selection else []
    for one in (variant, *diagnosing, variant.without_statistics):
        for inside in ranks:
            kind = chosen, one, dtype, low_dtype if inside else None, inside
            if kind in checked or chosen in refused:
                continue
            why = fault(kind)
            if why is None:
                checked.add(kind)
                continue
            refused.add(chosen)
            warnings.warn(
                f"no {chosen} kernel is used, since that of {one.activation.name} in {dtype} is wrong here: {why}; "
                "the same is computed without them, more slowly",
                stacklevel=2,
            )


def fault(kind: Kind) -> str | None:
    """Run a kind of kernel and the reference on small inputs; what is wrong with it, None if nothing is."""
    chosen, variant, dtype, low_dtype, rank = kind
    for features, routed in zip(FEATURES, (False, True), strict=True):
        projections, weights, dh = example(variant, dtype, low_dtype, rank, features, routed)
        try:
            got = _all(lambda *a: by_kernel(chosen, *a), variant, projections, weights, dh)
            mx.eval(got)
        except Exception as error:  # whatever a compiler or driver raises
            return f"it does not run ({(str(error).splitlines() or [type(error).__name__])[0]})"
        with mx.stream(mx.cpu):  # whose products are of float32, and whose arithmetic is of other hands
            exact = tuple(_float32(p) for p in projections)
            want = _all(by_reference, replace(variant, precise=True), exact, weights, dh.astype(mx.float32))
            for a, b, (expected, tolerance) in zip(got, want, _results(variant, projections), strict=True):
                if a.dtype != expected:
                    return f"a result is of {a.dtype} instead of {expected}"
                size: Any = mx.maximum(mx.abs(b).max(), 1e-30)
                off: Any = (mx.abs(a.astype(mx.float32) - b).max() / size).item()
                if not (math.isfinite(off) and off <= tolerance):
                    return f"a result is off by {off:.1e} of the largest value"
    return None


def _results(variant: Variant, projections: tuple[LowRank, ...]) -> list[tuple[mx.Dtype, float]]:
    """Dtype and tolerance of each array that `_all` returns."""
    dtype = projections[0].base.dtype
    found = [(dtype, TOLERANCE[dtype])] + variant.sums * [(mx.float32, TOLERANCE[mx.float32])]
    for p in projections:
        found.append((dtype, TOLERANCE[dtype]))
        found += [(a.dtype, max(PRODUCT_TOLERANCE, TOLERANCE[dtype])) for a in p.arrays]
    return found


def example(
    variant: Variant,
    dtype: mx.Dtype,
    low_dtype: mx.Dtype | None,
    rank: int,
    features: int,
    routed: bool = False,
) -> tuple[tuple[LowRank, ...], mx.array, mx.array]:
    """Small projections, weights of their rows with some padding, and a gradient of h, for any variant.

    z and u are odd multiples of 1/16 below 16: exact in each dtype, and never at a kink or boundary of an activation.
    """
    rows = fused.TILE + 5
    joined = variant.gate_up_layout != "separate"
    width = 2 * features if joined else features
    keys = iter(mx.random.split(mx.random.key(0), 16))  # keys of its own: the global state stays as it is

    def multiples(step: float, *shape: int) -> mx.array:
        return step * mx.round(mx.random.normal(shape, key=next(keys)) / step)

    experts = None
    if variant.experts:
        experts = mx.sort(mx.random.randint(0, min(EXPERTS, variant.experts), (rows,), key=next(keys)))
    lead = (rows, 1) if variant.experts else (rows,)
    projections = []
    low_dtype = low_dtype or dtype
    rank = rank or fused.MAX_RANK + 1  # so that the product is made outside
    shape = (variant.experts, width, rank) if variant.experts else (rank, width)
    for branch in range(1 if joined else 2):
        low, b = (multiples(0.5, *one).astype(low_dtype) for one in ((*lead, rank), shape))
        base = (multiples(0.125, *lead, width) + 0.0625).astype(dtype)
        p = LowRank(base, 0.5, low, b, experts=experts, is_sorted=True)
        if routed and branch == 0:
            channels = (variant.experts, width) if variant.experts else (width,)
            mask = (multiples(0.5, *channels) > 0).astype(mx.float32)
            p = replace(p, routed=low, route=mask)
        projections.append(p)
    weights = (mx.arange(rows) % 5 != 0).astype(mx.float32)
    return tuple(projections), weights, mx.random.normal((rows, features), key=next(keys)).astype(dtype)


def _float32(p: LowRank) -> LowRank:
    return with_arrays(p, [a.astype(mx.float32) for a in (p.base, *p.arrays)])


def with_arrays(p: LowRank, arrays: list[mx.array]) -> LowRank:
    """A projection with other arrays for its base and for those that `LowRank.arrays` lists."""
    new: dict[str, Any] = dict(zip(("base", "low", "b", "routed"), arrays, strict=False))
    return replace(p, **new)


def _all(
    run: Callable[..., tuple[mx.array, list[mx.array]]],
    variant: Variant,
    projections: tuple[LowRank, ...],
    weights: mx.array,
    dh: mx.array,
) -> list[mx.array]:
    """h, the sums, and the gradients of bases, low-rank inputs and B, from one way of computing them."""

    def forward(*arrays: mx.array) -> list[mx.array]:
        left = iter(arrays)
        new = tuple(with_arrays(p, [next(left) for _ in (p.base, *p.arrays)]) for p in projections)
        h, sums = run(variant, new, weights)
        return [h, *sums]

    arrays = [a for p in projections for a in (p.base, *p.arrays)]
    outputs = forward(*arrays)
    cotangents = [dh.astype(outputs[0].dtype), *map(mx.zeros_like, outputs[1:])]
    return [*outputs, *mx.vjp(forward, arrays, cotangents)[1]]
