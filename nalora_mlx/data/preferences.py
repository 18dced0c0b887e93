"""Tokenized preference rows: the answers of a row, and how they are laid out in the sequences of a batch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from nalora_mlx.data.tokenization import Example, Lane

# How the two answers of a pair are laid out.
SEPARATE = "separate"  # each in a sequence of its own, after the prompt
JOINED = "joined"  # one after the other in one sequence, each after the prompt and apart from the other
SHARED = "shared"  # both after one prompt, in one sequence
SHARED_WEIGHT = 2.0  # of the tokens that stand for both answers


@dataclass(frozen=True)
class PreferenceExample:
    """One tokenized preference row: a pair of answers, or one answer with a label.

    It stands for an `Example` where rows are sorted, padded and packed.

    Attributes:
        answers: chosen and rejected, each with its prompt, or a single one. Their loss masks mark the answers.
        desirable: label of a single answer.
        mismatched: the prompt with the answer of another row, from which KTO estimates a KL divergence.
        sft_mask: bool, the tokens of the first answer that ORPO also trains on as supervised training does.
        layout: SEPARATE, JOINED or SHARED.
        reference: log-probability of each answer, and of the mismatched one, under the reference; none if the loss
            has no reference, or if it is computed in each iteration.
    """

    answers: tuple[Example, ...]
    desirable: bool = True
    mismatched: Example | None = None
    sft_mask: np.ndarray | None = None
    layout: str = SEPARATE
    reference: tuple[float, ...] = ()
    images: tuple[()] = ()
    media: None = None

    @property
    def source(self) -> str:
        """Where the row comes from, as file:line."""
        return self.answers[0].source

    @cached_property
    def tokens(self) -> np.ndarray:
        """The token ids of all answers, one after the other; int32."""
        extra = (self.mismatched,) if self.mismatched is not None else ()
        return np.concatenate([answer.tokens for answer in (*self.answers, *extra)])

    @cached_property
    def loss_mask(self) -> np.ndarray:
        """Bool, true for the tokens that the loss reads; as long as `tokens`. Holds the label, too."""
        masks = [sequence.loss_mask for sequence in self.sequences.values()]
        if self.mismatched is not None:
            masks.append(self.mismatched.loss_mask if self.desirable else ~self.mismatched.loss_mask)
        return np.concatenate(masks)

    @property
    def sequences(self) -> dict[str, Example]:
        """Each answer after its prompt, with all tokens that the loss reads, by what the row says about it."""
        if len(self.answers) < 2:
            return {f"label {str(self.desirable).lower()}": self.answers[0]}
        chosen, rejected = self.answers
        if self.sft_mask is not None:
            chosen = replace(chosen, loss_mask=chosen.loss_mask | self.sft_mask)
        return {"chosen": chosen, "rejected": rejected}

    @property
    def inputs(self) -> int:
        """Number of tokens in the longest sequence of the row."""
        return max(len(lane.inputs) for lane in self.lanes)

    @property
    def supervised_tokens(self) -> int:
        """Number of targets that count in the loss."""
        return sum(int(lane.loss_mask.sum()) for lane in self.lanes)

    @property
    def sft_tokens(self) -> int:
        """Number of targets that ORPO trains on as supervised training does."""
        return 0 if self.sft_mask is None else int(self.sft_mask[1:].sum())

    @cached_property
    def shareable(self) -> int:
        """Number of inputs that both answers begin with, before the last token of the prompt.

        That token is not shared, because a different target follows it in each answer.
        """
        if len(self.answers) < 2:
            return 0
        chosen, rejected = (answer.tokens for answer in self.answers)
        first = min(int(answer.loss_mask.argmax()) for answer in self.answers)
        length = min(first, len(chosen), len(rejected))
        different = np.flatnonzero(chosen[:length] != rejected[:length])
        return max((int(different[0]) if different.size else length) - 1, 0)

    @cached_property
    def lanes(self) -> tuple[Lane, ...]:
        """The sequences that the row adds to a batch, without padding."""
        if self.layout == SEPARATE or len(self.answers) < 2:
            return tuple(self._part(number, 0) for number in range(len(self.answers)))
        shared = self.shareable if self.layout == SHARED else 0
        parts = [self._part(0, 0), self._part(1, shared)]
        if self.layout == JOINED:
            sizes = [len(part.inputs) for part in parts]
            return (joined_lane(parts)._replace(segments=np.repeat([1, 2], sizes).astype(np.int32)),)
        lane = branched_lane(parts, shared)
        token_weights = np.ones(len(lane.inputs), np.float32)
        token_weights[:shared] = SHARED_WEIGHT
        return (lane._replace(token_weights=token_weights),)

    def _part(self, number: int, start: int) -> Lane:
        """Return an answer with its prompt from input `start` on."""
        answer = self.answers[number]
        in_answer = answer.loss_mask[start + 1 :]
        sft = np.zeros_like(in_answer)
        if self.sft_mask is not None and not number:
            sft = self.sft_mask[start + 1 :]
        return Lane(
            answer.tokens[start:-1],
            answer.tokens[start + 1 :],
            in_answer | sft,
            np.where(in_answer, number, -1).astype(np.int32),
            sft,
        )


TokenizedRow = Example | PreferenceExample


def joined_lane(parts: Sequence[Lane]) -> Lane:
    """Return sequences one after the other, as one."""
    inputs, targets, loss_mask = (np.concatenate([part[i] for part in parts]) for i in range(3))
    answers, sft_mask = (
        None if parts[0][i] is None else np.concatenate([part[i] for part in parts]) for i in (3, 4)
    )
    return Lane(inputs, targets, loss_mask, answers, sft_mask)


def branched_lane(parts: Sequence[Lane], shared: int) -> Lane:
    """Return texts that begin with the same inputs as one sequence, in which these stand once.

    Args:
        parts: the first text, and what follows the shared inputs in each of the others.
        shared: number of shared inputs.
    """
    sizes = [shared, len(parts[0].inputs) - shared, *(len(part.inputs) for part in parts[1:])]
    positions = [np.arange(shared), *(shared + np.arange(size) for size in sizes[1:])]
    return joined_lane(parts)._replace(
        segments=np.ones(sum(sizes), np.int32),
        branches=np.repeat(np.arange(len(sizes)), sizes).astype(np.int32),
        positions=np.concatenate(positions).astype(np.int32),
    )


def separate_sequences(examples: Sequence[TokenizedRow]) -> list[Example]:
    """Return the sequences that rows become, with each answer of a preference row after its own prompt."""
    return [
        sequence
        for example in examples
        for sequence in ((example,) if isinstance(example, Example) else example.sequences.values())
    ]


def laid_out(examples: Sequence[PreferenceExample], layout: str) -> list[PreferenceExample]:
    """Return rows in another layout."""
    return [replace(example, layout=layout) for example in examples]
