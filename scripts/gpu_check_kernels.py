"""The sections of gpu_check.py about the kernels of the gated residual."""

import itertools
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

from nalora_mlx.ops.activations import ACTIVATIONS
from nalora_mlx.ops.kernels import fused, healthcheck, selfcheck
from nalora_mlx.ops.kernels.backend import REFERENCE, KernelKey, backend
from nalora_mlx.ops.kernels.fused import Operands, Variant
from nalora_mlx.ops.kernels.gated_residual import run_kernel, run_reference
from nalora_mlx.ops.kernels.low_rank import LowRank

Emit = Callable[[str, Any], None]

SILU = ACTIVATIONS["silu"]
FULL = Variant(SILU, "separate", "derivative", SILU.boundaries, diagnose=True)
LARGE_SIZES = (3073, 1537)  # channels: odd, and more than one threadgroup


def all_checks(chosen: str) -> list[tuple[str, KernelKey, tuple[int, int]]]:
    """Return the name, key and sizes of every check: each kind of kernel, and silu on large odd shapes."""
    checks = [(name, key, selfcheck.FEATURES) for name, key in healthcheck.kinds(chosen)]
    for dtype, rank in itertools.product(healthcheck.DTYPES, healthcheck.RANKS):
        key = healthcheck.model_key(chosen, FULL, dtype, rank)
        checks.append((f"silu, {dtype}, rank {rank}, {LARGE_SIZES} channels", key, LARGE_SIZES))
    return [(name.replace("mlx.core.", ""), key, sizes) for name, key, sizes in checks]


def kernels(quick: bool, emit: Emit, part: int = 0, parts: int = 1) -> None:
    """Compare every kind of kernel with the reference in float32 on the CPU, on odd shapes, in each dtype."""
    chosen = backend()
    if chosen == REFERENCE:
        emit("skipped", "no kernel runs on this device")
        return
    for name, key, sizes in all_checks(chosen)[part :: parts * (8 if quick else 1)]:
        start = time.perf_counter()
        error = selfcheck.find_error(key, sizes)
        emit(name, {"error": error, "seconds": time.perf_counter() - start})


# --- against float64 ------------------------------------------------------------------------------------------


def accuracy(quick: bool, emit: Emit) -> None:
    """Report the errors of the kernel, and of the reference on this device and on the CPU, against float64."""
    dtypes = healthcheck.DTYPES[:1] if quick else healthcheck.DTYPES
    for dtype, rank in itertools.product(dtypes, healthcheck.RANKS):
        features = 97 if quick else LARGE_SIZES[0]
        found = errors_against_float64(dtype, rank, features)
        name = f"silu, {str(dtype).removeprefix('mlx.core.')}, rank {rank}, {features} channels"
        emit(
            name, found | {"ok": is_accurate(next(iter(found.values())), dtype)}
        )  # the kernel's, if there is one


def is_accurate(errors: dict[str, float], dtype: mx.Dtype) -> bool:
    """Return whether errors are below the tolerances of the self-check."""
    return all(
        error <= selfcheck.TOLERANCE[dtype if name in ("h", "dg0", "du0") else mx.float32]
        for name, error in errors.items()
    )


def errors_against_float64(dtype: mx.Dtype, rank: int, features: int) -> dict[str, dict[str, float]]:
    """Return the errors of silu's gated residual against float64, relative to the largest entry.

    Returns:
        For "kernel" (if one runs here), "reference" and "reference on the CPU": name of a result -> error.
    """
    chosen = backend()
    low_dtype = healthcheck.model_key(chosen, FULL, dtype, rank).low_dtype
    projections, weights, dh = selfcheck.example_inputs(FULL, dtype, low_dtype, rank, features)
    want = exact_results(projections, weights, dh)
    found = {}
    if chosen != REFERENCE:
        kernel = selfcheck.outputs_and_gradients(
            lambda *a: run_kernel(chosen, *a), FULL, projections, weights, dh
        )
        found["kernel"] = _errors(kernel, want)
    runs = {"reference": mx.default_device(), "reference on the CPU": mx.Device(mx.cpu)}
    for name, device in runs.items():
        with mx.stream(device):
            reference = selfcheck.outputs_and_gradients(run_reference, FULL, projections, weights, dh)
            found[name] = _errors(reference, want)
    return found


