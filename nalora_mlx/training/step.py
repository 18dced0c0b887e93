"""The compiled training step: forward and backward, and the scaled update at the end of an accumulation window."""

from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map

from nalora_mlx.adapters.attach import dropout_count, gated_mlps
from nalora_mlx.adapters.forward_pass import ForwardPass, forward_pass
from nalora_mlx.core.config import PLAIN_LORA, NAParameters
from nalora_mlx.data.batches import Batch
from nalora_mlx.models.packed_attention import packed_caches
from nalora_mlx.ops.attention import lean_attention
from nalora_mlx.ops.fast_math import vectorized, vectorized_models
from nalora_mlx.training import importance
from nalora_mlx.training.distributed import ALONE, Workers
from nalora_mlx.training.loss import ScoredLoss
from nalora_mlx.training.optimizers import apply_scaled

MAX_GRAPHS = 48  # compiled graphs that are kept, of as many shapes of a batch; each takes some 18 MB
PROBED = 256  # tokens, at most, on which selection misalignment is measured
SHOWN_CHANNELS = 32  # of a layer, whose importance a report tells one by one


class TrainingStep:
    """One iteration: forward, backward, and at the end of an accumulation window the scaled optimizer update.

    All mutable state is in `state`, one visible list that goes in and out of mx.compile. Forward and backward are
    compiled for every shape of a batch; the update, which knows no shapes, once.

    Args:
        model: an adapted (or unfrozen) model.
        optimizer: any mlx optimizer.
        parameters: the NA settings; with both mechanisms off the update is the optimizer's own.
        compiled: False runs the same step eagerly: for models that look at values on the way, and for debugging.
        forward: token ids [B, L] -> logits [B, L, V]; the model itself if None.
        grad_clip: largest global norm of an update's gradient; None clips nothing.
        workers: over whom losses, gradients and statistics are summed before anything is made of them.

    An update is not applied if a loss, the gradient or a new parameter is not finite: parameters, optimizer and
    importance stay as they were. `health` says of the window so far whether it is "finite", whether its "losses" are,
    and the global "norm" of its gradient.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: optim.Optimizer,
        parameters: NAParameters = PLAIN_LORA,
        compiled: bool = True,
        forward: Callable[[mx.array], mx.array] | None = None,
        grad_clip: float | None = None,
        workers: Workers = ALONE,
    ):
        self.model = model
        self.loss = ScoredLoss(model, forward)
        self.optimizer = optimizer
        self.parameters = parameters
        self.grad_clip = grad_clip
        self.workers = workers
        self.gated = {mlp.path: mlp for mlp in gated_mlps(model)} if parameters.active else {}
        self.dropouts = dropout_count(model)
        self.importance: dict[str, Any] = {
            "step": mx.array(0),
            "layers": {
                path: importance.init(
                    mlp.shape,
                    len(mlp.activation.regions),
                    self_gated=mlp.activation.selection is not None,
                )
                for path, mlp in self.gated.items()
            },
        }
        optimizer.init(model.trainable_parameters())
        self.health = {"finite": mx.array(True), "losses": mx.array(True), "norm": mx.array(0.0)}
        self.state = [model.state, optimizer.state, self.importance, mx.random.state, self.health]
        self._loss_and_gradients = nn.value_and_grad(model, self._loss)
        self.compiled = compiled
        self.graphs: OrderedDict[Any, Callable[..., Any]] = OrderedDict()  # by shape, the last used ones last
        self._finished = partial(mx.compile, inputs=self.state, outputs=self.state)(self._finish)

    def __call__(
        self,
        batch: Batch,
        window_tokens: int,
        carry: Any,
        update: bool,
        seed: tuple[int, int] = (0, 0),
    ) -> tuple[mx.array, Any]:
        """Run one iteration.

        Args:
            batch: rows, of which this worker has its share.
            window_tokens: supervised tokens in the whole accumulation window; every token weighs 1 / this.
            carry: what the previous iteration of the window returned, None at its start.
            update: whether this iteration ends the window.
            seed: (run seed, iteration), from which dropout draws.

        Returns:
            The summed loss of the batch, of all workers, lazy, and the carry for the next iteration of the window.
        """
        # Each worker draws its own dropout.
        entropy = (*seed, self.workers.rank) if self.workers.rank else seed
        word = int(np.random.SeedSequence(entropy).generate_state(1)[0])
        segments = None if batch.segment_ids is None else mx.array(batch.segment_ids)
        scored = [mx.array(a) for a in batch.scored()]
        arrays = [mx.array(batch.inputs), *scored, segments, mx.array(batch.token_mask)]
        weight, key = mx.array(1 / max(window_tokens, 1)), mx.random.key(word)
        shape = (batch.inputs.shape, scored[0].shape, segments is None, carry is None)
        backward = self._graph(shape) if self.compiled else self._backward
        total, gradients, seen = backward(arrays, weight, key, carry)
        finish = self._finished if self.compiled else self._finish
        return finish(total, gradients, seen, carry is None, update)

    def _graph(self, shape: Any) -> Callable[..., Any]:
        """The backward compiled for a shape; the one that was used longest ago is dropped when there are too many."""
        if shape not in self.graphs:
            # A function of its own for each: mx.compile forgets what it has made when the function is gone.
            def backward(*arguments: Any) -> tuple[mx.array, Any, Any]:
                return self._backward(*arguments)

            state = [self.model.state, self.importance, mx.random.state]
            self.graphs[shape] = partial(mx.compile, inputs=state, outputs=state)(backward)
            if len(self.graphs) > MAX_GRAPHS:
                self.graphs.popitem(last=False)
        self.graphs.move_to_end(shape)
        return self.graphs[shape]

    def _loss(self, arrays: list[Any], weight: mx.array, this: ForwardPass) -> tuple[mx.array, Any]:
        inputs, rows, targets, weights, segments, real = arrays
        # Weighed before the gradient, which in a half type might otherwise leave its range.
        total = self.loss(inputs, rows, targets, weights * weight, segments)
        # A copy, because a checkpointed layer writes again while the backward recomputes it. The token count is one
        # for all layers: the same sum once per layer would be outputs that are equal, on which mx.compile fails.
        return total, (total / weight, {"layers": dict(this.seen), "tokens": mx.sum(real)})

    def _backward(self, arrays, weight, key, carry):
        """Loss of a batch, and gradient and statistics of the window so far."""
        routes = {}
        if self.parameters.route:
            # The mask as it stood after the previous update: the backward comes before this step's statistics.
            routes = {path: state["mask"] for path, state in self.importance["layers"].items()}
        this = ForwardPass(
            weights=arrays[-1] if self.gated else None,
            routes=routes,
            dropout_keys=mx.random.split(key, self.dropouts) if self.dropouts else None,
        )
        faster = vectorized_models() if self.compiled else nullcontext()
        with forward_pass(this), vectorized(), faster, lean_attention():
            (_, (total, seen)), gradients = self._loss_and_gradients(arrays, weight, this)
        if carry is not None:
            gradients = tree_map(mx.add, gradients, carry[0])
            seen = _add_seen(seen, carry[1])
        return total, gradients, seen

    def _finish(self, total, gradients, seen, first, update):
        """Take note of what is not finite, and end the window if it is to end."""
        if update:
            total, gradients, seen = self.workers.sum((total, gradients, seen))
            norm = _global_norm(gradients)
        else:  # of this worker's gradient so far; the sum is finite only if all of them are
            total, norm = self.workers.sum((total, _global_norm(gradients)))
        losses = mx.isfinite(total)
        health = self.health
        health["losses"] = losses if first else losses & health["losses"]
        health["norm"] = norm
        health["finite"] = health["losses"] & mx.isfinite(health["norm"])
        if not update:
            return total, (gradients, seen)
        changing = [self.model.trainable_parameters(), self.optimizer.state, self.importance]
        before = tree_map(lambda array: array, changing)  # new containers, the same arrays
        self._update(gradients, seen)
        changing[0] = self.model.trainable_parameters()
        health["finite"] = health["finite"] & mx.isfinite(_global_norm(changing[0]))
        _undo_unless(health["finite"], changing, before)
        self.model.update(changing[0])
        return total, None

    def _update(self, gradients: Any, seen: dict[str, Any]) -> None:
        if self.grad_clip is not None:
            factor = self.grad_clip / mx.maximum(self.health["norm"], self.grad_clip)
            gradients = tree_map(lambda g: (g * factor).astype(g.dtype), gradients)
        scales = {}
        if self.gated:
            self.importance["step"] = self.importance["step"] + 1
            layers = self.importance["layers"]
            for path, mlp in self.gated.items():
                if path not in seen["layers"]:
                    continue  # an expert of its own module, to which no token went
                layer = {"tokens": seen["tokens"], **seen["layers"][path]}
                state = importance.observe(layers[path], layer, self.parameters.beta)
                layers[path] = importance.refresh(state, self.importance["step"], self.parameters)
                q = importance.multiplier(layers[path], self.parameters)
                scales.update(mlp.step_factors(q))
        new = apply_scaled(self.optimizer, gradients, self.model.trainable_parameters(), scales)
        self.model.update(new)

    def measure(self, batch: Batch) -> None:
        """Measure selection misalignment, on the first tokens of this worker's share of a batch.

        A short forward of its own, not compiled: it costs a small part of an iteration, keeps no graph, and leaves
        the iterations that report as all others are.
        """
        layers = self.importance["layers"]
        measured = [path for path, state in layers.items() if "misalignment" in state]
        if not measured:
            return
        part = (slice(0, 1), slice(0, PROBED))
        arguments = {}
        if batch.segment_ids is not None:
            arguments["cache"] = packed_caches(self.model, mx.array(batch.segment_ids[part]))
        this = ForwardPass(weights=mx.array(batch.token_mask[part]), diagnose=True)
        training = self.model.training
        self.model.eval()  # no dropout
        with forward_pass(this):  # lazy: what is not measured, as the logits, is never computed
            self.loss.forward(mx.array(batch.inputs[part]), **arguments)
        self.model.train(training)
        nothing = mx.zeros(2)  # of an expert to which no token went
        found = {path: this.seen.get(path, {}).get("misalignment", nothing) for path in measured}
        for path, sums in self.workers.sum(found).items():
            good = mx.all(mx.isfinite(sums))  # rows that give no finite loss give none here either
            new = mx.where(good, sums, layers[path]["misalignment"])
            layers[path] = {**layers[path], "misalignment": new}
        mx.eval(layers)

    def describe(self) -> dict[str, dict[str, Any]]:
        """Per layer: what its channels' importance, mask, step scales and multipliers are; occupancy; misalignment.

        Of a quantity of the channels its mean and percentiles; of `channels` the importance of some, evenly spaced.
        """
        described = {}
        for path, state in self.importance["layers"].items():
            s = np.array(importance.importance(state, self.parameters.beta)).reshape(-1)
            some = np.arange(min(SHOWN_CHANNELS, s.size)) * s.size // min(SHOWN_CHANNELS, s.size)
            row: dict[str, Any] = {
                "mask": _spread(np.array(state["mask"])),
                "sparsity": importance.sparsity(state["mask"]).item(),
                "effective": importance.effective_share(state["mask"]).item(),
                "multiplier": _spread(np.array(importance.multiplier(state, self.parameters))),
                "importance": _spread(s),
                "channels": [float(f"{value:.4g}") for value in s[some].tolist()],
            }
            scale = importance.step_scale(state, self.parameters)
            if scale is not None:
                row["step_scale"] = _spread(np.array(scale))
            if "above_boundary" in state:
                occupancy = np.array(importance.occupancy(state, self.parameters.beta))
                names = self.gated[path].activation.regions
                row["occupancy"] = dict(zip(names, occupancy.mean(axis=-1).tolist(), strict=True))
            if "misalignment" in state:
                row["misalignment"] = importance.misalignment(state).item()
            described[path] = row
        return described


def _global_norm(tree: Any) -> mx.array:
    """Euclidean norm of all entries of a tree, in float32."""
    squares = (mx.sum(mx.square(array.astype(mx.float32))) for _, array in tree_flatten(tree))
    return mx.sqrt(sum(squares, mx.array(0.0)))


def _undo_unless(good: mx.array, tree: Any, before: Any) -> None:
    """Put each array of a tree of dicts and lists back to what it was, unless `good`; in place."""
    for key in tree if isinstance(tree, dict) else range(len(tree)):
        new, old = tree[key], before[key]
        if isinstance(new, dict | list):
            _undo_unless(good, new, old)
        elif new is not old:
            tree[key] = mx.where(good, new, old)


def _add_seen(new: dict[str, Any], old: dict[str, Any]) -> dict[str, Any]:
    """Add what two micro-batches saw; a module may have run in one of them only."""
    layers = dict(old["layers"])
    for path, sums in new["layers"].items():
        layers[path] = tree_map(mx.add, sums, layers[path]) if path in layers else sums
    return {"layers": layers, "tokens": new["tokens"] + old["tokens"]}


def _spread(values: np.ndarray) -> dict[str, float]:
    low, median, high = np.quantile(values, (0.1, 0.5, 0.9)).tolist()
    return {"mean": float(values.mean()), "p10": low, "p50": median, "p90": high}
