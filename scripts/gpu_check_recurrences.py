"""The sections of gpu_check.py for recurrent and hybrid models."""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import gpu_check_sections
import mlx.core as mx
import numpy as np
from gpu_check_sections import NA_LORA, THEIRS, Case, Contender, Emit, random_examples

from nalora_mlx.data.batches import collate
from nalora_mlx.ops.recurrence.gated_delta import gated_delta_rule
from nalora_mlx.ops.recurrence.linear_attention import linear_attention
from nalora_mlx.ops.recurrence.rwkv7 import rwkv7
from nalora_mlx.ops.recurrence.selective_scan import selective_scan

LIMIT = 1e-4  # largest accepted difference between devices in float32, relative to the largest entry
HYBRID = "qwen3.5-4b"
FORM_LENGTHS = (64, 128, 2048, 4096)
OWN_LENGTHS = (64, 128)  # mlx-lm's own form takes 9 MB per token and layer


def recurrences(quick: bool, emit: Emit) -> None:
    """Compare each recurrence on the device with the CPU: outputs, last states and gradients, in float32."""
    device = mx.default_device()
    for name, (function, arrays) in recurrence_cases(70 if quick else 300).items():
        start = time.perf_counter()
        want = outputs_and_gradients(function, arrays, mx.cpu)
        got = outputs_and_gradients(function, arrays, device)
        error = max(relative_error(a, b) for a, b in zip(got, want, strict=True))
        seconds = time.perf_counter() - start
        emit(name, {"largest_error": error, "limit": LIMIT, "ok": error <= LIMIT, "seconds": seconds})


def recurrence_cases(tokens: int) -> dict[str, tuple[Callable[..., Any], list[np.ndarray]]]:
    """Return each recurrence with random arguments, drawn by NumPy so that all devices get the same."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=(2, tokens, *shape)).astype(np.float32)

    def unit(*shape: int) -> np.ndarray:
        x = normal(*shape)
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    def log_decay(*shape: int) -> np.ndarray:
        return -np.exp(2 * normal(*shape) - 2)

    q, k, v, beta = unit(2, 32), unit(2, 32), normal(4, 32), 1 / (1 + np.exp(-normal(4)))
    a = unit(4, 32)
    x, delta = normal(64), np.log1p(np.exp(normal(64)))
    A, B, C = -np.exp(rng.normal(size=(64, 16))), normal(16), normal(16)
    return {
        "gated delta rule": (gated_delta_rule, [q, k, v, log_decay(4), beta]),
        "gated delta rule, one decay per channel": (gated_delta_rule, [q, k, v, log_decay(4, 32), beta]),
        "linear attention": (linear_attention, [q, k, v, log_decay(4)]),
        "RWKV-7": (
            rwkv7,
            [normal(4, 32), log_decay(4, 32), normal(4, 32), normal(4, 32), -a, a * beta[..., None]],
        ),
        "selective scan": (selective_scan, [x, delta, A, B, C]),
    }


def outputs_and_gradients(
    function: Callable[..., Any], arrays: list[np.ndarray], device: Any
) -> list[np.ndarray]:
    """Return the outputs, the last state and all gradients of a recurrence on a device."""
    before = mx.default_device()
    mx.set_default_device(device)
    try:
        primals = [mx.array(array.astype(np.float32)) for array in arrays]
        shapes = [output.shape for output in function(*primals)]
        rng = np.random.default_rng(1)
        cotangents = [mx.array(rng.normal(size=shape).astype(np.float32)) for shape in shapes]
        outputs, gradients = mx.vjp(function, primals, cotangents)
        mx.eval(outputs, gradients)
        return [np.array(array) for array in (*outputs, *gradients)]
    finally:
        mx.set_default_device(before)


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    """Return the largest difference, relative to the largest entry."""
    error = float(np.abs(got - want).max() / max(np.abs(want).max(), 1e-30))
    return error if math.isfinite(error) else math.inf


def hybrid(quick: bool, emit: Emit) -> None:
    """Time a step of four layers of Qwen3.5-4B, three of them recurrent, and one of mlx_lm.lora on short rows."""
    for name, lengths in ((NA_LORA, FORM_LENGTHS), (THEIRS, OWN_LENGTHS)):
        for length in (24,) if quick else lengths:
            case = Case(HYBRID, 1, length, quick, layers=4)
            contender = Contender(name, case)
            batch = collate(random_examples(case, 1, 1), [0])
            start = time.perf_counter()
            contender.iterate(batch)
            first = time.perf_counter() - start
            measured = gpu_check_sections.measure(contender, [batch], 2 if quick else 5)
            seconds = statistics.median(measured["seconds"])
            emit(
                f"{name}, 1 x {length}",
                {
                    "first_iteration_seconds": first,
                    "ms_per_step": 1e3 * seconds,
                    "us_per_token": 1e6 * seconds / length,
                    "peak_above_weights_gb": measured["peak_gb"],
                },
            )
            del contender
            mx.clear_cache()
