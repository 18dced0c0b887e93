"""The training and validation loss: cross entropy at supervised positions."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from nalora_mlx.models.output_head import find_output_head
from nalora_mlx.models.packed_rows import packed_caches
from nalora_mlx.models.recurrences import TrainingForms
from nalora_mlx.models.vision.model import is_vision_language_model, trains_towers
from nalora_mlx.ops.cross_entropy import cross_entropy_sum, gather_rows, tiled_cross_entropy_sum
from nalora_mlx.training.compilation import compile_with_state


class SupervisedLoss:
    """Summed cross entropy of a model at the supervised positions of a batch; other positions get no logits.

    Probes the model for its output head, and its recurrences for training forms. Make one per run, after adapters are
    attached, and share it. Compute it while `training_forms.installed` is open, also for its gradient.

    Args:
        model: its trainable parameters decide whether the output head can run in tiles.
        forward: token ids [B, L] -> logits [B, L, V]; the model itself if None.
    """

    def __init__(self, model: nn.Module, forward: Callable[[mx.array], mx.array] | None = None):
        self.model = model
        self.forward = forward or model
        self.head = find_output_head(model, forward)
        self.training_forms = TrainingForms(model, forward)
        inside = {id(m) for layer in model.layers for _, m in layer.named_modules()}
        # What precedes the language model has no part in the head.
        language_model = model.language_model if is_vision_language_model(model) else model
        self.head_is_frozen = not any(
            isinstance(leaf, mx.array) and name not in module._no_grad and not name.startswith("_")
            for _, module in language_model.named_modules()
            if id(module) not in inside
            for name, leaf in module.items()
        )
        self.compiled = not trains_towers(model)  # towers look at the values of images
        evaluate: Callable[..., mx.array] = partial(self.__call__, with_gradient=False)
        self.evaluate = compile_with_state(evaluate, model.state) if self.compiled else evaluate

    def __call__(
        self,
        inputs: mx.array,
        rows: mx.array,
        targets: mx.array,
        weights: mx.array,
        segment_ids: mx.array | None = None,
        media: Mapping[str, Any] | None = None,
        with_gradient: bool = True,
    ) -> mx.array:
        """Return sum_s weights_s * cross entropy_s, a float32 scalar.

        `evaluate` computes the same, compiled and without a gradient.

        Args:
            inputs: token ids; [B, L].
            rows: index of each supervised position in the flattened [B L]; [S].
            targets: token id to predict at each of them; [S].
            weights: weight of each of them, 0 for fillers; [S].
            segment_ids: which packed row each input belongs to; [B, L], None if not packed.
            media: what images add to the inputs, see `data.media_batches.collate_media`.
            with_gradient: False skips the gradient that is otherwise computed along with the loss.
        """
        arguments: dict[str, Any] = {}
        if segment_ids is not None:
            arguments["cache"] = packed_caches(self.model, segment_ids)
        if media is not None:
            arguments["media"] = media
        if self.head is None:
            logits = self.forward(inputs, **arguments)  # [B, L, V]
            return cross_entropy_sum(logits.reshape(-1, logits.shape[-1])[rows], targets, weights)
        hidden = self.head.hidden(inputs, **arguments)  # [B, L, D]
        hidden = gather_rows(hidden.reshape(-1, hidden.shape[-1]), rows, weights)  # [S, D]
        if not self.head_is_frozen or self.head.projection is None:
            return cross_entropy_sum(self.head.logits(hidden), targets, weights)
        return tiled_cross_entropy_sum(
            self.head.logits_for, self.head.vocabulary, hidden, targets, weights, with_gradient
        )

    @property
    def has_tiles(self) -> bool:
        """Whether the output head runs in tiles of logits."""
        return self.head is not None and self.head_is_frozen and self.head.projection is not None

    def notices(self) -> list[str]:
        """Return why the logits of a batch, or recurrences, take more time or memory than they could."""
        logits = self._logits_notice()
        return ([logits] if logits else []) + self.training_forms.notices

    def _logits_notice(self) -> str | None:
        if self.head is None:
            reason = (
                "the model's output head was not found, so logits are computed for every token of a batch"
            )
        elif not self.head_is_frozen:
            reason = "the model's output head is trained, so all logits of a batch are computed at once"
        elif self.head.projection is None:
            reason = (
                "the model's output head cannot run in tiles, so all logits of a batch are computed at once"
            )
        else:
            return None
        return f"{reason}; if memory runs short, lower --batch-size"
