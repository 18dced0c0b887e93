"""The compiled training step: forward, backward, and the scaled update at the end of an accumulation window."""

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map

from nalora_mlx import importance
from nalora_mlx.adapters import dropout_count, gated_mlps
from nalora_mlx.batches import Batch
from nalora_mlx.config import PLAIN_LORA, NAParameters
from nalora_mlx.forward import ForwardPass, forward_pass
from nalora_mlx.heads import find_head
from nalora_mlx.losses import CHUNK_BYTES, chunked_cross_entropy_sum, cross_entropy_sum
from nalora_mlx.optim import apply_scaled


class ScoredLoss:
    """Summed cross entropy of a model over the scored positions of a batch, with logits for no others.

    Args:
        model: the model; what of it is trainable says whether its head may be run in chunks.
        forward: token ids [B, L] -> logits [B, L, V]; the model itself if None.
    """

    def __init__(self, model: nn.Module, forward: Callable[[mx.array], mx.array] | None = None):
        self.forward = forward or model
        self.head = find_head(model, forward)
        inside = {id(m) for layer in model.layers for _, m in layer.named_modules()}
        self.head_is_frozen = not any(
            isinstance(leaf, mx.array) and name not in module._no_grad and not name.startswith("_")
            for _, module in model.named_modules()
            if id(module) not in inside
            for name, leaf in module.items()
        )

    def __call__(self, inputs: mx.array, rows: mx.array, targets: mx.array, weights: mx.array) -> mx.array:
        """Sum w * cross entropy; inputs [B, L], and per scored position [S]: its row in [B L], target, weight."""
        if self.head is None:
            logits = self.forward(inputs)  # [B, L, V]
            return cross_entropy_sum(logits.reshape(-1, logits.shape[-1])[rows], targets, weights)
        hidden = self.head.hidden(inputs)  # [B, L, D]
        hidden = hidden.reshape(-1, hidden.shape[-1])[rows]  # [S, D]
        if not self.head_is_frozen:
            return cross_entropy_sum(self.head.logits(hidden), targets, weights)
        chunk = max(64, CHUNK_BYTES // (4 * self.head.vocabulary))
        return chunked_cross_entropy_sum(self.head.logits, hidden, targets, weights, chunk)


class TrainingStep:
    """One iteration: forward, backward, and at the end of an accumulation window the scaled optimizer update.

    All mutable state is in `state`, one visible list that goes in and out of mx.compile.

    Args:
        model: an adapted (or unfrozen) model.
        optimizer: any mlx optimizer.
        parameters: the NA settings; with both mechanisms off the update is the optimizer's own.
        compiled: False runs the same step eagerly: for models that look at values on the way, and for debugging.
        forward: token ids [B, L] -> logits [B, L, V]; the model itself if None.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: optim.Optimizer,
        parameters: NAParameters = PLAIN_LORA,
        compiled: bool = True,
        forward: Callable[[mx.array], mx.array] | None = None,
    ):
        self.model = model
        self.loss = ScoredLoss(model, forward)
        self.optimizer = optimizer
        self.parameters = parameters
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
        self.state = [model.state, optimizer.state, self.importance, mx.random.state]
        self._loss_and_gradients = nn.value_and_grad(model, self._loss)
        run = partial(mx.compile, inputs=self.state, outputs=self.state)(self._run) if compiled else self._run
        self._step = run

    def __call__(
        self,
        batch: Batch,
        window_tokens: int,
        carry: Any,
        update: bool,
        seed: tuple[int, int] = (0, 0),
        diagnose: bool = False,
    ) -> tuple[mx.array, Any]:
        """Run one iteration.

        Args:
            batch: rows.
            window_tokens: supervised tokens in the whole accumulation window; every token weighs 1 / this.
            carry: what the previous iteration of the window returned, None at its start.
            update: whether this iteration ends the window.
            seed: (run seed, iteration), from which dropout draws.
            diagnose: whether to measure selection misalignment, in all iterations of a window or in none.

        Returns:
            The summed loss of the batch, lazy, and the carry for the next iteration of the window.
        """
        word = int(np.random.SeedSequence(seed).generate_state(1)[0])
        arrays = [mx.array(a) for a in (batch.inputs, *batch.scored(), batch.real)]
        return self._step(
            arrays, mx.array(1 / max(window_tokens, 1)), mx.random.key(word), carry, update, diagnose
        )

    def _loss(self, arrays: list[mx.array], weight: mx.array, this: ForwardPass) -> tuple[mx.array, Any]:
        inputs, rows, targets, weights, real = arrays
        # Weighed before the gradient, which in a half type might otherwise leave its range.
        total = self.loss(inputs, rows, targets, weights * weight)
        # A copy, because a checkpointed layer writes again while the backward recomputes it. The token count is one
        # for all layers: the same sum once per layer would be outputs that are equal, on which mx.compile fails.
        return total, (total / weight, {"layers": dict(this.seen), "tokens": mx.sum(real)})

    def _run(self, arrays, weight, key, carry, update, diagnose):
        routes = {}
        if self.parameters.route:
            # The mask as it stood after the previous update: the backward comes before this step's statistics.
            routes = {path: state["mask"] for path, state in self.importance["layers"].items()}
        this = ForwardPass(
            weights=arrays[-1] if self.gated else None,
            routes=routes,
            dropout_keys=mx.random.split(key, self.dropouts) if self.dropouts else None,
            diagnose=diagnose,
        )
        with forward_pass(this):
            (_, (total, seen)), gradients = self._loss_and_gradients(arrays, weight, this)
        if carry is not None:
            gradients = tree_map(mx.add, gradients, carry[0])
            seen = _add_seen(seen, carry[1])
        if not update:
            return total, (gradients, seen)
        self._update(gradients, seen)
        return total, None

    def _update(self, gradients: Any, seen: dict[str, Any]) -> None:
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

    def describe(self) -> dict[str, dict[str, Any]]:
        """Per layer: selection misalignment when last measured, mask and multiplier statistics, region occupancy."""
        described = {}
        for path, state in self.importance["layers"].items():
            q = np.array(importance.multiplier(state, self.parameters))
            row: dict[str, Any] = {
                "mask": _spread(np.array(state["mask"])),
                "multiplier": _spread(q),
                "importance": _spread(np.array(importance.importance(state, self.parameters.beta))),
            }
            if "beyond" in state:
                occupancy = np.array(importance.occupancy(state, self.parameters.beta))
                names = self.gated[path].activation.regions
                row["occupancy"] = dict(zip(names, occupancy.mean(axis=-1).tolist(), strict=True))
            if "misalignment" in state:
                row["misalignment"] = importance.misalignment(state).item()
            described[path] = row
        return described


def _add_seen(new: dict[str, Any], old: dict[str, Any]) -> dict[str, Any]:
    """Add what two micro-batches saw; a module may have run in one of them only."""
    layers = dict(old["layers"])
    for path, sums in new["layers"].items():
        layers[path] = tree_map(mx.add, sums, layers[path]) if path in layers else sums
    return {"layers": layers, "tokens": new["tokens"] + old["tokens"]}


def _spread(values: np.ndarray) -> dict[str, float]:
    low, median, high = np.quantile(values, (0.1, 0.5, 0.9)).tolist()
    return {"mean": float(values.mean()), "p10": low, "p50": median, "p90": high}
