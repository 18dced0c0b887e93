"""The measurements of gpu_check.py. Each section runs in a process of its own and sends results as it finds them."""

import itertools
import math
import os
import platform
import re
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from compiled_graph import VIEWS
from mlx.utils import tree_flatten
from mlx_lm.tuner.trainer import default_loss
from mlx_lm.tuner.utils import linear_to_lora_layers

from nalora_mlx import NALoRAConfig, TrainingConfig, adapt
from nalora_mlx.data.batches import Batch, collate
from nalora_mlx.data.tokenization import Example
from nalora_mlx.ops import cross_entropy
from nalora_mlx.ops.activations import ACTIVATIONS
from nalora_mlx.ops.kernels import fused, healthcheck, selfcheck
from nalora_mlx.ops.kernels.backend import REFERENCE, backend
from nalora_mlx.ops.kernels.fused import Operands, Variant
from nalora_mlx.training import step as step_module
from nalora_mlx.training.run import Run
from nalora_mlx.training.step import TrainingStep

Emit = Callable[[str, Any], None]

THEIRS, LORA, NA_LORA = "mlx_lm.lora", "lora", "na-lora"
TRAINERS = (THEIRS, NA_LORA)
RANK, ADAPTED_LAYERS = 8, 16
SUPERVISED_SHARE = {"masked prompts": 0.25, "identical batches": 1.0}
SHAPES: dict[str, dict[str, Any]] = {
    "smollm2-135m": {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "num_hidden_layers": 30,
        "vocab_size": 49152,
    },
    "qwen3-0.6b": {
        "model_type": "qwen3",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "num_hidden_layers": 28,
        "vocab_size": 151936,
    },
    "qwen3.5-4b": {
        "model_type": "qwen3_5",
        "hidden_size": 2560,
        "intermediate_size": 9216,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
        "num_hidden_layers": 32,
        "vocab_size": 248320,
    },
}
TINY = {
    "hidden_size": 48,
    "intermediate_size": 100,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_hidden_layers": 3,
    "vocab_size": 1000,
}
COMMON = {
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
LARGE_SIZES = (3073, 1537)  # channels of the larger kernel checks: odd, and more than one threadgroup


@dataclass(frozen=True)
class Case:
    """A model shape and a batch shape to train with.

    Attributes:
        shape: a key of SHAPES.
        rows: sequences in a batch.
        length: tokens that the model reads of each.
        quick: whether to use tiny sizes instead.
        layers: number of layers; None for those of the shape.
    """

    shape: str
    rows: int
    length: int
    quick: bool = False
    layers: int | None = None

    @property
    def config(self) -> dict[str, Any]:
        """The model's config."""
        changes = TINY if self.quick else {}
        layers = {"num_hidden_layers": self.layers} if self.layers else {}
        return {**SHAPES[self.shape], **COMMON, **changes, **layers}


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
    x = mx.random.normal((1024, 1024))
    mx.eval(x @ x)


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


def package_version(name: str) -> str | None:
    """Return the version of an installed package, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


# --- kernels --------------------------------------------------------------------------------------------------


def kernels(quick: bool, emit: Emit, part: int = 0, parts: int = 1) -> None:
    """Compare every kind of kernel with the reference in float32 on the CPU, on odd shapes, in each dtype."""
    chosen = backend()
    if chosen == REFERENCE:
        emit("skipped", "no kernel runs on this device")
        return
    checks = [(name, key, selfcheck.FEATURES) for name, key in healthcheck.kinds(chosen)]
    silu = ACTIVATIONS["silu"]
    full = Variant(silu, "separate", "derivative", silu.boundaries, diagnose=True)
    for dtype, rank in itertools.product(healthcheck.DTYPES, healthcheck.RANKS):
        key = healthcheck.model_key(chosen, full, dtype, rank)
        checks.append((f"silu, {dtype}, rank {rank}, {LARGE_SIZES} channels", key, LARGE_SIZES))
    for name, key, sizes in checks[part :: parts * (8 if quick else 1)]:
        start = time.perf_counter()
        error = selfcheck.find_error(key, sizes)
        emit(name.replace("mlx.core.", ""), {"error": error, "seconds": time.perf_counter() - start})


def bandwidth(quick: bool, emit: Emit) -> None:
    """Measure the share of the copy bandwidth that the kernels reach, counting only the bytes that they must move.

    Many calls are queued before one wait, so that the time to launch a kernel does not count.
    """
    chosen = backend()
    rows, features, calls = (64, 1024, 2) if quick else (8192, 8192, 12)
    silu = ACTIVATIONS["silu"]
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
        emit(name, {"copy_gb_per_s": copy})
        if chosen == REFERENCE:
            continue
        operands = Operands((g0, u0), (low, low), (b, b), (1.0, 1.0), weights=weights)
        plain, full = Variant(silu), Variant(silu, "separate", "derivative", silu.boundaries)
        results = {"copy_gb_per_s": copy}
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
    return calls * size / statistics.median(seconds) / 1e9


# --- models and batches ---------------------------------------------------------------------------------------


def build_model(config: dict[str, Any], dtype: mx.Dtype) -> nn.Module:
    """Return a model with random weights."""
    mx.random.seed(0)
    module = import_module(f"mlx_lm.models.{config['model_type']}")
    model = module.Model(module.ModelArgs.from_dict(config))
    model.set_dtype(dtype)
    mx.eval(model.parameters())
    return model


def random_examples(case: Case, share: float, count: int) -> list[Example]:
    """Return rows of random tokens, all of one length, with the last part of each supervised."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, case.config["vocab_size"], (count, case.length + 1), dtype=np.int32)
    supervised = np.arange(case.length + 1) > case.length - round(share * case.length)
    return [Example(row, supervised, f"row:{i + 1}") for i, row in enumerate(tokens)]


class Contender:
    """A trainer that runs one iteration at a time, as its own loop does it.

    Args:
        name: THEIRS, LORA or NA_LORA.
        case: model and batch.
        clear_cache: whether to empty the allocator's cache after each iteration, which is both trainers' default.
    """

    def __init__(self, name: str, case: Case, clear_cache: bool = True):
        self.name, self.clear_cache = name, clear_cache
        self.model = build_model(case.config, mx.float32 if case.quick else mx.bfloat16)
        self.optimizer = optim.Adam(learning_rate=1e-5)
        if name == THEIRS:
            self.model.freeze()
            layers = min(ADAPTED_LAYERS, len(self.model.layers))
            linear_to_lora_layers(self.model, layers, {"rank": RANK, "scale": 20.0, "dropout": 0.0})
            self.model.train()
            self.compiled = self._compile_theirs()
            return
        off: dict[str, Any] = {"mask": "off", "step_scaling": False} if name == LORA else {}
        adapt(self.model, NALoRAConfig(rank=RANK, num_layers=ADAPTED_LAYERS, **off))
        settings = TrainingConfig(
            batch_size=case.rows,
            iters=10**9,
            steps_per_report=10**9,
            clear_cache_threshold=0 if clear_cache else 1 << 60,
        )
        self.run = Run(self.model, random_examples(case, 1, 4 * case.rows), [], settings, self.optimizer)
        self.model.train()

    def _compile_theirs(self) -> Callable[..., tuple[mx.array, mx.array]]:
        """Return mlx-lm's training step."""
        value_and_grad = nn.value_and_grad(self.model, default_loss)
        self.state = [self.model.state, self.optimizer.state, mx.random.state]

        @partial(mx.compile, inputs=self.state, outputs=self.state)
        def step(tokens: mx.array, lengths: mx.array) -> tuple[mx.array, mx.array]:
            (loss, count), gradients = value_and_grad(self.model, tokens, lengths)
            self.optimizer.update(self.model, gradients)
            return loss, count

        return step

    def start(self, batch: Batch) -> tuple[list[mx.array], mx.array]:
        """Build the graph of an iteration without evaluating it; return everything to evaluate, and the loss."""
        if self.name == THEIRS:
            tokens = np.concatenate([batch.inputs, batch.targets[:, -1:]], axis=1)
            length = batch.inputs.shape[1]
            first = 1 + length - batch.loss_mask.sum(axis=1)
            lengths = [(int(n), length) for n in first]
            loss, count = self.compiled(mx.array(tokens), mx.array(lengths))
            return [a for _, a in tree_flatten([self.state, loss, count])], loss
        step = self.run.step
        loss, _ = step(batch, batch.supervised_tokens, None, True)
        return [a for _, a in tree_flatten([step.state, loss])], loss / batch.supervised_tokens

    def iterate(self, batch: Batch) -> None:
        """Run one iteration."""
        if self.name != THEIRS:
            self.run.update([batch])
            return
        mx.eval(self.start(batch)[0])
        if self.clear_cache and mx.get_cache_memory() > 0:
            mx.clear_cache()

    def first_loss(self, batch: Batch) -> float:
        """Run one iteration, and return the loss per supervised token before it."""
        arrays, loss = self.start(batch)
        mx.eval(arrays, loss)
        return loss.item()

    def state_bytes(self) -> int:
        """Return the size of the adapters and of the optimizer's state."""
        trees = [self.model.trainable_parameters(), self.optimizer.state]
        return sum(a.nbytes for _, a in tree_flatten(trees) if isinstance(a, mx.array))


# --- correctness ----------------------------------------------------------------------------------------------


def correctness(_quick: bool, emit: Emit) -> None:
    """Compare the loss and all gradients of a small model's training step with the CPU's in float32.

    A half-precision step is compared with the error that the same step has on the CPU.
    """
    device = mx.default_device()
    for method in (LORA, NA_LORA):
        want = training_step(method, mx.float32, mx.cpu)
        for dtype in (mx.float32, mx.bfloat16):
            baseline = (
                0.0 if dtype == mx.float32 else gradient_error(training_step(method, dtype, mx.cpu), want)
            )
            got = training_step(method, dtype, device)
            error = gradient_error(got, want)
            loss_error = abs(got["loss"].item() - want["loss"].item()) / abs(want["loss"].item())
            limit = 1e-3 if dtype == mx.float32 else 2 * baseline + 1e-2
            name = f"{method}, {str(dtype).removeprefix('mlx.core.')}"
            result = {"loss_error": loss_error, "gradient_error": error, "cpu_gradient_error": baseline}
            emit(name, result | {"limit": limit, "ok": error <= limit and loss_error <= limit})


def training_step(method: str, dtype: mx.Dtype, device: Any) -> dict[str, mx.array]:
    """Return the loss, the gradients and the updated adapters of a small model's step on a device, by name."""
    before = mx.default_device()
    mx.set_default_device(device)
    try:
        config = {**COMMON, **TINY, "model_type": "llama", "intermediate_size": 203}
        model = build_model(config, mx.float32)
        rng = np.random.default_rng(1)

        def draw(arrays: Any, std: float) -> list[tuple[str, mx.array]]:  # by NumPy: the same on all devices
            return [(name, mx.array(rng.normal(0, std, a.shape).astype(np.float32))) for name, a in arrays]

        matrices = [(name, a) for name, a in tree_flatten(model.parameters()) if a.ndim == 2]
        model.load_weights(draw(matrices, 0.2), strict=False)
        model.set_dtype(dtype)
        off: dict[str, Any] = {"mask": "off", "step_scaling": False} if method == LORA else {"mask_warmup": 1}
        adapt(model, NALoRAConfig(rank=RANK, num_layers=2, scale=2.0, **off))
        model.load_weights(draw(tree_flatten(model.trainable_parameters()), 0.1), strict=False)
        model.train()
        case = Case("smollm2-135m", 3, 70, quick=True)
        examples = random_examples(case, 0.5, 3)
        batch = collate(examples, range(3))
        step = TrainingStep(
            model, optim.SGD(learning_rate=0.1), model.adapt_result.config, compiled=device != mx.cpu
        )
        loss, window = step(batch, batch.supervised_tokens, None, update=False)
        arrays = {"loss": loss / batch.supervised_tokens}
        arrays |= {f"gradient of {name}": a for name, a in tree_flatten(window.gradients)}
        for _ in range(3):
            total, _ = step(batch, batch.supervised_tokens, None, update=True)
            mx.eval(step.state, total)
        arrays |= {f"updated {name}": a for name, a in tree_flatten(model.trainable_parameters())}
        mx.eval(arrays)
        return {name: mx.array(np.array(a.astype(mx.float32))) for name, a in arrays.items()}
    finally:
        mx.set_default_device(before)


def gradient_error(got: dict[str, mx.array], want: dict[str, mx.array]) -> float:
    """Return the largest error of an array, relative to the array's norm."""
    errors = [0.0]
    for name, b in want.items():
        a, b = (np.array(x, dtype=np.float64) for x in (got[name], b))
        error = np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30)
        errors.append(float(error) if np.isfinite(error) else math.inf)
    return max(errors)


