"""The graph of a training step as a GPU would run it, traced on any machine without computing anything.

Models get weights of the right shapes that take no memory, so a step of a large model can be traced on a small machine.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map
from mlx_lm.tuner.trainer import default_loss
from mlx_lm.tuner.utils import linear_to_lora_layers
from step_cost_gpu import as_gpu

from nalora_mlx import NALoRAConfig, adapt
from nalora_mlx.adapters import layouts
from nalora_mlx.core.config import PLAIN_LORA
from nalora_mlx.core.config_presets import PRESETS
from nalora_mlx.data.batches import Batch, collate
from nalora_mlx.data.tokenization import Example
from nalora_mlx.models import recurrences
from nalora_mlx.models.output_head import OutputHead, find_output_head
from nalora_mlx.ops.device_sizes import DeviceSizes
from nalora_mlx.training import loss
from nalora_mlx.training.loss import batch_arrays
from nalora_mlx.training.selection_limit import probe_arrays
from nalora_mlx.training.step import TrainingStep
from nalora_mlx.training.traced_graph import TracedGraph, trace_graph

THEIRS, LORA, NA_LORA = "mlx_lm.lora", "lora", "na-lora"
MEASURED = "na-lora, measured"  # an update whose change of the selection is measured; after 20, every eighth
PAPER = "paper"  # --preset paper
METHODS: dict[str, dict[str, Any]] = {  # of our trainers: arguments of NALoRAConfig
    LORA: dict(vars(PLAIN_LORA)),
    NA_LORA: {},
    MEASURED: {},
    PAPER: PRESETS["paper"]["na_parameters"],
}
TRAINERS = (THEIRS, *METHODS)
COMMON = {
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
}


def _shape(
    kind: str, hidden: int, mlp: int, heads: int, key_heads: int, width: int, layers: int, vocab: int
) -> dict[str, Any]:
    return {
        "model_type": kind,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "head_dim": width,
        "num_hidden_layers": layers,
        "vocab_size": vocab,
        **COMMON,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "tiny": _shape("llama", 48, 100, 4, 2, 12, 2, 300),
    "smollm2-135m": _shape("llama", 576, 1536, 9, 3, 64, 30, 49152),
    "qwen3-0.6b": _shape("qwen3", 1024, 3072, 16, 8, 128, 28, 151936),
    "qwen3-4b": _shape("qwen3", 2560, 9728, 32, 8, 128, 36, 151936),
    "qwen3.5-4b": {
        **_shape("qwen3_5", 2560, 9216, 16, 4, 256, 32, 248320),
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
    },
    "llama-3.2-1b": _shape("llama", 2048, 8192, 32, 8, 64, 16, 128256),
    "mistral-7b": _shape("llama", 4096, 14336, 32, 8, 128, 32, 32000),
    "llama-3.2-3b": _shape("llama", 3072, 8192, 24, 8, 128, 28, 128256),
}
SMALL = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 160}  # of the model whose head is searched


@dataclass(frozen=True)
class Step:
    """What determines the graph of a training step.

    Attributes:
        trainer: one of TRAINERS.
        shape: a key of SHAPES.
        rows: sequences of a batch.
        length: tokens that the model reads of each.
        share: share of the tokens that are supervised, the last ones of each row.
        backend: "metal" or "cuda", which decides what MLX has as one kernel.
        bits: of the frozen weights: 16, 8 or 4.
        layers: number of adapted layers, the last ones; -1 for all.
        rank: of the adapters.
        sizes: of our pieces; those of the backend if None.
        attention: "ours", or "mlx" to leave attention to MLX.
        depth: number of layers of the model; that of the shape if None.
        keys: of the adapted projections, as mlx-lm writes them; all of them if None.
    """

    trainer: str
    shape: str
    rows: int
    length: int
    share: float = 1.0
    backend: str = "metal"
    bits: int = 16
    layers: int = -1
    rank: int = 8
    sizes: DeviceSizes | None = None
    attention: str = "ours"
    depth: int | None = None
    keys: tuple[str, ...] | None = None

    @property
    def config(self) -> dict[str, Any]:
        """The model's config."""
        return SHAPES[self.shape] | ({"num_hidden_layers": self.depth} if self.depth else {})


@dataclass(frozen=True)
class TracedStep:
    """A traced step.

    Attributes:
        graphs: of each compiled function, in order.
        weights: bytes of the frozen weights.
        state: bytes of adapters and optimizer state.
    """

    graphs: list[TracedGraph]
    weights: int
    state: int


def trace_step(step: Step) -> TracedStep:
    """Trace a training step. Nothing is computed."""
    model = _model(step)
    weights = _bytes(model.parameters())
    mx.random.seed(0)
    mx.eval(mx.random.state)
    trace = _trace_theirs if step.trainer == THEIRS else _trace_ours
    return trace(step, model, weights)


def _model(step: Step, changes: dict[str, Any] | None = None) -> nn.Module:
    """Return a model whose weights are single values, broadcast."""
    config = {**step.config, **(changes or {})}
    module = import_module(f"mlx_lm.models.{config['model_type']}")
    model = module.Model(module.ModelArgs.from_dict(config))
    model.set_dtype(mx.bfloat16)
    if step.bits < 16:
        nn.quantize(model, 64, step.bits)  # lazy
    _replace_weights(model)
    model.freeze()
    return model


