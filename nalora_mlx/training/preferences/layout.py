"""How the answers of preference rows are laid out in the sequences of a run."""

from collections.abc import Sequence

import mlx.core as mx

from nalora_mlx.core.config import TrainingConfig
from nalora_mlx.core.errors import InputError
from nalora_mlx.data.padding import padded_length, rounded_length
from nalora_mlx.data.preferences import JOINED, SEPARATE, SHARED, PreferenceExample, laid_out
from nalora_mlx.models.packed_rows import packing_error, sharing_error
from nalora_mlx.training.preferences.loss import PreferenceLoss

LEAST_SAVED = 0.05  # of the time
# Fitted to SmolLM2 (D = 576) on a CPU. Prompts and answers of P, A tokens take, relative to separate prompts:
# 32, 96: 1.00; 64, 64: 0.86; 256, 256: 1.04; 384, 128: 0.81; 256, 768: 1.35; 768, 256: 0.84 of the time.
ATTENTION_WIDTHS = 3


def choose_layout(
    loss: PreferenceLoss, examples: Sequence[PreferenceExample], config: TrainingConfig
) -> list[PreferenceExample]:
    """Return the rows of a run in the layout that takes the least time and is exact for its model.

    1. Both answers follow one prompt (SHARED), if that saves time (see `sequence_cost`) and the model computes the
       same.
    2. Otherwise each answer follows its own prompt: in a sequence of its own (SEPARATE), or with packing both in one
       sequence (JOINED).

    Rows that have a layout other than SEPARATE keep it.

    Raises:
        InputError: rows cannot be packed for this model.
    """
    if not examples or any(example.layout != SEPARATE for example in examples):
        return list(examples)
    hidden = loss.head.hidden if loss.head else loss.model
    shared = laid_out(examples, SHARED)
    if config.packing:
        joined = laid_out(examples, JOINED)
        mismatched = [row.mismatched for row in examples if row.mismatched is not None]
        length = padded_length([*joined, *mismatched])
        reason = packing_error(loss.model, hidden, length, loss.training_forms)
        if reason:
            raise InputError(f"packing would mix rows with this model: {reason}; leave --packing out")
        if len(examples[0].answers) < 2:
            return list(examples)
    width = hidden(mx.zeros((1, 1), mx.int32)).shape[-1]  # lazy: nothing is computed
    separate_cost = sum(
        sequence_cost(answer.inputs, width) for example in examples for answer in example.answers
    )
    shared_cost = sum(sequence_cost(example.inputs, width) for example in shared)
    if shared_cost <= (1 - LEAST_SAVED) * separate_cost and not sharing_error(
        loss.model, hidden, padded_length(shared), loss.training_forms
    ):
        return shared
    return joined if config.packing else list(examples)


def sequence_cost(inputs: int, width: int) -> float:
    """Return the time that a sequence of n inputs takes in a model of width D, in that of an input without attention.

    n + n^2 / (3 D), with n rounded up as padding does. The second term is attention, which both answers in one sequence
    make longer.
    """
    length = rounded_length(inputs)
    return length + length**2 / (ATTENTION_WIDTHS * width)


def in_layout_of(
    examples: Sequence[PreferenceExample], others: Sequence[PreferenceExample]
) -> list[PreferenceExample]:
    """Return rows in the layout of other rows."""
    return laid_out(examples, others[0].layout) if others else list(examples)
