"""A limit on how far one update moves the selection weights of the gates.

The selection weight rho(z) of a self-gated activation phi(z) = z rho(z) says how far a channel is open. Unlike an
optimizer's step, its change has a natural unit. An update that changes it by more than the limit is shortened:

1. z and z': gate pre-activations on some tokens of the batch, before and after the update of the whole model
2. Change of the selection:  S = mean of |rho(z') - rho(z)| over tokens and channels of all gated MLPs
3. Shortened update:         theta + min(1, limit / S) (theta' - theta), for all trainable parameters theta

All parameters are shortened alike, so the update keeps its direction. The optimizer's state advances as usual.
"""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import numpy as np

from nalora_mlx.adapters.forward_pass import ForwardPass, Gate, forward_pass
from nalora_mlx.adapters.gated_mlps import GatedMLP
from nalora_mlx.data.batches import Batch
from nalora_mlx.training.distributed import Workers
from nalora_mlx.training.loss import Arrays, Loss, first_row_arrays
from nalora_mlx.training.stacks import StackedParameters

PROBE_TOKENS = 64  # of a batch, on which the selection is measured
MEASURED_FIRST = 20  # iterations
MEASURED_EVERY = 8  # iterations after these


class SelectionLimit:
    """Measures how far an update moves the selection weights, and shortens it if that is too far.

    Args:
        limit: largest mean change of the selection weights per update.
        loss: the model's loss.
        weights: the model's trainable parameters.
        gated: the gated MLPs by path.
        workers: data-parallel workers, over whom the change is averaged.
    """

    def __init__(
        self,
        limit: float,
        loss: Loss,
        weights: StackedParameters,
        gated: Mapping[str, GatedMLP],
        workers: Workers,
    ):
        self.limit, self.loss, self.weights, self.workers = limit, loss, weights, workers
        self.gated = {path: mlp for path, mlp in gated.items() if has_selection(mlp)}

    def shorten(self, new: Mapping[str, mx.array], change: mx.array) -> dict[str, mx.array]:
        """Return the parameters after an update of at most the limit.

        Args:
            new: the stacks of the parameters after the whole update.
            change: S of the whole update.
        """
        old, factor = self.weights.arrays, self.limit / mx.maximum(change, self.limit)
        return {
            name: mx.where(factor < 1, old[name] + factor * (array - old[name]), array)
            for name, array in new.items()
        }

    def change(self, new: Mapping[str, mx.array], probe: Arrays) -> mx.array:
        """Return the change S of the selection, a float32 scalar.

        Args:
            new: the stacks of the parameters after the whole update.
            probe: some tokens of the batch, see `probe_arrays`.
        """
        before, after = (self._gates(arrays, probe) for arrays in (self.weights.arrays, new))
        changes = [
            self._change(mlp, before[path], after[path], probe["token_mask"])
            for path, mlp in self.gated.items()
            if path in before and before[path].z.shape[0] == probe["token_mask"].size
        ]
        zero = mx.array(0.0)
        total, count = self.workers.sum(tuple(sum((one[i] for one in changes), zero) for i in (0, 1)))
        return total / mx.maximum(count, 1)

    def _gates(self, arrays: Mapping[str, mx.array], probe: Arrays) -> dict[str, Gate]:
        """Return the gates on the probe's tokens with some parameters, which it leaves in the model."""
        self.weights.install_cast(dict(arrays))
        gates: dict[str, Gate] = {}
        context = ForwardPass(token_mask=None, scaled=self.weights.scaled, gates=gates)
        model = self.loss.model
        training = model.training
        model.eval()  # no dropout
        try:
            with forward_pass(context), self.loss.installed(probe):  # lazy: the logits are never computed
                self.loss.forward(probe["inputs"], **self.loss.model_arguments(probe))
        finally:
            model.train(training)
        return gates

    def _change(self, mlp: GatedMLP, old: Gate, new: Gate, token_mask: mx.array) -> tuple[mx.array, mx.array]:
        """Return the sum of |rho(z') - rho(z)| over tokens and experts of the mean over channels, and their number."""
        selection = mlp.activation.selection
        assert selection is not None
        change = mx.mean(mx.abs(selection(new.z) - selection(old.z)), axis=-1)  # [N] or [N, k]
        counted = token_mask.reshape(-1) > 0
        if old.experts is not None:  # a token that goes to another expert now has no counterpart
            counted = counted[:, None] & (old.experts == new.experts)
        return mx.sum(mx.where(counted, change, 0)), mx.sum(counted)


def probe_arrays(batch: Batch) -> dict[str, Any]:
    """Return the last tokens of a batch's first row, which are mostly supervised, see `first_row_arrays`.

    They are a sequence of their own: without the tokens before them, a forward pass is short.
    """
    real = np.flatnonzero(batch.token_mask[0]) if len(batch.token_mask) else np.array([])
    start = max(0, int(real[-1]) + 1 - PROBE_TOKENS) if real.size else 0
    return first_row_arrays(batch, slice(start, start + PROBE_TOKENS))


def is_measured(iteration: int) -> bool:
    """Return whether the change of an update that ends at this iteration, counted from 1, is measured.

    At first all are, then every eighth, since the change of one update is like that of the next. Updates in between
    are shortened as the last one that was measured.
    """
    return iteration <= MEASURED_FIRST or iteration % MEASURED_EVERY == 0


def has_selection(mlp: GatedMLP) -> bool:
    """Return whether the selection weights of a gated MLP can be measured.

    That of a squared ReLU is the pre-activation itself, which has the unit of the model. Modules that see something
    else than all of the batch's tokens have no row for each token.
    """
    return mlp.activation.selection is not None and mlp.activation.name != "relu2" and mlp.sees_tokens
