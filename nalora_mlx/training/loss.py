"""The training and validation loss, from the cross entropy at supervised positions."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map

from nalora_mlx.data.batches import Batch
from nalora_mlx.data.media_batches import first_row
from nalora_mlx.models.output_head import find_output_head
from nalora_mlx.models.packed_rows import Branches, packed_caches
from nalora_mlx.models.recurrences import TrainingForms
from nalora_mlx.models.vision.model import is_vision_language_model, trains_towers
from nalora_mlx.ops.attention import causal_masks
from nalora_mlx.ops.cross_entropy import gather_rows, tiled_token_losses, token_losses, weighted_sum
from nalora_mlx.ops.rope import rope_positions
from nalora_mlx.training.compilation import compile_with_state

Arrays = Mapping[str, Any]  # of a batch, see `batch_arrays`


class Loss(ABC):
    """The loss of a model on a batch. Positions that are not supervised get no logits.

    Probes the model for its output head, and its recurrences for training forms. Make one per run, after adapters are
    attached, and share it. Compute it while `installed` is open, also for its gradient.

    Args:
        model: its trainable parameters decide whether the output head can run in tiles.
        forward: token ids [B, L] -> logits [B, L, V]; the model itself if None.

    Attributes:
        compiled: whether a step can be compiled.
        measures: names of what the loss reports besides its value; none in supervised training.
        evaluate: computes the same as a call, compiled and without a gradient; needs no `installed`.
    """

    measures: tuple[str, ...] = ()

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
        self.evaluate = self.compile(partial(self, with_gradient=False))

    @abstractmethod
    def __call__(
        self, arrays: Arrays, weights: mx.array | None = None, with_gradient: bool = True
    ) -> tuple[mx.array, mx.array | None]:
        """Return the weighted loss, a float32 scalar, and (sum, count) of each measure, [K, 2]; None without any.

        Args:
            arrays: of the batch, see `batch_arrays`.
            weights: of the terms of the loss; 1 for each if None. Applied before the gradient is taken, which may leave
                the range of a half-precision type otherwise.
            with_gradient: False skips the gradient that is otherwise computed along with the loss.
        """

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function of a batch's arrays that opens `installed`, compiled if a step can be."""

        def call(arrays: Arrays, *others: Any) -> Any:
            with self.installed(arrays):
                return function(arrays, *others)

        return compile_with_state(call, self.model.state) if self.compiled else call

    @contextmanager
    def installed(self, arrays: Arrays | None = None) -> Iterator[None]:
        """Make the model compute a batch as it is trained: recurrences in training forms, branches at their positions.

        Args:
            arrays: of the batch; None for a batch that is not packed.
        """
        arrays = arrays or {}
        with (
            self.training_forms.installed(arrays.get("segment_ids")),
            rope_positions(arrays.get("positions")),
            causal_masks() if "segment_ids" in arrays else nullcontext(),
        ):
            yield

    def model_arguments(self, arrays: Arrays) -> dict[str, Any]:
        """Return what the model takes besides the token ids: caches that keep packed rows apart, and images."""
        arguments: dict[str, Any] = {}
        if (segment_ids := arrays.get("segment_ids")) is not None:
            numbers = arrays.get("branches")
            branches = None if numbers is None else Branches(numbers, arrays["positions"])
            arguments["cache"] = packed_caches(self.model, segment_ids, branches)
        if (media := arrays.get("media")) is not None:
            arguments["media"] = media
        return arguments

    def token_losses(self, arrays: Arrays, with_gradient: bool = True) -> mx.array:
        """Return -log p(target) at each supervised position; [S], float32. Fillers may be NaN.

        Args:
            arrays: of the batch.
            with_gradient: False skips the gradient that is otherwise computed along with the losses.
        """
        return self.losses_of(self.states(arrays), arrays["targets"], with_gradient)

    def states(self, arrays: Arrays) -> mx.array:
        """Return what the output head reads at each supervised position, [S, D]; logits [S, V] without a head."""
        inputs, rows, weights = (arrays[name] for name in ("inputs", "rows", "weights"))
        arguments = self.model_arguments(arrays)
        if self.head is None:
            logits = self.forward(inputs, **arguments)  # [B, L, V]
            return logits.reshape(-1, logits.shape[-1])[rows]
        hidden = self.head.hidden(inputs, **arguments)  # [B, L, D]
        return gather_rows(hidden.reshape(-1, hidden.shape[-1]), rows, weights)

    def losses_of(self, states: mx.array, targets: mx.array, with_gradient: bool = True) -> mx.array:
        """Return -log p(target) of each of the rows that `states` returned; see `token_losses`."""
        if self.head is None:
            return token_losses(states, targets)
        if not self.has_tiles:
            return token_losses(self.head.logits(states), targets)
        return tiled_token_losses(self.head.logits_for, self.head.vocabulary, states, targets, with_gradient)

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


