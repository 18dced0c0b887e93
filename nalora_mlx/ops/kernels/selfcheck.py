"""Self-checks that compare kernels with the reference on this machine before a model uses them.

A kernel that was written on another machine must not be trusted on this one. Before training, each kernel that the
model will use runs once on small inputs: forward, statistics and backward. If one is wrong or does not compile, there
is one warning, and this process uses the reference instead of all kernels.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx

from nalora_mlx.ops.kernels import backend, fused
from nalora_mlx.ops.kernels.backend import REFERENCE, KernelKey
from nalora_mlx.ops.kernels.fused import Variant
from nalora_mlx.ops.kernels.gated_residual import run_kernel, run_reference
from nalora_mlx.ops.kernels.low_rank import LowRank

# Largest error relative to the largest value: one rounding of the result, and float32 sums in another order. The inputs
# are chosen so that z and u are exact in every dtype.
TOLERANCE = {mx.float32: 1e-5, mx.float16: 2e-3, mx.bfloat16: 1.6e-2}
# At least this for matrix products, because a GPU may round their inputs to eleven bits (TF32).
PRODUCT_TOLERANCE = 2e-3
FEATURES = (20, 7)  # a multiple of the four channels per thread, and not one
EXPERTS = 3


def verify_kernels(variant: Variant, dtype: mx.Dtype, low_dtype: mx.Dtype, rank: int) -> None:
    """Check the kernels that will train one gated MLP, unless they were checked before. Must not run inside a trace.

    Warns and disables the backend if a kernel is wrong.

    Args:
        variant: with the statistics that training takes.
        dtype: of the frozen projections' outputs.
        low_dtype: of the low-rank inputs.
        rank: of the adapters; 0 if gate and up do not both have one.
    """
    chosen = backend.backend()
    if chosen == REFERENCE or variant.activation.kernel is None:
        return
    ranks = {0, rank if rank <= fused.MAX_RANK else 0}
    diagnosing = [replace(variant, diagnose=True)] if variant.activation.selection else []
    for one in (variant, *diagnosing, variant.without_statistics):
        for kernel_rank in ranks:
            key = KernelKey(chosen, one, dtype, low_dtype if kernel_rank else None, kernel_rank)
            if key in backend.verified or chosen in backend.disabled_backends:
                continue
            error = find_error(key)
            if error is None:
                backend.verified.add(key)
                continue
            backend.disabled_backends.add(chosen)
            warnings.warn(
                f"the {chosen} kernel of {one.activation.name} in {dtype} failed its self-check: {error}; "
                f"no {chosen} kernel is used, and MLX's own operations run instead, which is slower",
                stacklevel=2,
            )


def find_error(key: KernelKey, sizes: tuple[int, int] = FEATURES) -> str | None:
    """Compare a kernel with the reference on small inputs, and return what is wrong, or None.

    1. Make small inputs, by default 20 channels without a routed gradient, then 7 (not a multiple of four) with one.
    2. Run the kernel forward and backward.
    3. Run the reference in float32 on the CPU.
    4. Compare dtypes exactly, and values within a tolerance.

    Args:
        key: the kernel.
        sizes: numbers of channels, without and with a routed gradient.
    """
    chosen, variant, dtype, low_dtype, rank = key
    for features, routed in zip(sizes, (False, True), strict=True):
        projections, weights, dh = example_inputs(variant, dtype, low_dtype, rank, features, routed)
        try:
            got = outputs_and_gradients(lambda *a: run_kernel(chosen, *a), variant, projections, weights, dh)
            mx.eval(got)
        except Exception as error:  # compilers and drivers raise anything
            return f"it does not run ({(str(error).splitlines() or [type(error).__name__])[0]})"
        with mx.stream(mx.cpu):  # computes matrix products in full float32, with independent code
            projections32 = tuple(_to_float32(p) for p in projections)
            want = outputs_and_gradients(
                run_reference, replace(variant, precise=True), projections32, weights, dh.astype(mx.float32)
            )
            expected = _expected_outputs(variant, projections)
            for a, b, (expected_dtype, tolerance) in zip(got, want, expected, strict=True):
                if a.dtype != expected_dtype:
                    return f"a result has dtype {a.dtype} instead of {expected_dtype}"
                size: Any = mx.maximum(mx.abs(b).max(), 1e-30)
                relative: Any = (mx.abs(a.astype(mx.float32) - b).max() / size).item()
                if not (math.isfinite(relative) and relative <= tolerance):
                    return f"a result is off by {relative:.1e} of the largest value"
    return None


def _expected_outputs(variant: Variant, projections: tuple[LowRank, ...]) -> list[tuple[mx.Dtype, float]]:
    """Return dtype and tolerance of each array that `outputs_and_gradients` returns."""
    dtype = projections[0].base.dtype
    expected = [(dtype, TOLERANCE[dtype])] + variant.num_sums * [(mx.float32, TOLERANCE[mx.float32])]
    for p in projections:
        expected.append((dtype, TOLERANCE[dtype]))
        expected += [(a.dtype, max(PRODUCT_TOLERANCE, TOLERANCE[dtype])) for a in p.lora_arrays]
    return expected


def example_inputs(
    variant: Variant,
    dtype: mx.Dtype,
    low_dtype: mx.Dtype | None,
    rank: int,
    features: int,
    routed: bool = False,
) -> tuple[tuple[LowRank, ...], mx.array, mx.array]:
    """Make small inputs of the gated residual for any variant.

    z and u are odd multiples of 1/16 below 16: exact in each dtype, and never at a kink or boundary of an activation.

    Args:
        variant: the variant.
        dtype: of the frozen projections' outputs.
        low_dtype: of the low-rank inputs; None for `dtype`.
        rank: of the adapters; 0 for one that does not fit in the kernel.
        features: F.
        routed: whether the gate has a routed gradient.

    Returns:
        The projections, weights of the rows [N] with some padding, and a gradient of h [N, F].
    """
    rows = fused.TILE + 5
    width = 2 * features if variant.is_joint else features
    keys = iter(mx.random.split(mx.random.key(0), 16))  # leaves MLX's global random state alone

    def multiples(step: float, *shape: int) -> mx.array:
        return step * mx.round(mx.random.normal(shape, key=next(keys)) / step)

    experts = None
    if variant.experts:
        experts = mx.sort(mx.random.randint(0, min(EXPERTS, variant.experts), (rows,), key=next(keys)))
    leading = (rows, 1) if variant.experts else (rows,)
    projections = []
    low_dtype = low_dtype or dtype
    rank = rank or fused.MAX_RANK + 1
    b_shape = (variant.experts, width, rank) if variant.experts else (rank, width)
    for branch in range(1 if variant.is_joint else 2):
        low, b = (multiples(0.5, *shape).astype(low_dtype) for shape in ((*leading, rank), b_shape))
        base = (multiples(0.125, *leading, width) + 0.0625).astype(dtype)
        p = LowRank(base, 0.5, low, b, experts=experts, is_sorted=True)
        if routed and branch == 0:
            channels = (variant.experts, width) if variant.experts else (width,)
            route = (multiples(0.5, *channels) > 0).astype(mx.float32)
            p = p._replace(routed=low, route=route)
        projections.append(p)
    weights = (mx.arange(rows) % 5 != 0).astype(mx.float32)
    return tuple(projections), weights, mx.random.normal((rows, features), key=next(keys)).astype(dtype)


def _to_float32(p: LowRank) -> LowRank:
    return replace_arrays(p, [a.astype(mx.float32) for a in (p.base, *p.lora_arrays)])


def replace_arrays(p: LowRank, arrays: list[mx.array]) -> LowRank:
    """Return a projection with other arrays for its base and its `lora_arrays`, in that order."""
    new: dict[str, Any] = dict(zip(("base", "low", "b", "routed"), arrays, strict=False))
    return p._replace(**new)


def outputs_and_gradients(
    run: Callable[..., tuple[mx.array, list[mx.array]]],
    variant: Variant,
    projections: tuple[LowRank, ...],
    weights: mx.array,
    dh: mx.array,
) -> list[mx.array]:
    """Return h, the sums, and the gradients of each projection's base and `lora_arrays`, as computed by `run`."""

    def forward(*arrays: mx.array) -> list[mx.array]:
        remaining = iter(arrays)
        new = tuple(
            replace_arrays(p, [next(remaining) for _ in (p.base, *p.lora_arrays)]) for p in projections
        )
        h, sums = run(variant, new, weights)
        return [h, *sums]

    arrays = [a for p in projections for a in (p.base, *p.lora_arrays)]
    outputs = forward(*arrays)
    cotangents = [dh.astype(outputs[0].dtype), *map(mx.zeros_like, outputs[1:])]
    return [*outputs, *mx.vjp(forward, arrays, cotangents)[1]]