def exact_results(
    projections: tuple[LowRank, ...], weights: mx.array, dh: mx.array
) -> dict[str, np.ndarray | np.float64]:
    """Return h, the gradients of g0 and u0, and the statistics of silu's gated residual, in float64."""
    g0, u0 = (_float64(p.base) for p in projections)
    z, u = (
        base + p.scale * _float64(p.low) @ _float64(p.b)
        for base, p in zip((g0, u0), projections, strict=True)
    )
    s, s0 = _sigmoid(z), _sigmoid(g0)
    slope, w, d = s * (1 + z * _sigmoid(-z)), _float64(weights)[:, None], _float64(dh)
    above = {f"above boundary {i}": (w * (z >= b)).sum(0) for i, b in enumerate(SILU.boundaries)}
    return {
        "h": z * s * u,
        "dg0": d * u * slope,
        "du0": d * z * s,
        "responsiveness": (w * np.abs(slope)).sum(0),
        **above,
        "feature change": (w * np.abs((z - g0) * s0 * u)).sum(),
        "selection change": (w * np.abs(z * (s - s0) * u)).sum(),
    }


def _sigmoid(z: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-z))


def _float64(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32)).astype(np.float64)


def _errors(arrays: list[mx.array], want: dict[str, np.ndarray | np.float64]) -> dict[str, float]:
    """Return the error of each result of `outputs_and_gradients` that `exact_results` has."""
    h, *sums = arrays[: 1 + FULL.num_sums]
    gradients = arrays[1 + FULL.num_sums :]  # base, low and b of each projection
    got = dict(zip(want, [h, gradients[0], gradients[len(gradients) // 2], *sums], strict=True))
    return {name: float(np.abs(_float64(got[name]) - b).max() / np.abs(b).max()) for name, b in want.items()}


# --- bandwidth ------------------------------------------------------------------------------------------------


def bandwidth(quick: bool, emit: Emit) -> None:
    """Measure the share of the copy bandwidth that the kernels reach, counting only the bytes that they must move.

    Many calls are queued before one wait, so that the time to launch a kernel does not count.
    """
    chosen = backend()
    rows, features, calls = (64, 1024, 2) if quick else (8192, 8192, 12)
    limit = mx.device_info().get("max_recommended_working_set_size")
    if isinstance(limit, int) and limit < 64e9:
        rows //= 4
    for dtype, rank in itertools.product((mx.bfloat16, mx.float32), (8, fused.MAX_RANK)):
        g0, u0, dh = (mx.random.normal((rows, features)).astype(dtype) for _ in range(3))
        low, b = (
            mx.random.normal((rows, rank)).astype(dtype),
            mx.random.normal((rank, features)).astype(dtype),
        )
        weights = mx.ones((rows,))
        mx.eval(g0, u0, dh, low, b, weights)
        name = f"{str(dtype).removeprefix('mlx.core.')}, rank {rank}"
        copy = rate(lambda: g0 + 1, 2 * g0.nbytes, calls)  # noqa: B023
        results = {"copy_gb_per_s": copy}
        emit(name, results)
        if chosen == REFERENCE:
            continue
        operands = Operands((g0, u0), (low, low), (b, b), (1.0, 1.0), weights=weights)
        plain, full = Variant(SILU), Variant(SILU, "separate", "derivative", SILU.boundaries)
        for kind, function, arrays in (
            ("forward", lambda: fused.forward(chosen, plain, operands), 3),  # noqa: B023
            ("forward, with statistics", lambda: fused.forward(chosen, full, operands), 3),  # noqa: B023
            ("backward", lambda: fused.backward(chosen, plain, operands, dh), 5),  # noqa: B023
        ):
            speed = rate(function, arrays * g0.nbytes, calls)
            results |= {f"{kind}_gb_per_s": speed, f"{kind}_share_of_copy": speed / copy}
        emit(name, results)


def rate(function: Callable[[], Any], size: int, calls: int, repeats: int = 7) -> float:
    """Return the median GB/s of a function that moves `size` bytes."""
    mx.eval(function())
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        mx.eval([function() for _ in range(calls)])
        seconds.append(time.perf_counter() - start)
    return calls * size / float(np.median(seconds)) / 1e9
