"""What `nalora doctor` says of the kernels: all kinds tried against the reference, and the bandwidth they reach."""

import statistics
import time
from collections.abc import Callable, Iterator

import mlx.core as mx

from nalora_mlx.ops import activation_families
from nalora_mlx.ops.activations import ACTIVATIONS
from nalora_mlx.ops.kernels import fused
from nalora_mlx.ops.kernels.backend import Kind
from nalora_mlx.ops.kernels.fused import Operands, Variant
from nalora_mlx.ops.kernels.selfcheck import EXPERTS, fault

DTYPES = (mx.float32, mx.float16, mx.bfloat16)
RANKS = (0, 8, fused.MAX_RANK)
FAMILIES = (  # a member of each that has a kernel
    activation_families.swiglu_oai(1.702, 7.0),
    activation_families.swiglu_input_clamped(5.0),
    activation_families.swiglu_output_clamped(2.0),
    activation_families.situ(1.5, 2.0),
    activation_families.xielu(0.3, -0.7, 0.5, -1e-6),
)
ROWS, FEATURES = 4096, 8192  # of the arrays whose bytes are timed: far more than a cache holds


def faults(backend: str) -> Iterator[tuple[str, str | None]]:
    """Try every kind of kernel: what it is, and what is wrong with it, None if nothing is."""
    for row in ACTIVATIONS.values():
        full = Variant(row, "separate", "derivative", row.boundaries, diagnose=row.selection is not None)
        for dtype in DTYPES:
            for rank in RANKS:
                yield f"{row.name}, {dtype}, rank {rank}", fault(kind(backend, full, dtype, rank))
    for family in FAMILIES:
        variant = Variant(family, statistic="derivative")
        yield family.name, fault(kind(backend, variant, mx.bfloat16, 8))
    row = ACTIVATIONS["silu"]
    yield "silu without statistics", fault(kind(backend, Variant(row), mx.bfloat16, 8))
    for halves in fused.GATE_UP_LAYOUTS:
        for experts in (0, EXPERTS):
            variant = Variant(row, halves, "sensitivity", row.boundaries, True, experts)
            for dtype in (mx.float32, mx.bfloat16):
                what = f"silu, {halves}, {experts} experts, {dtype}"
                yield what, fault(kind(backend, variant, dtype, 8))


def kind(backend: str, variant: Variant, dtype: mx.Dtype, rank: int) -> Kind:
    """A kind as it stands in a model of some dtype; float16 has low-rank products in float32."""
    low_dtype = mx.float32 if dtype == mx.float16 else dtype
    return backend, variant, dtype, low_dtype if rank else None, rank


def bandwidth(backend: str) -> tuple[float, float]:
    """GB/s of a plain copy, and of the forward kernel by the bytes that it must move, in bfloat16."""
    g0, u0 = (mx.random.normal((ROWS, FEATURES)).astype(mx.bfloat16) for _ in range(2))
    low, b = mx.zeros((ROWS, 8), mx.bfloat16), mx.zeros((8, FEATURES), mx.bfloat16)
    operands = Operands((g0, u0), (low, low), (b, b), (1.0, 1.0))
    variant = Variant(ACTIVATIONS["silu"])
    mx.eval(g0, u0, low, b)
    copied = _rate(lambda: g0 + 1, 2 * g0.nbytes)
    return copied, _rate(lambda: fused.forward(backend, variant, operands), 3 * g0.nbytes)


def _rate(work: Callable[[], object], size: int, repeats: int = 9) -> float:
    mx.eval(work())
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        mx.eval(work())
        seconds.append(time.perf_counter() - start)
    return size / statistics.median(seconds) / 1e9
