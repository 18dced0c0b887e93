"""The measurements of gpu_check.py. Each section runs in a process of its own and sends results as it finds them."""

import os
import platform
import re
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from compiled_graph import STUB, VIEWS
from contenders import (
    NA_LORA,
    SUPERVISED_SHARE,
    THEIRS,
    TRAINERS,
    Case,
    Contender,
    compare,
    measure,
    random_examples,
)
from mlx.utils import tree_flatten
from mlx_lm.tuner.trainer import default_loss
from section_runner import package_version
from training_runs import SETUPS, change_error, loss_error, training_run, using_kernels

from nalora_mlx.core.machine import rounds_float32_products
from nalora_mlx.data.batches import Batch, collate
from nalora_mlx.ops.device_sizes import SIZES, device_kind, using_sizes
from nalora_mlx.ops.kernels.backend import backend
from nalora_mlx.training import step as step_module
from nalora_mlx.training.loss import batch_arrays

Emit = Callable[[str, Any], None]

# Largest errors of five steps in float32, relative to the loss and to the largest change of an adapter array. Inputs
# that differ by their last bit change the results by 3e-7 and 3e-5.
LOSS_LIMIT, CHANGE_LIMIT = 1e-4, 2e-3
HALF_CHANGE_LIMIT = 5e-2  # in addition to twice the error of the CPU in bfloat16


# --- what runs here -------------------------------------------------------------------------------------------


