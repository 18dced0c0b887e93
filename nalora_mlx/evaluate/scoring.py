"""Log-probabilities of given texts under a model, and the divergence of two models on them.

Continuations of one prompt, such as the choices of a question, are computed after a single copy of the prompt if the
model allows it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from nalora_mlx.data.batches import Batch, collate, row_shapes
from nalora_mlx.data.padding import padded_length, rounded_length
from nalora_mlx.data.preferences import branched_lane
from nalora_mlx.data.tokenization import Example, Lane
from nalora_mlx.models.packed_rows import sharing_error
from nalora_mlx.ops.attention import lean_attention
from nalora_mlx.ops.cross_entropy import LogitsFunction, tiled_argmax
from nalora_mlx.ops.device_sizes import device_kind
from nalora_mlx.ops.fast_math import vectorized, vectorized_models
from nalora_mlx.ops.kl_divergence import tiled_kl_divergence
from nalora_mlx.training.device_memory import trim_cache
from nalora_mlx.training.loss import Arrays, SupervisedLoss, batch_arrays
from nalora_mlx.training.preferences.layout import LEAST_SAVED, sequence_cost

# Padded tokens in a batch. A CPU gains nothing from more; a GPU needs large batches.
BATCH_TOKENS = {"cpu": 1024, "metal": 8192, "cuda": 16384}

OnProgress = Callable[[int, int], None]  # takes the number of texts done, and of all


class Score(NamedTuple):
    """The score of a text.

    Attributes:
        log_probability: of its scored tokens together, in nats.
        tokens: number of scored tokens.
        greedy: whether each scored token is the most likely one; None if not asked for.
    """

    log_probability: float
    tokens: int
    greedy: bool | None = None


@dataclass(frozen=True)
class SharedTexts:
    """One or several texts in one sequence, after their common prompt.

    Stands for an `Example` where rows are sorted and padded.

    Attributes:
        texts: tokens, and a loss mask over the scored ones.
        numbers: of the texts, among all that are scored.
    """

    texts: tuple[Example, ...]
    numbers: tuple[int, ...]

    @property
    def media(self) -> Any:
        """Images of a single text."""
        return self.texts[0].media

    @property
    def inputs(self) -> int:
        """Number of tokens the model reads."""
        return len(self.lanes[0].inputs)

    @property
    def supervised_tokens(self) -> int:
        """Number of scored tokens."""
        return int(self.lanes[0].loss_mask.sum())

    @property
    def shared(self) -> int:
        """Number of inputs that all texts begin with, before the last token of the shortest prompt.

        That token is not shared, because a different target follows it in each text.
        """
        if len(self.texts) < 2:
            return 0
        first = self.texts[0].tokens
        length = min(int(text.loss_mask.argmax()) for text in self.texts)
        for text in self.texts[1:]:
            different = np.flatnonzero(first[:length] != text.tokens[:length])
            length = int(different[0]) if different.size else length
        return max(length - 1, 0)

    @cached_property
    def lanes(self) -> tuple[Lane, ...]:
        """The sequence, without padding. `answers` holds the index of the text that a scored target belongs to."""
        shared, parts = self.shared, []
        for i, text in enumerate(self.texts):
            start = shared if i else 0
            scored = text.loss_mask[start + 1 :]
            answers = np.where(scored, i, -1).astype(np.int32)
            parts.append(Lane(text.tokens[start:-1], text.tokens[start + 1 :], scored, answers))
        return (parts[0] if len(parts) == 1 else branched_lane(parts, shared),)


class Scorer:
    """Scores texts under one model.

    Probes the model for its output head. The model must be frozen and in evaluation mode; its arrays may change between
    calls, its modules may not.

    Args:
        model: any model of mlx-lm, or of mlx-vlm with its towers frozen.
        batch_size: sequences in a batch at most; None decides by the device.
    """

    def __init__(self, model: nn.Module, batch_size: int | None = None):
        self.loss = SupervisedLoss(model)
        self.batch_size = batch_size
        self._token_losses = self._compile(self._compute_losses)
        self._argmax = self._compile(self._compute_argmax)
        self._states = self._compile(self.loss.states)
        self._sharing_errors: dict[int, str | None] = {}  # by length of sequences

    def score(
        self,
        groups: Sequence[Sequence[Example]],
        greedy: bool = False,
        on_progress: OnProgress | None = None,
    ) -> list[list[Score]]:
        """Return the score of each text.

        Args:
            groups: texts; those of a group may have a common prompt.
            greedy: compute `Score.greedy`, too.
            on_progress: called after each batch.
        """
        texts = [text for group in groups for text in group]
        sums, counts = np.zeros(len(texts)), np.zeros(len(texts), np.int64)
        matches = np.ones(len(texts), bool)
        for batch, owners in self._batches(self._laid_out(groups), len(texts), on_progress):
            arrays = batch_arrays(batch)
            losses = self._token_losses(arrays)
            best = self._argmax(arrays) if greedy else None
            values = np.array(losses)[: len(owners)].astype(np.float64)
            np.add.at(sums, owners, -values)
            np.add.at(counts, owners, 1)
            if best is not None:
                missed = np.array(best)[: len(owners)] != batch.loss_positions()[1][: len(owners)]
                matches[owners[missed]] = False
            trim_cache()
        scores = iter(
            Score(float(total), int(count), bool(match) if greedy else None)
            for total, count, match in zip(sums, counts, matches, strict=True)
        )
        return [[next(scores) for _ in group] for group in groups]

    def divergences(
        self, other: "Scorer", texts: Sequence[Example], on_progress: OnProgress | None = None
    ) -> np.ndarray:
        """Return KL(p || q) in nats, summed over the scored tokens of each text; [N] float64.

        p are the next-token distributions of this model, q those of the other one.

        Args:
            other: of a model with the same vocabulary.
            texts: N texts.
            on_progress: called after each batch.
        """
        sums = np.zeros(len(texts))
        items = [SharedTexts((text,), (i,)) for i, text in enumerate(texts)]
        for batch, owners in self._batches(items, len(texts), on_progress):
            arrays = batch_arrays(batch)
            states = self._states(arrays), other._states(arrays)
            (p, p_states), (q, q_states) = (
                _logit_rows(scorer.loss, found) for scorer, found in zip((self, other), states, strict=True)
            )
            vocabulary = self.loss.head.vocabulary if self.loss.head else states[0].shape[-1]
            values = tiled_kl_divergence(p, vocabulary, p_states, q_states, q)
            np.add.at(sums, owners, np.array(values)[: len(owners)].astype(np.float64))
            trim_cache()
        return sums

    def _compile(self, function: Callable[[Arrays], mx.array]) -> Callable[[Arrays], mx.array]:
        """Return a function of a batch that computes it as a training step does, so that equal models give equal bits.

        Adapters and base layers must then use the same functions.
        """

        def compute(arrays: Arrays) -> mx.array:
            faster = vectorized_models() if self.loss.compiled else nullcontext()
            with faster, lean_attention():
                return function(arrays)

        compiled = self.loss.compile(compute)

        def call(arrays: Arrays) -> mx.array:
            with vectorized() if self.loss.compiled else nullcontext():
                return compiled(arrays)

        return call

    def _compute_losses(self, arrays: Arrays) -> mx.array:
        return self.loss.token_losses(arrays, with_gradient=False)

    def _compute_argmax(self, arrays: Arrays) -> mx.array:
        compute_logits, states = _logit_rows(self.loss, self.loss.states(arrays))
        vocabulary = self.loss.head.vocabulary if self.loss.head else states.shape[-1]
        return tiled_argmax(compute_logits, vocabulary, states)

    # --- batches ------------------------------------------------------------------------------------------------

    def _laid_out(self, groups: Sequence[Sequence[Example]]) -> list[SharedTexts]:
        """Return the sequences to compute: a group in one, if that saves time and this model computes the same.

        See `sequence_cost` for the time.
        """
        numbers = iter(range(sum(map(len, groups))))
        shared = [SharedTexts(tuple(group), tuple(next(numbers) for _ in group)) for group in groups if group]
        alone = [
            [
                replace(item, texts=(text,), numbers=(number,))
                for text, number in zip(item.texts, item.numbers, strict=True)
            ]
            for item in shared
        ]
        if all(len(texts) == 1 for texts in alone) or any(item.media for item in shared):
            return [item for items in alone for item in items]
        width = self._width()
        chosen = [
            item.shared > 0
            and sequence_cost(item.inputs, width)
            <= (1 - LEAST_SAVED) * sum(sequence_cost(one.inputs, width) for one in items)
            for item, items in zip(shared, alone, strict=True)
        ]
        longest = [item for item, choice in zip(shared, chosen, strict=True) if choice]
        if longest and self._sharing_error(padded_length(longest)):  # type: ignore[arg-type]
            chosen = [False] * len(chosen)
        return [
            one
            for item, items, choice in zip(shared, alone, chosen, strict=True)
            for one in ([item] if choice else items)
        ]

    def _width(self) -> int:
        """Return D, the width of the hidden states."""
        hidden = self.loss.head.hidden if self.loss.head else self.loss.model
        return int(hidden(mx.zeros((1, 1), mx.int32)).shape[-1])  # lazy: nothing is computed

    def _sharing_error(self, length: int) -> str | None:
        if length not in self._sharing_errors:
            hidden = self.loss.head.hidden if self.loss.head else self.loss.model
            self._sharing_errors[length] = sharing_error(
                self.loss.model, hidden, length, self.loss.training_forms
            )
        return self._sharing_errors[length]

    def _batches(
        self, items: Sequence[SharedTexts], count: int, on_progress: OnProgress | None
    ) -> Iterator[tuple[Batch, np.ndarray]]:
        """Yield batches of similar lengths, the longest first, each with the number of the text of each scored token.

        Scored tokens are in the order of `Batch.loss_positions`.
        """
        if not items:
            return
        examples: Any = items
        shapes = row_shapes(examples)
        order = sorted(range(len(items)), key=lambda i: (len(items[i].texts) > 1, -items[i].inputs))
        tokens, done = BATCH_TOKENS[device_kind()], 0
        while order:
            first = items[order[0]]
            size = max(1, tokens // rounded_length(first.inputs))
            size = min(size, self.batch_size or size)
            rows = [i for i in order[:size] if (len(items[i].texts) > 1) == (len(first.texts) > 1)]
            del order[: len(rows)]
            batch = collate(examples, rows, shapes=shapes)
            lanes = [(items[i], items[i].lanes[0]) for i in rows]
            owners = [np.array(item.numbers)[lane.answers[lane.loss_mask]] for item, lane in lanes]  # type: ignore[index]
            yield batch, np.concatenate(owners)
            done += sum(len(items[i].texts) for i in rows)
            if on_progress is not None:
                on_progress(done, count)


def _logit_rows(loss: SupervisedLoss, states: mx.array) -> tuple[LogitsFunction, mx.array]:
    """Return a function that computes logits of some vocabulary entries, and what it takes for the given states."""
    if loss.head is not None and loss.head.projection is not None:
        return loss.head.logits_for, states
    return lambda rows, entries: rows[:, entries], states if loss.head is None else loss.head.logits(states)
