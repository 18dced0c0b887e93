"""The compiled training step: forward and backward, and the scaled update at the end of an accumulation window."""

from collections.abc import Callable
from functools import partial

import mlx.core as mx
import mlx.nn as nn

from nalora_mlx.models.output_head import find_output_head
from nalora_mlx.models.packed_attention import packed_caches
from nalora_mlx.ops.cross_entropy import ROWS, cross_entropy_sum, gather_rows, tiled_cross_entropy_sum


class ScoredLoss:
    """Summed cross entropy of a model over the scored positions of a batch, with logits for no others.

    Args:
        model: the model; what of it is trainable says whether its head may be run in tiles.
        forward: token ids [B, L] -> logits [B, L, V]; the model itself if None.
    """

    def __init__(self, model: nn.Module, forward: Callable[[mx.array], mx.array] | None = None):
        self.model = model
        self.forward = forward or model
        self.head = find_output_head(model, forward)
        self.rows = ROWS
        inside = {id(m) for layer in model.layers for _, m in layer.named_modules()}
        self.head_is_frozen = not any(
            isinstance(leaf, mx.array) and name not in module._no_grad and not name.startswith("_")
            for _, module in model.named_modules()
            if id(module) not in inside
            for name, leaf in module.items()
        )
        self.evaluate: Callable[..., mx.array] = partial(mx.compile, inputs=model.state)(
            partial(self.__call__, with_gradient=False)
        )

    def __call__(
        self,
        inputs: mx.array,
        rows: mx.array,
        targets: mx.array,
        weights: mx.array,
        segments: mx.array | None = None,
        with_gradient: bool = True,
    ) -> mx.array:
        """Sum w * cross entropy; inputs [B, L], and per scored position [S]: its row in [B L], target, weight.

        `segments` [B, L] says which of the rows packed into a sequence an input belongs to. `evaluate` is the same,
        compiled, for where no gradient is asked for.
        """
        arguments = {} if segments is None else {"cache": packed_caches(self.model, segments)}
        if self.head is None:
            logits = self.forward(inputs, **arguments)  # [B, L, V]
            return cross_entropy_sum(logits.reshape(-1, logits.shape[-1])[rows], targets, weights)
        hidden = self.head.hidden(inputs, **arguments)  # [B, L, D]
        hidden = gather_rows(hidden.reshape(-1, hidden.shape[-1]), rows, weights)  # [S, D]
        if not self.head_is_frozen or self.head.projection is None:
            return cross_entropy_sum(self.head.logits(hidden), targets, weights)
        return tiled_cross_entropy_sum(
            self.head.logits_for, self.head.vocabulary, hidden, targets, weights, self.rows, with_gradient
        )
