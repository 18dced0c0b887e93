"""The kernel checks of `nalora doctor`: every kernel compared with the reference, and the bandwidth that they reach."""

import statistics
import time
from collections.abc import Callable, Iterator

import mlx.core as mx

from nalora_mlx.ops import activation_families
from nalora_mlx.ops.activations import ACTIVATIONS, Activation
from nalora_mlx.ops.device_sizes import device_kind
from nalora_mlx.ops.kernels import fused
from nalora_mlx.ops.kernels.backend import KernelKey
from nalora_mlx.ops.kernels.fused import Operands, Variant
from nalora_mlx.ops.kernels.selfcheck import EXPERTS, find_error

DTYPES = (mx.float32, mx.float16, mx.bfloat16)
RANKS = (0, 8, fused.MAX_RANK)
FAMILIES = (  # one member of each family that has a kernel
    activation_families.swiglu_oai(1.702, 7.0),
    activation_families.swiglu_input_clamped(5.0),
    activation_families.swiglu_output_clamped(2.0),
    activation_families.situ(1.5, 2.0),
    activation_families.xielu(0.3, -0.7, 0.5, -1e-6),
)
ROWS, FEATURES = 4096, 8192  # of the arrays in the bandwidth test; far larger than a cache
COMPILING = {"metal": "a few seconds", "cuda": "a minute or more"}


def compile_notices() -> list[str]:
    """Return what to say before the first training step: on a GPU, that it compiles kernels."""
    duration = COMPILING.get(device_kind())
    if duration is None:
        return []
    return [f"compiling kernels for this GPU before the first step: {duration} the first time"]


def check_kernels(backend: str, few: bool = False) -> Iterator[tuple[str, str | None]]:
    """Check every kernel, or `few`, see `kinds`. Yield its description, and what is wrong with it, or None."""
    for description, key in kinds(backend, few):
        yield description, find_error(key)


def kinds(backend: str, few: bool = False) -> Iterator[tuple[str, KernelKey]]:
    """Yield the description and the key of each kind of kernel, or of one kind per activation if only `few`."""
    if few:
        for row in ACTIVATIONS.values():
            yield f"{row.name}, {mx.bfloat16}, rank 8", model_key(backend, _full(row), mx.bfloat16, 8)
        return
    for row in ACTIVATIONS.values():
        for dtype in DTYPES:
            for rank in RANKS:
                yield f"{row.name}, {dtype}, rank {rank}", model_key(backend, _full(row), dtype, rank)
    for family in FAMILIES:
        yield family.name, model_key(backend, Variant(family, statistic="derivative"), mx.bfloat16, 8)
    row = ACTIVATIONS["silu"]
    yield "silu without statistics", model_key(backend, Variant(row), mx.bfloat16, 8)
    for layout in fused.GATE_UP_LAYOUTS:
        for experts in (0, EXPERTS):
            variant = Variant(row, layout, "sensitivity", row.boundaries, True, experts)
            for dtype in (mx.float32, mx.bfloat16):
                description = f"silu, {layout}, {experts} experts, {dtype}"
                yield description, model_key(backend, variant, dtype, 8)


def _full(activation: Activation) -> Variant:
    """Return the variant of a kernel that records everything."""
    diagnose = activation.selection is not None
    return Variant(activation, "separate", "derivative", activation.boundaries, diagnose=diagnose)


def model_key(backend: str, variant: Variant, dtype: mx.Dtype, rank: int) -> KernelKey:
    """Return the key of the kernel that a model of some dtype uses. In float16, low-rank products are float32."""
    low_dtype = mx.float32 if dtype == mx.float16 else dtype
    return KernelKey(backend, variant, dtype, low_dtype if rank else None, rank)


def measure_bandwidth(backend: str) -> tuple[float, float]:
    """Return the GB/s of a plain copy, and of the forward kernel, in bfloat16.

    The kernel's rate counts only the bytes that it must move: g0, u0 and h.
    """
    g0, u0 = (mx.random.normal((ROWS, FEATURES)).astype(mx.bfloat16) for _ in range(2))
    low, b = mx.zeros((ROWS, 8), mx.bfloat16), mx.zeros((8, FEATURES), mx.bfloat16)
    operands = Operands((g0, u0), (low, low), (b, b), (1.0, 1.0))
    variant = Variant(ACTIVATIONS["silu"])
    mx.eval(g0, u0, low, b)
    copy_rate = _rate(lambda: g0 + 1, 2 * g0.nbytes)
    return copy_rate, _rate(lambda: fused.forward(backend, variant, operands), 3 * g0.nbytes)


def _rate(function: Callable[[], object], size: int, repeats: int = 9) -> float:
    """Return the median GB/s of a function that moves `size` bytes."""
    mx.eval(function())
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        mx.eval(function())
        seconds.append(time.perf_counter() - start)
    return size / statistics.median(seconds) / 1e9
