"""Short training runs on tiny models that give the same result on every device, up to rounding.

Weights, adapters and data are drawn by NumPy, and base weights are quantized on the CPU, so that all devices start from
the same bits. For gpu_check.py, mac_check.py and tests/device_checks.py.
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten

from nalora_mlx import NALoRAConfig, TrainingConfig, adapt, train
from nalora_mlx.adapters.files import adapter_weights
from nalora_mlx.core.config import PLAIN_LORA
from nalora_mlx.data.preferences import PreferenceExample
from nalora_mlx.data.tokenization import Example
from nalora_mlx.ops.kernels.backend import ENVIRONMENT, REFERENCE

ROWS, LENGTH, VOCABULARY = 3, 70, 1003
DENSE = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "intermediate_size": 203,  # not a multiple of the four channels per thread
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": True,
}
EXPERTS = {
    **DENSE,
    "model_type": "mixtral",
    "intermediate_size": 99,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}


@dataclass(frozen=True)
class Setup:
    """What a short run trains, and how.

    Attributes:
        config: of the model.
        settings: of `TrainingConfig`.
        rank: of the adapters.
        bits: of the base weights; None for weights in the dtype of the run.
        na: whether NA-LoRA's mechanisms are on; else plain LoRA.
    """

    config: dict[str, Any]
    settings: dict[str, Any]
    rank: int = 8
    bits: int | None = None
    na: bool = True


SETUPS = {
    "rank 8": Setup(DENSE, {}),
    "rank 32": Setup(DENSE, {}, rank=32),
    "plain LoRA": Setup(DENSE, {}, na=False),
    "gradient checkpointing": Setup(DENSE, {"grad_checkpoint": True}),
    "packing": Setup(DENSE, {"packing": True}),
    "4-bit base": Setup({**DENSE, "intermediate_size": 192}, {}, bits=4),
    "experts": Setup(EXPERTS, {}),
    "preferences": Setup(DENSE, {"train_mode": "dpo"}),
}


@dataclass
class Outcome:
    """The losses of a run's steps, and what training changed of each adapter array."""

    losses: list[float]
    changes: dict[str, np.ndarray]


def training_run(
    setup: Setup, device: Any, dtype: mx.Dtype = mx.float32, steps: int = 5, kernels: bool = True
) -> Outcome:
    """Train for a few steps on a device.

    Args:
        setup: model and settings.
        device: where to train.
        dtype: of the base weights.
        steps: number of updates.
        kernels: whether kernels may run; else MLX's own operations.
    """
    with using_device(device), using_kernels(kernels):
        model = build_model(setup, dtype)
        before = {name: np.array(a) for name, a in adapter_weights(model).items()}
        losses: list[float] = []
        settings = {"batch_size": ROWS, "iters": steps, "steps_per_report": 1} | setup.settings
        train(
            model,
            random_pairs(4 * ROWS) if "train_mode" in settings else random_rows(4 * ROWS),
            config=TrainingConfig(**settings),
            optimizer=optim.SGD(learning_rate=0.1),
            listeners=[lambda e: losses.append(e["loss"]) if e["event"] == "metrics" else None],
        )
        after = {name: np.array(a) for name, a in adapter_weights(model).items()}
    return Outcome(losses, {name: after[name] - a for name, a in before.items()})


def build_model(setup: Setup, dtype: mx.Dtype) -> nn.Module:
    """Return an adapted model whose adapters have an effect, on the default device."""
    rng = np.random.default_rng(1)

    def draw(arrays: Any, std: float) -> list[tuple[str, mx.array]]:
        return [(name, mx.array(rng.normal(0, std, a.shape).astype(np.float32))) for name, a in arrays]

    with using_device(mx.cpu):
        module = import_module(f"mlx_lm.models.{setup.config['model_type']}")
        model: nn.Module = module.Model(module.ModelArgs.from_dict(setup.config))
        matrices = [(name, a) for name, a in tree_flatten(model.parameters()) if a.ndim > 1]
        model.load_weights(draw(matrices, 0.2), strict=False)
        model.set_dtype(dtype)
        if setup.bits:
            nn.quantize(model, 32, setup.bits)
        mx.eval(model.parameters())
    method: dict[str, Any] = dict(vars(PLAIN_LORA))
    if setup.na:  # everything at once
        method = {"mask": "soft", "step_scaling": True, "mask_warmup": 1, "selection_limit": 0.02}
    adapt(model, NALoRAConfig(rank=setup.rank, num_layers=2, scale=2.0, **method))
    model.load_weights(draw(tree_flatten(model.trainable_parameters()), 0.1), strict=False)
    return model


def random_rows(count: int) -> list[Example]:
    """Return rows of random tokens of different lengths, about half of them supervised."""
    rng = np.random.default_rng(3)
    rows = []
    for i in range(count):
        length = int(rng.integers(LENGTH // 3, LENGTH))
        tokens = rng.integers(1, VOCABULARY, length, dtype=np.int32)
        rows.append(Example(tokens, np.arange(length) >= length // 2, f"row:{i + 1}"))
    return rows


def random_pairs(count: int) -> list[PreferenceExample]:
    """Return preference rows: random rows, each with another random row's second half as the rejected answer."""
    rows = random_rows(2 * count)
    pairs = []
    for chosen, other in zip(rows[::2], rows[1::2], strict=True):
        start = int(chosen.loss_mask.argmax())
        tokens = np.concatenate([chosen.tokens[:start], other.tokens[other.loss_mask]])
        rejected = Example(tokens, np.arange(len(tokens)) >= start, chosen.source)
        pairs.append(PreferenceExample((chosen, rejected)))
    return pairs


def loss_error(got: Outcome, want: Outcome) -> float:
    """Return the largest relative difference of a step's loss."""
    pairs = list(zip(got.losses, want.losses, strict=True))
    return finite(max(abs(a - b) / abs(b) for a, b in pairs))


def change_error(got: Outcome, want: Outcome) -> float:
    """Return the largest difference of what training changed of an array, relative to the array's largest change."""
    errors = [0.0]
    for name, b in want.changes.items():
        difference = np.abs(got.changes[name].astype(np.float64) - b).max()
        errors.append(finite(float(difference / max(np.abs(b).max(), 1e-30))))
    return max(errors)


def finite(error: float) -> float:
    """Return an error, infinite if it is NaN."""
    return error if math.isfinite(error) else math.inf


@contextmanager
def using_device(device: Any) -> Iterator[None]:
    """Make a device the default while the context is open."""
    before = mx.default_device()
    mx.set_default_device(device)
    try:
        yield
    finally:
        mx.set_default_device(before)


@contextmanager
def using_kernels(allowed: bool) -> Iterator[None]:
    """Allow kernels, or compute everything by MLX's own operations, while the context is open."""
    before = os.environ.get(ENVIRONMENT)
    os.environ[ENVIRONMENT] = "auto" if allowed else REFERENCE
    try:
        yield
    finally:
        if before is None:
            del os.environ[ENVIRONMENT]
        else:
            os.environ[ENVIRONMENT] = before
