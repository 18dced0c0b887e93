"""Upper bounds of the peak memory of a training step, found without running it."""

import gc
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map
from mlx_lm.tuner.dora import DoRAEmbedding, DoRALinear

from nalora_mlx.adapters.forward_pass import recompute_activations
from nalora_mlx.core import trees
from nalora_mlx.core.trees import nbytes
from nalora_mlx.models.recurrences import find_patches
from nalora_mlx.ops.device_sizes import device_kind, device_sizes, using_sizes
from nalora_mlx.training.graph_memory import peak_bytes
from nalora_mlx.training.loss import Loss
from nalora_mlx.training.memory_model import BatchShape, trial_batch
from nalora_mlx.training.step import TrainingStep
from nalora_mlx.training.traced_graph import trace_graph

KEPT_OUTPUTS = 3  # times the outputs of a layer's projections and norms, kept for the backward
KEPT_SCORES = 4  # times the attention scores of a layer, if its attention keeps them
IN_FLIGHT = {"cpu": 16, "metal": 64, "cuda": 64}  # times the outputs of one layer, in flight
TILES = 64  # of logits in flight
MARGIN = 1.05  # times the simulated memory, for what operations allocate besides their outputs


def bound_from_shapes(loss: Loss, shape: BatchShape) -> float:
    """Return bytes that a step stays below, from shapes alone.

    It is infinite for a model that is not a plain transformer, or whose output head does not run in tiles.

    Assumes that each layer keeps several times the outputs of its projections and norms, and its attention scores. The
    bound is several times the peak, but takes no time, and is enough to know that a small run fits.
    """
    model, args = loss.model, getattr(loss.model, "args", None)
    heads, experts_per_token = (
        getattr(args, name, None) for name in ("num_attention_heads", "num_experts_per_tok")
    )
    dora = any(isinstance(module, DoRALinear | DoRAEmbedding) for module in model.modules())
    if not isinstance(heads, int) or dora or find_patches(model) or not loss.has_tiles:
        return math.inf
    layers = [
        sum(
            _outputs_per_token(module.weight, experts_per_token)
            for _, module in layer.named_modules()
            if isinstance(module.get("weight"), mx.array)
        )
        for layer in model.layers
    ]
    in_flight = IN_FLIGHT[device_kind()]
    outputs = KEPT_OUTPUTS * sum(layers) + in_flight * max(layers, default=0)
    scores = (KEPT_SCORES * len(layers) + in_flight) * heads * shape.length
    weights, trained = nbytes(model.parameters()), nbytes(model.trainable_parameters())
    head = TILES * device_sizes().head_elements
    return weights + 12 * trained + 4 * (shape.tokens * (outputs + scores) + head)


def _outputs_per_token(weight: mx.array, experts_per_token: Any) -> int:
    """Return how many numbers a module outputs per token, from the shape of its weight."""
    if weight.ndim == 1:
        return weight.size
    if weight.ndim == 2:
        return weight.shape[0]
    return weight.shape[-2] * (experts_per_token if isinstance(experts_per_token, int) else weight.shape[0])


def bound_from_graph(
    step: TrainingStep, shape: BatchShape, layers: Sequence[nn.Module] = (), accumulating: bool = False
) -> float:
    """Return bytes that a step stays below, from its traced graph; infinite if MLX cannot export the graph.

    Nothing is executed, and the step is the same afterwards.

    Args:
        step: made like the run's training step.
        shape: of the run's largest batch.
        layers: whose activations are recomputed.
        accumulating: whether gradients of several batches are accumulated.
    """
    batch = trial_batch(shape)

    def run(_: mx.array) -> list[mx.array]:
        loss = step(batch, batch.loss_counts, None, True)[0]
        return [leaf for _, leaf in tree_flatten([step.state, loss]) if isinstance(leaf, mx.array)]

    recomputed = recompute_activations(list(layers)) if layers else nullcontext()
    # Without chunks there are fewer operations to trace, and temporaries take a little more memory.
    unchunked = using_sizes(device_sizes()._replace(chunk_bytes=None))
    with _eager_with_placeholders(step), _no_garbage_collection(), recomputed, unchunked:
        try:
            activations = MARGIN * peak_bytes(trace_graph(run, mx.array(0)))
        except Exception:  # the trials raise it again if it is the step that fails
            return math.inf
    trained = nbytes(step.model.trainable_parameters())
    state = nbytes([step.state["optimizer"], step.state["importance"]])
    accumulated = 2 * trained if accumulating else 0  # the gradients so far, and with those of a batch
    return nbytes(step.model.parameters()) + state + accumulated + activations


@contextmanager
def _eager_with_placeholders(step: TrainingStep) -> Iterator[None]:
    """Let the step run uncompiled, on an optimizer state that takes no memory, and restore it."""
    before, compiled, training = trees.references(step.state), step.compiled, step.model.training
    mx.eval(step.weights.arrays, step.model.trainable_parameters())
    for part in ("optimizer", "importance"):
        placeholders = tree_map(_placeholder, trees.references(step.state[part]))
        mx.eval(placeholders)
        trees.assign(step.state[part], placeholders)
    step.compiled = False
    step.model.train()
    try:
        yield
    finally:
        step.compiled = compiled
        trees.assign(step.state, before)
        step.model.train(training)


def _placeholder(leaf: Any) -> Any:
    return mx.broadcast_to(mx.array(0, leaf.dtype), leaf.shape) if isinstance(leaf, mx.array) else leaf


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Switch Python's garbage collection off: going through all objects again and again takes half of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