# --- speed ----------------------------------------------------------------------------------------------------


def prepare(_quick: bool, emit: Emit, case: Case, theirs: bool) -> None:
    """Run one iteration of each kind, so that MLX compiles its kernels and keeps them on disk."""
    contender = Contender(THEIRS if theirs else NA_LORA, case)
    for kind, share in SUPERVISED_SHARE.items():
        start = time.perf_counter()
        contender.iterate(collate(random_examples(case, share, case.rows), range(case.rows)))
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
        tokens = batches[0].supervised_tokens
        first: dict[str, Any] = {"loss": {}, "seconds": {}}
        for one in contenders:
            start = time.perf_counter()
            first["loss"][one.name] = one.first_loss(batches[0])
            first["seconds"][one.name] = time.perf_counter() - start
            for batch in batches[1:3]:
                one.iterate(batch)
        emit(f"{kind}: first iteration", first)
        deadline = started + seconds * number / len(kinds)
        results: list[dict[str, Any]] = []
        for i in range(rounds):
            for one in contenders[:: 1 if i % 2 else -1]:
                results.append({"trainer": one.name, "round": i, **measure(one, batches, steps)})
            if i >= 1 and time.perf_counter() > deadline:
                break
        emit(kind, summarize(results, tokens))


def measure(contender: Contender, batches: Sequence[Batch], steps: int) -> dict[str, Any]:
    """Return the seconds of each iteration, and the peak memory above the frozen weights."""
    mx.clear_cache()
    contender.iterate(batches[-1])  # fills the allocator's cache, if it is kept
    resident = mx.get_active_memory()
    mx.reset_peak_memory()
    times = []
    for batch in itertools.islice(itertools.cycle(batches), steps):
        start = time.perf_counter()
        contender.iterate(batch)
        times.append(time.perf_counter() - start)
    peak = mx.get_peak_memory() - resident + contender.state_bytes()
    return {"seconds": times, "peak_gb": peak / 1e9}