def machine(_quick: bool, emit: Emit) -> None:
    """Describe the machine and the versions."""
    info = {key: value for key, value in mx.device_info().items() if isinstance(value, str | int | float)}
    emit("device", str(mx.default_device()))
    emit("device_info", info)
    emit("kernel_backend", backend())
    emit("python", platform.python_version())
    emit("system", f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs")
    emit("versions", {name: v for name in PACKAGES if (v := package_version(name))})
    emit("float32_products_are_rounded", rounds_float32_products())


PACKAGES = (
    "mlx",
    "mlx-cpu",
    "mlx-cuda-12",
    "mlx-cuda-13",
    "mlx-lm",
    "numpy",
    "transformers",
    "nvidia-cudnn-cu13",
    "nvidia-cublas",
    "nvidia-cuda-nvrtc",
)


# --- correctness ----------------------------------------------------------------------------------------------


def correctness(quick: bool, emit: Emit) -> None:
    """Compare five steps of small models with the CPU's: with kernels and without, in float32 and bfloat16."""
    device = mx.default_device()
    for name, setup in SETUPS.items():
        want = training_run(setup, mx.cpu)
        for kernels in (True, False):
            got = training_run(setup, device, kernels=kernels)
            found = {"loss_error": loss_error(got, want), "change_error": change_error(got, want)}
            ok = found["loss_error"] <= LOSS_LIMIT and found["change_error"] <= CHANGE_LIMIT
            emit(f"{name}, {'kernels' if kernels else 'reference'}", found | {"ok": ok})
        if quick:
            break
    setup = SETUPS["rank 8"]
    want = training_run(setup, mx.cpu)
    half, got = (training_run(setup, where, mx.bfloat16) for where in (mx.cpu, device))
    error, on_cpu = change_error(got, want), change_error(half, want)
    limit = 2 * on_cpu + HALF_CHANGE_LIMIT
    found = {"loss_error": loss_error(got, want), "change_error": error, "cpu_change_error": on_cpu}
    emit("rank 8, bfloat16", found | {"limit": limit, "ok": error <= limit})


# --- speed ----------------------------------------------------------------------------------------------------


def prepare(_quick: bool, emit: Emit, case: Case, trainer: str) -> None:
    """Run one iteration of each kind, so that MLX compiles its kernels and keeps them on disk."""
    contender = Contender(trainer, case)
    for kind, share in SUPERVISED_SHARE.items():
        start = time.perf_counter()
        contender.iterate(collate(random_examples(case, share, case.rows), range(case.rows)))
        contender.finish()
        emit(kind, {"first_iteration_seconds": time.perf_counter() - start})


def speed(quick: bool, emit: Emit, case: Case, seconds: float = 40) -> None:
    """Compare the trainers' time per supervised token and peak memory, in turn, on the same batches."""
    started = time.perf_counter()
    contenders = [Contender(name, case) for name in TRAINERS]
    rounds, steps = (2, 1) if quick else (7, 4)
    kinds = list(SUPERVISED_SHARE.items())
    for number, (kind, share) in enumerate(kinds, 1):
        examples = random_examples(case, share, 4 * case.rows)
        batches = [collate(examples, range(i, i + case.rows)) for i in range(0, len(examples), case.rows)]
        first: dict[str, Any] = {"loss": {}, "seconds": {}}
        for one in contenders:
            start = time.perf_counter()
            first["loss"][one.name] = one.first_loss(batches[0])
            first["seconds"][one.name] = time.perf_counter() - start
            for batch in batches[1:3]:
                one.iterate(batch)
        emit(f"{kind}: first iteration", first)
        until = started + seconds * number / len(kinds)
        emit(kind, compare(contenders, batches, rounds, steps, until))


# --- where the time goes --------------------------------------------------------------------------------------


def breakdown(quick: bool, emit: Emit, case: Case) -> None:
    """Time a step with other sizes and settings, count its operations as traced, and time its parts."""
    steps = 2 if quick else 6
    batches = {
        kind: collate(random_examples(case, share, case.rows), range(case.rows))
        for kind, share in SUPERVISED_SHARE.items()
    }
    for variant, (context, clear_cache) in variants().items():
        with context:
            one = Contender(THEIRS if THEIRS in variant else NA_LORA, case, clear_cache)
            for kind, batch in batches.items():
                one.iterate(batch)
                measured = measure(one, [batch], steps)
                ms = 1e3 * measured["seconds"]
                emit(f"{variant}, {kind}", {"ms_per_step": ms, "peak_above_weights_gb": measured["peak_gb"]})
        del one
        mx.clear_cache()
    for name in (NA_LORA, THEIRS):
        one = Contender(name, case)
        for kind, batch in batches.items():
            emit(f"{name}, {kind}", time_parts(one, batch, steps) | {"graph": count_operations(one, batch)})
        del one
        mx.clear_cache()


def variants() -> dict[str, tuple[AbstractContextManager[Any], bool | None]]:
    """Return what to vary: a context to train in, and whether to empty the cache (None: the trainer's default)."""
    own = SIZES[device_kind()]

    def sizes(**changes: Any) -> AbstractContextManager[None]:
        return using_sizes(own._replace(**changes))

    def tiles(rows: int, columns: int) -> AbstractContextManager[None]:
        return sizes(head_rows=rows, head_columns=columns, head_elements=rows * columns)

    return {
        "na-lora, as it is": (nullcontext(), None),
        "na-lora, cache emptied": (nullcontext(), True),
        "na-lora, cache kept": (nullcontext(), False),
        "mlx_lm.lora, cache kept": (nullcontext(), False),
        "na-lora, tiles 1024 x 8192": (tiles(1024, 8192), None),
        "na-lora, tiles 2048 x 8192": (tiles(2048, 8192), None),
        "na-lora, tiles 4096 x 16384": (tiles(4096, 16384), None),
        "na-lora, own attention, blocks of 512": (sizes(fused_attention=False, score_bytes=0), None),
        "na-lora, MLX's attention": (patch.object(step_module, "lean_attention", nullcontext), None),
        "na-lora, no kernels": (using_kernels(False), None),
        "na-lora, a CPU's sizes": (using_sizes("cpu"), None),
    }


def time_parts(contender: Contender, batch: Batch, steps: int) -> dict[str, Any]:
    """Time the building of a step's graph and its evaluation, and the forward, the backward and the update apart."""
    contender.iterate(batch)
    build, evaluate = [], []
    for _ in range(steps):
        start = time.perf_counter()
        arrays, _ = contender.start(batch)
        built = time.perf_counter()
        mx.eval(arrays)
        build.append(built - start)
        evaluate.append(time.perf_counter() - built)
    parts = {"build_graph": build, "evaluate": evaluate}
    model = contender.model
    if contender.name == THEIRS:
        tokens = mx.array(np.concatenate([batch.inputs, batch.targets[:, -1:]], axis=1))
        lengths = mx.array([(1, batch.inputs.shape[1])] * len(batch.inputs))
        forward = partial(mx.compile, inputs=model.state)(lambda: default_loss(model, tokens, lengths)[0])
        value_and_grad = nn.value_and_grad(model, default_loss)
        backward = partial(mx.compile, inputs=model.state, outputs=model.state)(
            lambda: value_and_grad(model, tokens, lengths)
        )
        parts["forward"] = repeat_timed(forward, steps)
        parts["forward and backward"] = repeat_timed(backward, steps)
    else:
        loss = contender.run.step.loss
        arrays = batch_arrays(batch)
        parts["forward"] = repeat_timed(lambda: loss.evaluate(arrays)[0], steps)
        step = contender.run.step
        parts["forward and backward"] = repeat_timed(
            lambda: step(batch, batch.supervised_tokens, None, False), steps
        )
    return {f"{name}_ms": 1e3 * statistics.median(seconds) for name, seconds in parts.items()}


def repeat_timed(function: Callable[[], Any], steps: int) -> list[float]:
    """Return the seconds that a function takes, without its first call."""
    seconds = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        mx.eval([a for _, a in tree_flatten(function()) if isinstance(a, mx.array)])
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def count_operations(contender: Contender, batch: Batch) -> dict[str, Any]:
    """Return the number of operations of a step as compiled: all, those that are not views, and the most frequent."""
    arrays, _ = contender.start(batch)
    with tempfile.NamedTemporaryFile(suffix=".dot") as file:
        mx.export_to_dot(file.name, *arrays)
        kinds = re.findall(r"\{ \d+ \[label =\"([^\"]*)\"", Path(file.name).read_text())
    mx.eval(arrays)
    counts = Counter("compiled" if kind.startswith("Compiled") else kind for kind in kinds)
    launched = {kind: n for kind, n in counts.items() if kind not in (*VIEWS, STUB)}
    most = dict(Counter(launched).most_common(12))
    return {"operations": sum(counts.values()), "not_views": sum(launched.values()), "most": most}
