"""How the answers of preference rows are laid out in the sequences of a run."""

from collections.abc import Sequence

from nalora_mlx.core.config import TrainingConfig
from nalora_mlx.core.errors import InputError
from nalora_mlx.data.padding import padded_length
from nalora_mlx.data.preferences import JOINED, SEPARATE, SHARED, PreferenceExample, laid_out, saving
from nalora_mlx.models.packed_rows import packing_error, sharing_error
from nalora_mlx.training.preferences.loss import PreferenceLoss

LEAST_SAVED = 0.1  # of the inputs; below that, masks of shared prompts cost more than they save


def choose_layout(
    loss: PreferenceLoss, examples: Sequence[PreferenceExample], config: TrainingConfig
) -> list[PreferenceExample]:
    """Return the rows of a run in the layout that takes the least time and is exact for its model.

    1. Both answers follow one prompt (SHARED), if that saves a tenth of the inputs and the model computes the same.
    2. Otherwise each answer follows its own prompt: in a sequence of its own (SEPARATE), or with packing both in one
       sequence (JOINED).

    Rows that have a layout other than SEPARATE keep it.

    Raises:
        InputError: rows cannot be packed for this model.
    """
    if not examples or any(example.layout != SEPARATE for example in examples):
        return list(examples)
    hidden = loss.head.hidden if loss.head else loss.model
    shared, saved = laid_out(examples, SHARED), saving(examples)
    if config.packing:
        joined = laid_out(examples, JOINED)
        mismatched = [row.mismatched for row in examples if row.mismatched is not None]
        length = padded_length([*joined, *mismatched])
        reason = packing_error(loss.model, hidden, length, loss.training_forms)
        if reason:
            raise InputError(f"packing would mix rows with this model: {reason}; leave --packing out")
        if len(examples[0].answers) < 2:
            return list(examples)
    if saved.shared <= (1 - LEAST_SAVED) * saved.separate and not sharing_error(
        loss.model, hidden, padded_length(shared), loss.training_forms
    ):
        return shared
    return joined if config.packing else list(examples)


def in_layout_of(
    examples: Sequence[PreferenceExample], others: Sequence[PreferenceExample]
) -> list[PreferenceExample]:
    """Return rows in the layout of other rows."""
    return laid_out(examples, others[0].layout) if others else list(examples)