def summarize(results: list[dict[str, Any]], tokens: int) -> dict[str, Any]:
    """Return medians for each trainer, and medians over rounds of the ratios to mlx_lm.lora."""
    summary: dict[str, Any] = {"supervised_tokens": tokens, "rounds": max(r["round"] for r in results) + 1}
    theirs = [r for r in results if r["trainer"] == THEIRS]
    for name in dict.fromkeys(r["trainer"] for r in results):
        own = [r for r in results if r["trainer"] == name]
        step = statistics.median(t for r in own for t in r["seconds"])
        pairs = list(zip(sorted(own, key=by_round), sorted(theirs, key=by_round), strict=True))
        summary[name] = {
            "ms_per_step": 1e3 * step,
            "us_per_supervised_token": 1e6 * step / tokens,
            "peak_above_weights_gb": max(r["peak_gb"] for r in own),
            "time_ratio": statistics.median(
                statistics.median(a["seconds"]) / statistics.median(b["seconds"]) for a, b in pairs
            ),
            "peak_ratio": statistics.median(a["peak_gb"] / b["peak_gb"] for a, b in pairs),
            "ms_by_round": [[round(1e3 * t, 3) for t in r["seconds"]] for r in own],
        }
    return summary


def by_round(result: dict[str, Any]) -> int:
    return result["round"]


