"""What training would see, without a model or files."""

from collections.abc import Iterable, Mapping
from typing import Any

from nalora_mlx.core.config_preferences import SFT, TRAIN_MODES, PreferenceConfig
from nalora_mlx.core.errors import InputError
from nalora_mlx.data.chats.chat_encoder import ChatEncoder
from nalora_mlx.data.preference_tokenization import accepted_rows, tokenize_preferences
from nalora_mlx.data.rows.formats import Features, parse_rows
from nalora_mlx.data.rows.survey import Survey
from nalora_mlx.data.sources.loading import numbered
from nalora_mlx.data.tokenization import Split, tokenize_rows

UNLIMITED = 2**31 - 1


def preview(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    mask_prompt: bool = True,
    *,
    last_turn_only: bool = False,
    max_seq_length: int | None = None,
    train_mode: str = SFT,
) -> Split:
    """Return what training would see of some rows.

    Args:
        rows: rows in any supported format.
        tokenizer: tokenizer wrapper of mlx-lm, or a tokenizer of transformers.
        mask_prompt: supervise assistant turns only.
        last_turn_only: with `mask_prompt`, supervise only the last assistant turn of a chat.
        max_seq_length: maximum number of tokens per sequence; None for no limit.
        train_mode: "sft", or a mode that compares answers: "dpo", "orpo", "kto" or "simpo".

    Returns:
        `sequences`, each with `tokens` (int32 [n]), `loss_mask` (bool [n]) and `source` ("row 1"); `notices` about odd
        rows; and `errors`, one for each unusable row. Sequences of preference rows have `answers`, chosen and rejected
        or a single one, each with `tokens` and `loss_mask`.

    Raises:
        InputError: there is no such train mode.
    """
    config = PreferenceConfig(train_mode=train_mode)
    if train_mode not in TRAIN_MODES:
        raise InputError(f"train_mode is {train_mode!r}; it must be one of {', '.join(TRAIN_MODES)}")
    survey, limit = Survey(), max_seq_length or UNLIMITED
    accepted = accepted_rows(config) if config.prefers else ()
    parsed, problems = parse_rows(numbered(rows), Features(mask_prompt=mask_prompt), survey, accepted)
    if config.prefers:
        split = tokenize_preferences(parsed, tokenizer, config, mask_prompt, limit, "rows")
    else:
        split = tokenize_rows(parsed, ChatEncoder(tokenizer, mask_prompt, last_turn_only), limit, "rows")
    split.notices = survey.notices("rows") + split.notices
    split.errors = problems + split.errors
    return split