def _replace_weights(model: nn.Module) -> None:
    model.update(tree_map(lambda a: mx.broadcast_to(mx.array(0, a.dtype), a.shape), model.parameters()))
    mx.eval(model.parameters())


def _bytes(tree: Any) -> int:
    return sum(a.nbytes for _, a in tree_flatten(tree) if isinstance(a, mx.array))


def random_batch(step: Step) -> Batch:
    """Return rows of random tokens of one length, the last part of each supervised."""
    tokens = np.random.default_rng(0).integers(1, 100, (step.rows, step.length + 1), dtype=np.int32)
    supervised = np.arange(step.length + 1) > step.length - round(step.share * step.length)
    rows = [Example(row, supervised, f"row:{i + 1}") for i, row in enumerate(tokens)]
    return collate(rows, range(step.rows))


def _trace_theirs(step: Step, model: nn.Module, weights: int) -> TracedStep:
    layers = len(model.layers) if step.layers < 0 else min(step.layers, len(model.layers))
    settings = {"rank": step.rank, "scale": 20.0, "dropout": 0.0}
    linear_to_lora_layers(model, layers, settings | ({"keys": step.keys} if step.keys else {}))
    _replace_weights(model)
    model.train()
    optimizer = optim.Adam(learning_rate=1e-5)
    optimizer.init(model.trainable_parameters())
    batch = random_batch(step)
    first = 1 + step.length - batch.loss_mask.sum(axis=1)
    value_and_grad = nn.value_and_grad(model, default_loss)
    state = [model.trainable_parameters(), optimizer.state]

    def run(tokens: mx.array, lengths: mx.array) -> Any:
        (loss, count), gradients = value_and_grad(model, tokens, lengths)
        optimizer.update(model, gradients)
        return [loss, count, model.trainable_parameters(), optimizer.state]

    tokens = np.concatenate([batch.inputs, batch.targets[:, -1:]], axis=1)
    lengths = mx.array([(int(n), step.length) for n in first])
    size = _bytes(state)
    with as_gpu(step.backend, step.sizes, step.attention):
        graph = trace_graph(run, mx.array(tokens), lengths)
    return TracedStep([graph], weights, size)


def _trace_ours(step: Step, model: nn.Module, weights: int) -> TracedStep:
    method = METHODS[step.trainer]
    with patch.object(loss, "find_output_head", lambda *_: _head(step, model)), _unverified():
        adapt(model, NALoRAConfig(rank=step.rank, num_layers=step.layers, keys=step.keys, **method))
        _replace_weights(model)
        model.train()
        training = TrainingStep(
            model, optim.Adam(learning_rate=1e-5), model.adapt_result.config, compiled=False
        )
        state = training.state
        size = _bytes([model.trainable_parameters(), training.optimizer.state])
        batch = random_batch(step)
        given = batch_arrays(batch)
        probe = probe_arrays(batch) if step.trainer == MEASURED else None
        weights_of_terms = mx.array([1 / max(count, 1) for count in batch.loss_counts])
        window: list[Any] = []

        def backward(*arrays: mx.array) -> Any:
            named = dict(zip(given, arrays, strict=True))
            window[:] = training._backward(named, weights_of_terms, mx.random.key(0), None)
            return window

        with as_gpu(step.backend, step.sizes, step.attention):
            first = trace_graph(backward, *given.values())
            flat = tree_flatten(window)
            arrays = [
                mx.broadcast_to(mx.array(0, a.dtype), a.shape) for _, a in flat if isinstance(a, mx.array)
            ]

            def finish(*arrays: mx.array) -> Any:
                values = iter(arrays)
                result = tree_map(lambda leaf: next(values) if isinstance(leaf, mx.array) else leaf, window)
                loss, _ = training._finish(*result, True, True, probe)
                changed = {name: value for name, value in state.items() if name not in ("model", "random")}
                return [loss, changed]

            second = trace_graph(finish, *arrays)
    return TracedStep([first, second], weights, size)


@contextmanager
def _unverified() -> Iterator[None]:
    """Use rebuilt MLPs and the training forms of recurrences without the checks, which would run the model."""
    forms = patch.object(recurrences.TrainingForms, "_remove_differing", lambda *_: None)
    with forms, patch.object(layouts, "verify", lambda *_: 0.0):
        yield


@cache
def _head_paths(shape: str) -> tuple[str, str | None]:
    """Return the paths of a model's backbone and output projection, found on a small model of its kind."""
    small = _model(Step(NA_LORA, shape, 1, 8, depth=4), SMALL)
    random = tree_map(lambda a: mx.random.normal(a.shape) * 0.1, small.parameters())
    small.update(random)
    head = find_output_head(small)
    assert head is not None, "no output head found"
    paths = {id(module): path for path, module in small.named_modules()}
    return paths[id(head.backbone)], None if head.projection is None else paths[id(head.projection)]


def _head(step: Step, model: nn.Module) -> OutputHead:
    backbone, projection = _head_paths(step.shape)
    modules = dict(model.named_modules())
    head = OutputHead(modules[backbone], model, step.config["vocab_size"])
    head.projection = None if projection is None else modules[projection]
    return head
