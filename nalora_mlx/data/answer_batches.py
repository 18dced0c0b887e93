"""The answers of a batch of preference rows, next to the arrays that every batch has."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nalora_mlx.data.preferences import PreferenceExample


@dataclass(frozen=True)
class BatchAnswers:
    """The answers of a worker's preference rows: n of each row, in the order of the rows, then fillers.

    Attributes:
        rows: indices into the split's examples.
        numbers: int32 [B, L], the number of the answer that a target belongs to; -1 for none.
        present: float32 [P], 1 for a row and 0 for a filler.
        desirable: float32 [P], the labels of rows with one answer.
        reference: float32 [n P], log-probability of each answer under the reference; None if not computed before.
        sft_mask: float32 [B, L], where ORPO trains on the target as supervised training does; None without.
        sft_tokens: number of these targets in the whole batch.
        mismatched: the batch of prompts with answers of other rows, for KTO; None without. Its rows are indices into
            `rows`.
    """

    rows: tuple[int, ...]
    numbers: np.ndarray
    present: np.ndarray
    desirable: np.ndarray
    reference: np.ndarray | None = None
    sft_mask: np.ndarray | None = None
    sft_tokens: int = 0
    mismatched: Any = None


def are_preferences(examples: Sequence[Any]) -> bool:
    """Return whether tokenized rows are preference rows."""
    return bool(examples) and isinstance(examples[0], PreferenceExample)


def collate_answers(
    examples: Sequence[PreferenceExample],
    packs: Sequence[Sequence[int]],
    rows: Sequence[int],
    shape: tuple[int, int],
    mismatched: Any,
) -> BatchAnswers:
    """Return the answers of a worker's rows.

    Args:
        examples: all rows.
        packs: for each sequence of this worker (or two sequences), the rows it holds.
        rows: of the whole batch.
        shape: [B, L] of the batch.
        mismatched: its batch of mismatched answers.
    """
    own = [examples[row] for pack in packs for row in pack]
    each = len(examples[rows[0]].answers)
    # Packs hold any number of rows, and each number of answers needs a graph.
    packed = any(len(pack) > 1 for pack in packs)
    size = max(1, 1 << (len(own) - 1).bit_length() if packed else len(own))
    numbers, sft_mask = np.full(shape, -1, np.int32), np.zeros(shape, np.float32)
    sequence = first = 0
    for pack in packs:
        starts = [0] * len(examples[pack[0]].lanes)
        for row in pack:
            for i, lane in enumerate(examples[row].lanes):
                at = (sequence + i, slice(starts[i], starts[i] + len(lane.inputs)))
                assert lane.answers is not None
                numbers[at] = np.where(lane.answers < 0, -1, lane.answers + first)
                sft_mask[at] = lane.sft_mask
                starts[i] = at[1].stop
            first += each
        sequence += len(starts)

    def padded(values: Sequence[Any], count: int) -> np.ndarray:
        return np.array([*values, *[0.0] * (count - len(values))], np.float32)

    known = bool(examples[rows[0]].reference)  # also for a worker without rows
    references = [value for example in own for value in example.reference[:each]]
    return BatchAnswers(
        tuple(row for pack in packs for row in pack),
        numbers,
        padded([1.0] * len(own), size),
        padded([float(example.desirable) for example in own], size),
        padded(references, each * size) if known else None,
        sft_mask if any(example.sft_mask is not None for example in own) else None,
        sum(examples[row].sft_tokens for row in rows),
        mismatched,
    )
