"""The compiled training step: forward, backward, and the scaled optimizer update that ends an accumulation window."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map

from nalora_mlx.adapters.attach import dropout_count, gated_mlps
from nalora_mlx.adapters.forward_pass import ForwardPass, adapter_casts, forward_pass
from nalora_mlx.core import trees
from nalora_mlx.core.config import PLAIN_LORA, NAParameters, TrainingConfig
from nalora_mlx.data.batches import Batch
from nalora_mlx.ops.attention import lean_attention
from nalora_mlx.ops.fast_math import vectorized, vectorized_models
from nalora_mlx.training import importance
from nalora_mlx.training.compilation import compile_with_state
from nalora_mlx.training.distributed import ALONE, Workers
from nalora_mlx.training.importance import LayerState, LayerStatistics
from nalora_mlx.training.importance_stacks import ImportanceStacks
from nalora_mlx.training.loss import Arrays, Loss, SupervisedLoss, array_shapes, batch_arrays
from nalora_mlx.training.optimizers import apply_scaled
from nalora_mlx.training.selection_limit import SelectionLimit, is_measured, probe_arrays
from nalora_mlx.training.stacks import StackedParameters

MAX_GRAPHS = 48  # compiled graphs kept, one per batch shape; each takes about 18 MB on a CPU


class Statistics(NamedTuple):
    """What the gated MLPs observed."""

    # By path. An expert that is a module of its own is absent if it got no token.
    layers: dict[str, LayerStatistics]
    tokens: mx.array  # real tokens; []


class Accumulated(NamedTuple):
    """What the iterations of an accumulation window add up to."""

    gradients: Any  # tree of the trainable parameters
    statistics: Statistics


class Health(NamedTuple):
    """Whether the numbers of the current accumulation window are finite."""

    finite: (
        mx.array
    )  # losses, gradient and, after an update, the new parameters and the selection's change; []
    losses: mx.array  # the losses alone; []
    gradient_norm: mx.array  # global norm of the gradient, float32; []


class TrainingStep:
    """One iteration: forward, backward and, at the end of an accumulation window, the optimizer update.

    All mutable state is in `state`, which goes in and out of mx.compile. Forward and backward are compiled once per
    batch shape, the update once. An update is skipped if a loss, the gradient or a new parameter is NaN or infinite:
    parameters, optimizer and importance keep their values.

    Args:
        model: adapted model, or one with unfrozen parameters.
        optimizer: any mlx optimizer.
        parameters: NA settings; with both mechanisms off the update is the optimizer's own.
        compiled: False runs the same step eagerly, for models that inspect values and for debugging.
        loss: the model's loss; made here if None.
        grad_clip: largest global norm of an update's gradient; None does not clip.
        workers: data-parallel workers over whom losses, gradients and statistics are summed.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: optim.Optimizer,
        parameters: NAParameters = PLAIN_LORA,
        compiled: bool = True,
        loss: Loss | None = None,
        grad_clip: float | None = None,
        workers: Workers = ALONE,
    ):
        self.model, self.optimizer, self.parameters = model, optimizer, parameters
        self.grad_clip, self.workers = grad_clip, workers
        self.loss: Loss = loss or SupervisedLoss(model)
        self.compiled = compiled and self.loss.compiled
        self.gated = {mlp.path: mlp for mlp in gated_mlps(model)} if parameters.active else {}
        self.dropouts = dropout_count(model)
        self.layers = ImportanceStacks(self.gated)
        roles = self.layers.roles if parameters.scales_channels else {}
        self.weights = StackedParameters(model, optimizer, adapter_casts(model, self.loss.forward), roles)
        self.weights.init_optimizer(optimizer)
        self.state: dict[str, Any] = {
            "model": model.state,
            "weights": self.weights.arrays,
            "optimizer": optimizer.state,
            # "selection_change" is that of the last measured update, before it was shortened.
            "importance": {
                "step": mx.array(0),
                "stacks": self.layers.init(),
                "selection_change": mx.array(0.0),
            },
            "random": mx.random.state,
            "health": Health(mx.array(True), mx.array(True), mx.array(0.0)),
        }
        if self.loss.measures:
            self.state["measures"] = mx.zeros((len(self.loss.measures), 2))
        limit = SelectionLimit(parameters.selection_limit, self.loss, self.weights, self.gated, workers)
        self.limit = limit if limit.limit and limit.gated else None
        self._loss_and_gradients = mx.value_and_grad(self._loss)
        self.graph_of_shape = lru_cache(MAX_GRAPHS)(self._compile_backward)
        self._compiled_finish = compile_with_state(self._finish, self.state, self.state)

    def notices(self) -> list[str]:
        """Return what takes more time or memory than it could, and what has no effect."""
        notices = self.loss.notices()
        if self.gated and self.parameters.selection_limit and self.limit is None:
            notices.append(
                "selection_limit has no effect: the activations of this model have no selection weights to measure"
            )
        return notices

    @property
    def importance(self) -> dict[str, Any]:
        """What NA-LoRA keeps from update to update.

        The number of updates, "step"; the LayerState of each gated MLP by path, "layers"; "selection_change", see
        `SelectionLimit`.
        """
        state = dict(self.state["importance"])
        return {"layers": self.layers.unstack(state.pop("stacks")), **state}

    def set_layers(self, layers: Mapping[str, LayerState]) -> None:
        """Replace the LayerState of each gated MLP."""
        trees.assign(self.state["importance"]["stacks"], self.layers.stack(layers))
        mx.eval(self.state["importance"])

    @property
    def health(self) -> Health:
        """Whether the current accumulation window is finite so far."""
        return self.state["health"]

    @property
    def measures(self) -> mx.array | None:
        """(sum, count) of each of the loss's measures over the last batch and all workers; [K, 2]. None without any."""
        return self.state.get("measures")

    def __call__(
        self,
        batch: Batch,
        window_counts: int | Sequence[int],
        accumulated: Accumulated | None,
        update: bool,
        seed: tuple[int, int] = (0, 0),
        more: Mapping[str, mx.array] | None = None,
    ) -> tuple[mx.array, Accumulated | None]:
        """Run one iteration.

        Args:
            batch: this worker's share of a batch.
            window_counts: for each term of the loss, how many tokens or rows the whole accumulation window has; each
                weighs 1 / count. See `Batch.loss_counts`.
            accumulated: what the previous iteration of the window returned; None for its first.
            update: whether this iteration ends the window.
            seed: (run seed, iteration), from which dropout draws.
            more: further arrays that the loss reads.

        Returns:
            The summed loss of the batch over all workers, and what to pass to the next iteration of the window. Lazy.
        """
        self.weights.adopt()
        # Each worker draws its own dropout.
        entropy = (*seed, self.workers.rank) if self.workers.rank else seed
        key = mx.random.key(int(np.random.SeedSequence(entropy).generate_state(1)[0]))
        arrays = batch_arrays(batch) | dict(more or {})
        counts = [window_counts] if isinstance(window_counts, int) else window_counts
        weights = mx.array([1 / max(count, 1) for count in counts])
        backward = self._backward
        if self.compiled:  # otherwise images may bring values that are no arrays
            backward = self.graph_of_shape((array_shapes(arrays), accumulated is None))
        loss, measures, window = backward(arrays, weights, key, accumulated)
        finish = self._compiled_finish if self.compiled else self._finish
        probe = None
        if update and self.limit is not None and is_measured(seed[1]):
            probe = probe_arrays(batch)
        result = finish(loss, measures, window, accumulated is None, update, probe)
        self.weights.record()
        return result

    def _compile_backward(self, _shape: Any) -> Callable[..., Any]:
        """Compile the backward for one batch shape."""

        # A function object per shape: mx.compile frees a graph when its function is gone.
        def backward(*arguments: Any) -> tuple[mx.array, mx.array | None, Accumulated]:
            return self._backward(*arguments)

        state = [self.model.state, self.weights.arrays, self.state["importance"], mx.random.state]
        return compile_with_state(backward, state, state)

    def _loss(
        self, stacks: dict[str, mx.array], arrays: Arrays, weights: mx.array, context: ForwardPass
    ) -> tuple[mx.array, Any]:
        self.weights.install_cast(stacks)
        loss, measures = self.loss(arrays, weights)
        # Copied, since checkpointed layers write their statistics again when the backward recomputes them.
        statistics = dict(context.statistics)
        return loss, (loss / weights[0], measures, statistics, mx.sum(arrays["token_mask"]))

    def _backward(self, arrays, weights, key, accumulated):
        """Return loss and measures of a batch, and the gradients and statistics of the window so far."""
        routes = {}
        if self.parameters.route:
            # The masks of the previous update: this step's statistics are not known yet.
            routes = {path: state.mask for path, state in self.importance["layers"].items()}
        current = self.weights.current()
        context = ForwardPass(
            token_mask=arrays["token_mask"] if self.parameters.scales_channels else None,
            routes=routes,
            dropout_keys=mx.random.split(key, self.dropouts) if self.dropouts else None,
            scaled=self.weights.scaled,
        )
        try:
            with forward_pass(context), self._fast_forward(), self.loss.installed(arrays):
                (_, (loss, measures, sums, tokens)), gradients = self._loss_and_gradients(
                    self.weights.arrays, arrays, weights, context
                )
        finally:
            self.weights.install(current)
        statistics = Statistics({path: LayerStatistics(**layer) for path, layer in sums.items()}, tokens)
        if accumulated is not None:
            gradients = tree_map(mx.add, gradients, accumulated.gradients)
            statistics = add_statistics(statistics, accumulated.statistics)
        return loss, measures, Accumulated(gradients, statistics)

    @contextmanager
    def _fast_forward(self) -> Iterator[None]:
        faster = vectorized_models() if self.compiled else nullcontext()
        with vectorized(), faster, lean_attention():
            yield

    def _finish(self, loss, measures, window, first, update, probe):
        """Record whether all numbers are finite and, at the end of a window, update the parameters."""
        if update:
            loss, measures, window = self.workers.sum((loss, measures, window))
            norm = global_norm(window.gradients)
        else:  # the norm of this worker's gradient so far; the sum is finite only if every worker's is
            loss, measures, norm = self.workers.sum((loss, measures, global_norm(window.gradients)))
        if measures is not None:
            self.state["measures"] = measures
        losses = mx.isfinite(loss) if first else mx.isfinite(loss) & self.health.losses
        self.state["health"] = Health(losses & mx.isfinite(norm), losses, norm)
        if not update:
            return loss, window
        old = tree_map(lambda array: array, self._updated_state())  # new containers, the same arrays
        self._update(window, probe)
        new = self._updated_state()
        finite = self.health.finite & mx.isfinite(global_norm(new[0]))
        if self.limit is not None:  # the change is NaN if the new parameters compute NaN
            finite = finite & mx.isfinite(self.state["importance"]["selection_change"])
        self.state["health"] = self.health._replace(finite=finite)
        kept = tree_map(lambda n, o: n if n is o else mx.where(finite, n, o), new, old)
        trees.assign(self._updated_state(), kept)
        self.weights.install(self.weights.stacks.unstack(self.weights.arrays))
        return loss, None

    def _updated_state(self) -> list[Any]:
        """Return what an update changes: trainable parameters, optimizer state, importance."""
        return [self.weights.arrays, self.optimizer.state, self.state["importance"]]

    def _update(self, window: Accumulated, probe: Arrays | None) -> None:
        """Clip the gradients, update the importance, and take the scaled optimizer step, up to the limit."""
        gradients, factors = window.gradients, dict[str, mx.array]()
        if self.grad_clip is not None:
            factor = self.grad_clip / mx.maximum(self.health.gradient_norm, self.grad_clip)
            gradients = tree_map(lambda g: (g * factor).astype(g.dtype), gradients)
        state = self.state["importance"]
        if self.parameters.scales_channels:
            state["step"] = state["step"] + 1
            for stack, layers in state["stacks"].items():
                statistics = self.layers.stack_statistics(stack, *window.statistics)
                if statistics is None:  # the forward reaches none of these layers
                    continue
                layers = importance.observe(layers, statistics, self.parameters.beta)
                layers = importance.refresh(layers, state["step"], self.parameters)
                state["stacks"][stack] = layers
                q = importance.multiplier(layers, self.parameters)
                factors |= self.layers.step_factors(stack, q, self.weights.stacks)
        new = apply_scaled(self.optimizer, gradients, self.weights.arrays, factors)
        if self.limit is not None:
            if probe is not None:
                with self._fast_forward():
                    state["selection_change"] = self.limit.change(new, probe)
            new = self.limit.shorten(new, state["selection_change"])
        trees.assign(self.weights.arrays, new)

    def state_tree(self) -> dict[str, Any]:
        """Return the optimizer and importance state as nested dicts and lists of arrays, for a checkpoint."""
        optimizer = self.weights.stacks.unstack_state(self.optimizer.state)
        return {"optimizer": optimizer, "importance": importance.to_tree(self.importance)}

    def load_state_tree(self, tree: dict[str, Any]) -> None:
        """Restore what `state_tree` returned."""
        trees.assign(self.optimizer.state, self.weights.stacks.stack_state(tree["optimizer"]))
        loaded = importance.from_tree(tree["importance"])
        self.set_layers(loaded.pop("layers"))
        trees.assign(self.state["importance"], loaded)


def global_norm(tree: Any) -> mx.array:
    """Return the Euclidean norm of all entries of a tree, computed in float32."""
    squares = (mx.sum(mx.square(array.astype(mx.float32))) for _, array in tree_flatten(tree))
    return mx.sqrt(sum(squares, mx.array(0.0)))


def add_statistics(new: Statistics, old: Statistics) -> Statistics:
    """Add the statistics of two iterations; a module may have run in only one of them."""
    layers = dict(old.layers)
    for path, statistics in new.layers.items():
        layers[path] = statistics.add(layers[path]) if path in layers else statistics
    return Statistics(layers, new.tokens + old.tokens)


def recomputed_layers(model: nn.Module, config: TrainingConfig) -> list[nn.Module]:
    """Return the layers to checkpoint: every k-th of those that the backward pass goes through."""
    layers = list(model.layers)
    while layers and not tree_flatten(layers[0].trainable_parameters()):
        layers.pop(0)
    return layers[:: config.grad_checkpoint_every] if config.grad_checkpoint else []