# --- where the time goes --------------------------------------------------------------------------------------


def breakdown(quick: bool, emit: Emit, case: Case) -> None:
    """Count the operations of a step as traced, and time its parts and variants of its settings."""
    steps = 2 if quick else 6
    batches = {
        kind: collate(random_examples(case, share, case.rows), range(case.rows))
        for kind, share in SUPERVISED_SHARE.items()
    }
    for name in (THEIRS, NA_LORA):
        one = Contender(name, case)
        for kind, batch in batches.items():
            emit(f"{name}, {kind}", time_parts(one, batch, steps) | {"graph": count_operations(one, batch)})
        del one
        mx.clear_cache()
    for variant, context in variants().items():
        with context():
            one = Contender(THEIRS if THEIRS in variant else NA_LORA, case, "cache kept" not in variant)
            for kind, batch in batches.items():
                one.iterate(batch)
                measured = measure(one, [batch], steps)
                ms = 1e3 * statistics.median(measured["seconds"])
                emit(f"{variant}, {kind}", {"ms_per_step": ms, "peak_above_weights_gb": measured["peak_gb"]})
        del one
        mx.clear_cache()


def variants() -> dict[str, Callable[[], Any]]:
    """Return contexts that change how our step computes, by name."""
    return {
        "na-lora, as it is": nullcontext,
        "na-lora, cache kept": nullcontext,
        "mlx_lm.lora, cache kept": nullcontext,
        "na-lora, cache kept, tiles 2048 x 8192": partial(tiles, 2048, 8192),
        "na-lora, cache kept, mlx's attention": mlx_attention,
        "na-lora, cache kept, no kernels": without_kernels,
        "na-lora, cache kept, tiles 2048 x 8192, mlx's attention": tiles_and_attention,
    }