class SupervisedLoss(Loss):
    """The cross entropy summed over the supervised positions of a batch, times w_0."""

    def __call__(
        self, arrays: Arrays, weights: mx.array | None = None, with_gradient: bool = True
    ) -> tuple[mx.array, mx.array | None]:
        """Return the loss, and no measures; see `Loss`."""
        weight = 1.0 if weights is None else weights[0]
        return weighted_sum(self.token_losses(arrays, with_gradient), arrays["weights"] * weight), None


def batch_arrays(batch: Batch) -> dict[str, Any]:
    """Return a batch as arrays of MLX, by name; parts that it does not have are left out.

    inputs [B, L]; rows [S], the supervised positions in the flattened [B L]; targets [S]; weights [S], 0 for fillers;
    token_mask, segment_ids, branches, positions [B, L], and media, see `Batch`; of preference rows answer_of [S], and
    sft_weights [S], present, desirable [P], reference [n P], see `BatchAnswers`.
    """
    rows, targets, weights = batch.loss_positions()
    media, answers = batch.with_media().media, batch.answers
    arrays: dict[str, Any] = {"inputs": batch.inputs, "rows": rows, "targets": targets, "weights": weights}
    arrays |= {"token_mask": batch.token_mask, "segment_ids": batch.segment_ids, "media": media}
    arrays |= {"branches": batch.branches, "positions": batch.positions}
    if answers is not None:
        arrays["answer_of"] = np.where(weights > 0, answers.numbers.reshape(-1)[rows], -1)
        if answers.sft_mask is not None:
            arrays["sft_weights"] = answers.sft_mask.reshape(-1)[rows] * weights
        arrays |= {"present": answers.present, "desirable": answers.desirable}
        arrays["reference"] = answers.reference
    return {name: media_arrays(value) for name, value in arrays.items() if value is not None}


def first_row_arrays(batch: Batch, part: slice) -> dict[str, Any]:
    """Return a part of a batch's first row, which is long enough for a forward pass, as arrays by name.

    inputs, token_mask, segment_ids, branches, positions [1, L], and media. A row of a batch with images stays whole.
    """
    index = (slice(0, 1), part if batch.media is None else slice(None))
    names = "inputs", "token_mask", "segment_ids", "branches", "positions"
    arrays = {name: array[index] for name in names if (array := getattr(batch, name)) is not None}
    if batch.media is not None:
        arrays["media"] = first_row(batch.media)
    return {name: media_arrays(array) for name, array in arrays.items()}


def media_arrays(tree: Any) -> Any:
    """Return a tree, such as the media of a batch, with arrays of MLX."""
    return tree_map(lambda leaf: mx.array(leaf) if isinstance(leaf, np.ndarray) else leaf, tree)


def array_shapes(arrays: Arrays) -> tuple[Any, ...]:
    """Return the names and shapes of a batch's arrays, by which its graph is kept."""
    return tuple((name, array.shape) for name, array in tree_flatten(dict(arrays)))
