"""Trainers to compare: ours and mlx_lm.lora's, on random weights and tokens, one iteration at a time."""

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.tuner.trainer import default_loss
from mlx_lm.tuner.utils import linear_to_lora_layers

from nalora_mlx import NALoRAConfig, TrainingConfig, adapt
from nalora_mlx.data.batches import Batch
from nalora_mlx.data.tokenization import Example
from nalora_mlx.training.run import Run

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
    "qwen3-4b": {
        "model_type": "qwen3",
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "num_hidden_layers": 36,
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


@dataclass(frozen=True)
class Case:
    """A model shape and a batch shape to train with.

    Attributes:
        shape: a key of SHAPES.
        rows: sequences in a batch.
        length: tokens that the model reads of each.
        quick: whether to use tiny sizes instead.
        layers: number of layers; None for those of the shape.
        bits: of the quantized weights; None for weights in `dtype`.
    """

    shape: str
    rows: int
    length: int
    quick: bool = False
    layers: int | None = None
    bits: int | None = None

    @property
    def dtype(self) -> mx.Dtype:
        """The dtype in which the model computes."""
        return mx.float32 if self.quick else mx.bfloat16

    @property
    def config(self) -> dict[str, Any]:
        """The model's config."""
        changes = TINY if self.quick else {}
        if self.quick and self.bits:
            changes = {**TINY, "hidden_size": 64, "intermediate_size": 128}  # multiples of the group size
        layers = {"num_hidden_layers": self.layers} if self.layers else {}
        return {**SHAPES[self.shape], **COMMON, **changes, **layers}


def build_model(config: dict[str, Any], dtype: mx.Dtype, bits: int | None = None) -> nn.Module:
    """Return a model with random weights, quantized if `bits` is given. One layer at a time is held unquantized."""
    mx.random.seed(0)
    module = import_module(f"mlx_lm.models.{config['model_type']}")
    model = module.Model(module.ModelArgs.from_dict(config))
    for part in (*model.layers, model):
        part.set_dtype(dtype)
        if bits:
            nn.quantize(part, 64, bits)
        mx.eval(part.parameters())
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
        clear_cache: whether to clear the allocator's cache after each iteration; None for the trainer's default.
    """

    def __init__(self, name: str, case: Case, clear_cache: bool | None = None):
        self.name, self.clear_cache = name, clear_cache in (None, True)  # mlx_lm.lora clears it
        self.model = build_model(case.config, case.dtype, case.bits)
        self.optimizer = optim.Adam(learning_rate=1e-5)
        if name == THEIRS:
            self.model.freeze()
            layers = min(ADAPTED_LAYERS, len(self.model.layers))
            linear_to_lora_layers(self.model, layers, {"rank": RANK, "scale": 20.0, "dropout": 0.0})
            self.model.train()
            self.compiled = self._compile_theirs()
            return
        off: dict[str, Any] = (
            {"mask": "off", "step_scaling": False, "selection_limit": 0.0} if name == LORA else {}
        )
        adapt(self.model, NALoRAConfig(rank=RANK, num_layers=ADAPTED_LAYERS, **off))
        settings = TrainingConfig(batch_size=case.rows, iters=10**9, steps_per_report=10**9)
        if clear_cache is not None:
            settings.clear_cache_threshold = 0 if clear_cache else 1 << 60
        self.run = Run(self.model, random_examples(case, 1, 4 * case.rows), [], settings, self.optimizer)
        self.iterations = 0
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
        self.finish()
        step = self.run.step
        loss, _ = step(batch, batch.supervised_tokens, None, True)
        return [a for _, a in tree_flatten([step.state, loss])], loss / batch.supervised_tokens

    def iterate(self, batch: Batch) -> None:
        """Run one iteration. Ours may return before it has ended; `finish` waits for it."""
        if self.name != THEIRS:
            self.iterations += 1
            self.run.update([batch], range(self.iterations, self.iterations + 1))
            return
        mx.eval(self.start(batch)[0])
        if self.clear_cache and mx.get_cache_memory() > 0:
            mx.clear_cache()

    def finish(self) -> None:
        """Wait for the last iteration."""
        if self.name != THEIRS:
            self.run.settle()
        mx.synchronize()

    def first_loss(self, batch: Batch) -> float:
        """Run one iteration, and return the loss per supervised token before it."""
        arrays, loss = self.start(batch)
        mx.eval(arrays, loss)
        return loss.item()

    def state_bytes(self) -> int:
        """Return the size of the adapters and of the optimizer's state."""
        trees = [self.model.trainable_parameters(), self.optimizer.state]
        return sum(a.nbytes for _, a in tree_flatten(trees) if isinstance(a, mx.array))


# --- measuring ------------------------------------------------------------------------------------------------


def measure(contender: Contender, batches: Sequence[Batch], steps: int) -> dict[str, float]:
    """Return the seconds per iteration, and the peak memory above the frozen weights."""
    mx.clear_cache()
    contender.iterate(batches[-1])  # fills the allocator's cache, if it is kept
    contender.finish()
    resident = mx.get_active_memory()
    mx.reset_peak_memory()
    start = time.perf_counter()
    for batch in itertools.islice(itertools.cycle(batches), steps):
        contender.iterate(batch)
    contender.finish()
    seconds = (time.perf_counter() - start) / steps
    peak = mx.get_peak_memory() - resident + contender.state_bytes()
    return {"seconds": seconds, "peak_gb": peak / 1e9}


def summarize(results: list[dict[str, Any]], tokens: int) -> dict[str, Any]:
    """Return medians for each trainer, and medians over rounds of the ratios to mlx_lm.lora.

    Args:
        results: what `measure` returned, with "trainer"; the rounds of each trainer in order.
        tokens: supervised tokens of a batch.
    """
    theirs = [r for r in results if r["trainer"] == THEIRS]
    summary: dict[str, Any] = {"supervised_tokens": tokens, "rounds": len(theirs)}
    for name in dict.fromkeys(r["trainer"] for r in results):
        own = [r for r in results if r["trainer"] == name]
        pairs = list(zip(own, theirs, strict=True))
        step = statistics.median(r["seconds"] for r in own)
        summary[name] = {
            "ms_per_step": 1e3 * step,
            "us_per_supervised_token": 1e6 * step / tokens,
            "peak_above_weights_gb": max(r["peak_gb"] for r in own),
            "time_ratio": statistics.median(a["seconds"] / b["seconds"] for a, b in pairs),
            "peak_ratio": statistics.median(a["peak_gb"] / b["peak_gb"] for a, b in pairs),
            "ms_by_round": [round(1e3 * r["seconds"], 3) for r in own],
        }
    return summary


def compare(
    contenders: Sequence[Contender], batches: Sequence[Batch], rounds: int, steps: int, until: float
) -> dict[str, Any]:
    """Run trainers in turn, in alternating order, and summarize; end after two rounds once `until` has passed."""
    results: list[dict[str, Any]] = []
    for i in range(rounds):
        for one in contenders[:: 1 if i % 2 else -1]:
            results.append({"trainer": one.name, **measure(one, batches, steps)})
        if i >= 1 and time.perf_counter() > until:
            break
    return summarize(results, batches[0].supervised_tokens)