@contextmanager
def tiles(rows: int, columns: int) -> Iterator[None]:
    """Compute the output head in tiles of another size."""
    values = {"TILE_ROWS": rows, "TILE_COLUMNS": columns, "TILE_BYTES": 4 * rows * columns}
    with patch.multiple(cross_entropy, **values), patch("nalora_mlx.training.loss.TILE_ROWS", rows):
        yield


@contextmanager
def mlx_attention() -> Iterator[None]:
    """Leave attention to MLX."""
    with patch.object(step_module, "lean_attention", nullcontext):
        yield


@contextmanager
def without_kernels() -> Iterator[None]:
    """Compute the gated residual by MLX's own operations."""
    with patch.dict(os.environ, {"NALORA_KERNEL": REFERENCE}):
        yield


@contextmanager
def tiles_and_attention() -> Iterator[None]:
    with tiles(2048, 8192), mlx_attention():
        yield


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
        inputs = [mx.array(a) for a in (batch.inputs, *batch.loss_positions())]
        parts["forward"] = repeat_timed(lambda: loss.evaluate(*inputs), steps)
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
    launched = {kind: n for kind, n in counts.items() if kind not in VIEWS}
    most = dict(Counter(launched).most_common(12))
    return {"operations": sum(counts.values()), "not_views": sum(launched.values()), "most": most}
