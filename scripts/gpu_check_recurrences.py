"""The sections of gpu_check.py for recurrent and hybrid models."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
from contenders import NA_LORA, THEIRS, Case, Contender, measure, random_examples
from training_runs import finite, using_device

from nalora_mlx.data.batches import collate
from nalora_mlx.ops.device_sizes import device_sizes, using_sizes
from nalora_mlx.ops.recurrence import chunks
from nalora_mlx.ops.recurrence.gated_delta import gated_delta_rule
from nalora_mlx.ops.recurrence.linear_attention import linear_attention
from nalora_mlx.ops.recurrence.rwkv7 import rwkv7
from nalora_mlx.ops.recurrence.selective_scan import selective_scan

Emit = Callable[[str, Any], None]
Function = Callable[..., Any]

LIMIT = 1e-4  # largest accepted difference between devices in float32, relative to the largest entry
HYBRID = "qwen3.5-4b"
FORM_LENGTHS = (64, 2048, 4096)
OWN_LENGTHS = (64, 128)  # mlx-lm's own form takes 9 MB per token and layer
GROUPS = (512, 1024)  # positions of a group of a recurrence


def recurrences(quick: bool, emit: Emit) -> None:
    """Compare each recurrence on the device with the CPU: outputs, last states and gradients, in float32."""
    device = mx.default_device()
    for name, (function, arrays) in recurrence_cases(70 if quick else 300).items():
        start = time.perf_counter()
        want = outputs_and_gradients(function, arrays, mx.cpu)
        got = outputs_and_gradients(function, arrays, device)
        errors = [relative_error(a, b) for a, b in zip(got, want, strict=True)]
        result = {"largest_error": max(errors), "errors": errors, "limit": LIMIT, "ok": max(errors) <= LIMIT}
        emit(name, result | {"seconds": time.perf_counter() - start})


def recurrence_cases(tokens: int) -> dict[str, tuple[Function, list[np.ndarray]]]:
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
    function: Function, arrays: list[np.ndarray], device: Any, dtype: mx.Dtype = mx.float32
) -> list[np.ndarray]:
    """Return the outputs of a function (of a recurrence with the last state) and all gradients, on a device."""
    with using_device(device):
        primals = [mx.array(array.astype(np.float32)).astype(dtype) for array in arrays]
        outputs = function(*primals)
        shapes = [x.shape for x in (outputs if isinstance(outputs, list | tuple) else [outputs])]
        rng = np.random.default_rng(1)
        cotangents = [mx.array(rng.normal(size=shape).astype(np.float32)).astype(dtype) for shape in shapes]
        outputs, gradients = mx.vjp(function, primals, cotangents)
        mx.eval(outputs, gradients)
        return [np.array(array) for array in (*outputs, *gradients)]


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    """Return the largest difference, relative to the largest entry."""
    return finite(float(np.abs(got - want).max() / max(np.abs(want).max(), 1e-30)))


# --- which operation differs ----------------------------------------------------------------------------------


def primitives(_quick: bool, emit: Emit) -> None:
    """Compare each operation that recurrences are made of, and its gradient, with the same on the CPU in float64.

    `float32_error` is that of the CPU in float32. An error near 5e-4 with TF32 off means that a product rounded its
    inputs to eleven bits all the same.
    """
    device = mx.default_device()
    for name, (function, arrays) in primitive_cases().items():
        try:
            want = outputs_and_gradients(function, arrays, mx.cpu, mx.float64)
            cpu, got = (outputs_and_gradients(function, arrays, d) for d in (mx.cpu, device))
        except (RuntimeError, ValueError) as problem:
            emit(name, {"error": str(problem)})
            continue
        errors, float32 = (
            [relative_error(a, b) for a, b in zip(found, want, strict=True)] for found in (got, cpu)
        )
        limit = 1e-5 + 10 * max(float32)
        ok = max(errors) <= limit
        emit(name, {"errors": errors, "float32_error": max(float32), "limit": limit, "ok": ok})


def primitive_cases() -> dict[str, tuple[Function, list[np.ndarray]]]:
    """Return single operations in the shapes of the recurrences: 8 heads, 5 chunks of 64 tokens, 32 channels."""
    rng = np.random.default_rng(2)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    x, y = normal(8, 5, 64, 32), normal(8, 5, 64, 32)
    decays = -np.exp(2 * normal(8, 5, 64, 32) - 2)
    square, state = 0.1 * normal(8, 5, 64, 64), normal(8, 32, 32)
    f = 0.2 * normal(8, 5, 32, 32)
    cases: dict[str, tuple[Function, list[np.ndarray]]] = {}
    for how in ({}, {"inclusive": False}, {"reverse": True}, {"reverse": True, "inclusive": False}):
        label = ", ".join(f"{key} {value}" for key, value in how.items())
        cases[f"cumsum over tokens ({label})"] = (partial(mx.cumsum, axis=-2, **how), [x])
        strided = lambda a, how=how: mx.cumsum(a[:, :, ::2], axis=-2, **how)  # noqa: E731
        cases[f"cumsum over every second token ({label})"] = (strided, [x])
    cases["products of decays"] = (chunks.decay_from_start, [decays])
    cases["products of decays to the end"] = (chunks.decay_to_end, [decays])
    for size in (1, 2, 4, 8, 16, 32):
        cases[f"product of halves of {size} tokens"] = (partial(_halves, size), [x, y])
        cases[f"product of a quarter of a matrix, {size} rows"] = (partial(_quarter, size), [square, x])
        cases[f"product of a transposed quarter, {size} rows"] = (
            partial(_quarter, size, transposed=True),
            [square, x],
        )
        cases[f"blocks of {2 * size} from halves"] = (partial(_blocks, size), [square])
    cases |= {
        "batched product": (mx.matmul, [square, x]),
        "product with a transposed factor": (lambda a, b: a @ b.swapaxes(-1, -2), [x, y]),
        "product that broadcasts": (lambda a, b: mx.stack([a, b])[:, None] @ mx.stack([b, a]).mT, [x, y]),
        "addmm": (lambda c, a, b: mx.addmm(c, a, b), [state, f[:, 0], state]),
        "addmm with alpha -1": (lambda c, a, b: mx.addmm(c, a, b, alpha=-1), [state, f[:, 0], state]),
        "addmm of slices": (lambda c, a: mx.addmm(c[:, 1], a[:, 2].mT, c[:, 3]), [f, f]),
        "sum over channels": (lambda a, b: mx.eye(64) * mx.sum(a * b, axis=-1, keepdims=True), [x, y]),
        "lower triangle": (lambda a: mx.tril(a, -1), [square]),
        "decayed products": (
            lambda a, b, d: chunks.decayed_products(a, b, d, own_decay=False, diagonal=False),
            [x, y, decays],
        ),
        "decayed products with their own decay": (chunks.decayed_products, [x, y, decays]),
        "decayed products, one decay": (chunks.decayed_products, [x, y, decays[..., :1]]),
        "inverse of a unit lower triangle": (lambda a: chunks.invert_unit_lower(mx.tril(a, -1)), [square]),
        "matrix recurrence": (chunks.matrix_recurrence, [f, normal(8, 5, 32, 32), state]),
        "delta recurrence": (
            chunks.delta_recurrence,
            [x, 0.1 * y, 0.1 * normal(8, 5, 64, 32), np.exp(decays[:, :, :1].swapaxes(-1, -2)), state],
        ),
    }
    return cases


def _halves(size: int, x: mx.array, y: mx.array) -> mx.array:
    """Return the products of the second half of each block of 2 size tokens with its first."""
    x, y = (a.reshape(*a.shape[:-2], -1, 2 * size, a.shape[-1]) for a in (x, y))
    return x[..., size:, :] @ y[..., :size, :].swapaxes(-1, -2)


def _quarter(size: int, blocks: mx.array, x: mx.array, transposed: bool = False) -> mx.array:
    """Return products of the lower left quarter of each block of 2 size rows; its rows lie 2 size apart."""
    blocks = blocks.reshape(*blocks.shape[:-2], -1, 2 * size, 2 * size)
    quarter = blocks[..., size:, :size]
    x = mx.broadcast_to(x[..., None, :size, :], (*blocks.shape[:-2], size, x.shape[-1]))
    return (quarter.swapaxes(-1, -2) if transposed else quarter) @ x


def _blocks(size: int, square: mx.array) -> mx.array:
    """Return blocks of 2 size rows, made of blocks of `size` rows and what is below."""
    parts = square.reshape(*square.shape[:-2], -1, size, size)
    return chunks._merge(parts, parts[..., 0::2, :, :])


# --- a step of a hybrid model ---------------------------------------------------------------------------------


def prepare_hybrid(quick: bool, emit: Emit) -> None:
    """Run one iteration of the hybrid, so that MLX compiles its kernels and keeps them on disk."""
    case = Case(HYBRID, 1, 24 if quick else FORM_LENGTHS[0], quick, layers=4)
    start = time.perf_counter()
    contender = Contender(NA_LORA, case)
    contender.iterate(collate(random_examples(case, 1, 1), [0]))
    contender.finish()
    emit("hybrid", {"first_iteration_seconds": time.perf_counter() - start})


def hybrid(quick: bool, emit: Emit) -> None:
    """Time a step of four layers of Qwen3.5-4B, three of them recurrent, and one of mlx_lm.lora on short rows."""
    runs = [(NA_LORA, length, None) for length in FORM_LENGTHS]
    runs += [(NA_LORA, FORM_LENGTHS[1], positions) for positions in GROUPS]
    runs += [(THEIRS, length, None) for length in OWN_LENGTHS]
    if quick:
        runs = [(NA_LORA, 24, None), (NA_LORA, 24, 16), (THEIRS, 24, None)]
    for name, length, positions in runs:
        case = Case(HYBRID, 1, length, quick, layers=4)
        sizes = device_sizes()
        if positions:
            sizes = sizes._replace(group_positions=positions)
        with using_sizes(sizes):
            contender = Contender(name, case)
            batch = collate(random_examples(case, 1, 1), [0])
            start = time.perf_counter()
            contender.iterate(batch)
            contender.finish()
            first = time.perf_counter() - start
            measured = measure(contender, [batch], 2 if quick else 5)
        found = {
            "first_iteration_seconds": first,
            "ms_per_step": 1e3 * measured["seconds"],
            "us_per_token": 1e6 * measured["seconds"] / length,
            "peak_above_weights_gb": measured["peak_gb"],
        }
        emit(f"{name}, 1 x {length}" + (f", groups of {positions}" if positions else ""), found)
        del contender
        mx.clear_cache()
