"""The layout of the answers of preference rows: which one a run chooses."""

import pytest

from nalora_mlx.core.config import TrainingConfig
from nalora_mlx.data.preferences import JOINED, SEPARATE, SHARED
from nalora_mlx.training.preferences.layout import choose_layout
from nalora_mlx.training.preferences.loss import PreferenceLoss
from tests.adapters.test_miniatures import build
from tests.conftest import build_model, llama_args
from tests.preference_rows import preference_rows


def chosen_layout(model, prompt, answer, **settings):
    """Return the layout of rows with prompts and answers of these lengths."""
    config = TrainingConfig(train_mode="dpo", **settings)
    rows = preference_rows("dpo", 3, prompt=(prompt, prompt + 1), answer=(answer, answer + 1))
    (layout,) = {row.layout for row in choose_layout(PreferenceLoss(model, config), rows, config)}
    return layout


@pytest.mark.parametrize(
    ("prompt", "answer", "layout"),
    [
        (24, 8, SHARED),
        (3, 29, SEPARATE),  # there is little to share
        (32, 32, SHARED),
        # As much to share. But attention reads both answers, and takes most of the time in a narrow model.
        (128, 128, SEPARATE),
        (192, 64, SHARED),
    ],
)
def test_prompts_are_shared_where_that_saves_time(prompt, answer, layout):
    assert chosen_layout(build_model(), prompt, answer) == layout


def test_a_wider_model_shares_more():
    assert chosen_layout(build_model(args=llama_args(hidden_size=512)), 128, 128) == SHARED


def test_prompts_are_not_shared_where_that_changes_the_answers():
    assert chosen_layout(build("gpt2"), 24, 8) == SEPARATE  # absolute positions, which sharing does not set


def test_packing_joins_answers_that_share_nothing():
    assert chosen_layout(build_model(), 24, 8, packing=True) == SHARED
    assert chosen_layout(build_model(), 3, 29, packing=True) == JOINED
