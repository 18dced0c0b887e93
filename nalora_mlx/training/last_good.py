"""The last weights with a finite loss, to which a run returns when an update breaks them.

New weights can be finite and useless: with too high a learning rate, activations overflow, and every later loss is
NaN. Only a loss that is computed from them shows it.

1. A finite loss of a batch shows that the weights it was computed from are good. They are kept until later ones are
   shown to be good: references to arrays, no copies.
2. If a batch's loss is NaN or infinite, the weights or the rows of the batch are at fault. The weights are if earlier
   ones give a finite loss of this batch: those before the last update, or those of the last save, since an update may
   break the weights for some rows only.
3. Weights are saved only after a finite loss. If there was none since the last update, the last good batch decides.

Only the weights are kept. Optimizer state and importance have come from good weights, so they stay: what remains is
an update with a learning rate of 0.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from nalora_mlx.adapters.attach import adapt_result
from nalora_mlx.data.batches import Batch
from nalora_mlx.training.evaluation import evaluate
from nalora_mlx.training.step import TrainingStep


class LastGoodWeights:
    """The last weights of a run with a finite loss.

    Args:
        step: the run's training step.
        more: returns what the loss reads besides each of some batches; None for nothing.

    Attributes:
        shown: whether the current weights are known to be good.
        batch: the last batch with a finite loss.
        arrays: the weights to return to.
        saved: the weights of the last save, or of the start.
    """

    def __init__(self, step: TrainingStep, more: Callable[[Sequence[Batch]], Any] | None = None):
        self.step, self.more = step, more
        self.shown = True
        self.batch: Batch | None = None
        self.arrays: list[mx.array] | None = None
        self.places = trainable_places(step.model) if keeps_weights(step.model) else None
        self.saved = self.current()

    def current(self) -> list[mx.array] | None:
        """Return the current trainable arrays; None if the run does not keep them."""
        return None if self.places is None else [module[name] for module, name in self.places]

    def show(self, arrays: list[mx.array] | None, batch: Batch) -> None:
        """Record that these weights, as `current` returned them, gave a finite loss of a batch."""
        self.arrays, self.batch, self.shown = arrays, batch, True

    def save(self) -> None:
        """Record that the current weights are saved."""
        self.saved = self.current()

    def give_finite_loss(self) -> bool:
        """Compute the loss of the last good batch from the current weights; return whether it is finite."""
        self.shown = self.batch is None or self._is_finite(self.batch)
        return self.shown

    def are_at_fault(self, batch: Batch) -> bool:
        """Return whether the current weights, and not the rows, are why a batch's loss is NaN or infinite.

        If they are, `restore` returns to weights that are not.
        """
        after, unknown = self.current(), not self.shown
        if unknown and not self.give_finite_loss():
            return True
        for earlier in (self.arrays if unknown else None, self.saved):
            if earlier is None or after is None:
                continue
            self._assign(earlier)
            finite = self._is_finite(batch)
            self._assign(after)
            if finite:
                self.arrays, self.shown = earlier, False
                return True
        self.shown = True
        return False

    def restore(self) -> bool:
        """Return to the last good weights; return False if the run does not keep them."""
        if self.arrays is None:
            return False
        self._assign(self.arrays)
        self.shown = True
        return True

    def _assign(self, arrays: list[mx.array]) -> None:
        for (module, name), array in zip(self.places or (), arrays, strict=True):
            module[name] = array

    def _is_finite(self, batch: Batch) -> bool:
        step, more = self.step, self.more and self.more([batch])
        return math.isfinite(evaluate(step.model, [batch], None, step.loss, step.workers, None, more).loss)


def keeps_weights(model: nn.Module) -> bool:
    """Return whether a run keeps the last good weights in memory: those of adapters, which are small."""
    return adapt_result(model) is not None


def trainable_places(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Return the modules and names of a model's trainable arrays."""
    return [
        (module, name)
        for module in model.modules()
        for name, value in module.items()
        if isinstance(value, mx.array) and nn.Module.trainable_parameter_filter(module, name, value)
    ]
