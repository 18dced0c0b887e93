"""What training would see, without a model or files."""

from collections.abc import Iterable, Mapping
from typing import Any

from nalora_mlx.data.chats.chat_encoder import ChatEncoder
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
) -> Split:
    """Return what training would see of some rows.

    Args:
        rows: rows in any supported format.
        tokenizer: tokenizer wrapper of mlx-lm, or a tokenizer of transformers.
        mask_prompt: supervise assistant turns only.
        last_turn_only: with `mask_prompt`, supervise only the last assistant turn of a chat.
        max_seq_length: maximum number of tokens per sequence; None for no limit.

    Returns:
        `sequences`, each with `tokens` (int32 [n]), `loss_mask` (bool [n]) and `source` ("row 1"); `notices` about odd
        rows; and `errors`, one for each unusable row.
    """
    survey = Survey()
    parsed, problems = parse_rows(numbered(rows), Features(mask_prompt=mask_prompt), survey)
    encoder = ChatEncoder(tokenizer, mask_prompt, last_turn_only)
    split = tokenize_rows(parsed, encoder, max_seq_length or UNLIMITED, "rows")
    split.notices = survey.notices("rows") + split.notices
    split.errors = problems + split.errors
    return split
