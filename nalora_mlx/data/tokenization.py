"""Rows of training data: formats and per-token loss masks.

A row becomes tokens with a mask that says which of them are supervised (predicted and scored). Formats and their
keys are those of mlx_lm.lora: text, prompt/completion, chat messages with tools.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nalora_mlx.core.errors import InputError, first_line, listed, places
from nalora_mlx.data.chat import _CALLS, _TOOLS, _tokenize_chat, _UnusedParts
from nalora_mlx.data.formats import Features, _messages, row_problem

END = 4  # of the last supervised tokens one must end the sequence; templates may write a line break after it


@dataclass(frozen=True)
class Example:
    """One tokenized row: token ids [n], supervised flags [n] (never the first), and where it came from."""

    tokens: np.ndarray
    loss_mask: np.ndarray
    source: str

    @property
    def inputs(self) -> int:
        """How many tokens the model reads: all but the last, which is only a target."""
        return len(self.tokens) - 1


@dataclass
class Split:
    """The tokenized rows of one split, what a person should know of them, and what is wrong with rows that are none.

    Notices and errors are one sentence each, with the rows as file:line and what to do.
    """

    examples: list[Example]
    notices: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.examples)


def tokenize_split(
    rows: Sequence[tuple[str, dict[str, Any]]],
    tokenizer: Any,
    features: Features,
    max_seq_length: int,
    name: str = "data",
) -> Split:
    """Tokenize rows, cut those that are too long, drop those without a supervised token; say so in notices.

    Args:
        rows: (source, row) pairs.
        tokenizer: mlx-lm's tokenizer wrapper.
        features: keys and mask.
        max_seq_length: most tokens that a row may keep.
        name: of the split, for messages.

    Raises:
        InputError: rows of no known format, or of wrong types (with their sources), or no row that is left.
    """
    split = tokenize_rows(rows, tokenizer, features, max_seq_length, name)
    if split.errors:
        raise InputError(listed(split.errors))
    return split


def tokenize_rows(
    rows: Sequence[tuple[str, dict[str, Any]]],
    tokenizer: Any,
    features: Features,
    max_seq_length: int,
    name: str = "data",
) -> Split:
    """Do what `tokenize_split` does, but list what is wrong under `errors` instead of raising."""
    split = Split([])
    cut, empty, unstable, endless, longest = [], [], [], [], 0
    parts = _UnusedParts(tokenizer)
    unused: dict[str, list[str]] = {_TOOLS: [], _CALLS: []}
    ends = getattr(tokenizer, "eos_token_ids", None) or {tokenizer.eos_token_id}
    for source, row in rows:
        try:
            tokens, supervised, stable = _tokenize(row, tokenizer, features, source)
        except InputError as error:
            split.errors.append(str(error))
            continue
        if not stable:
            unstable.append(source)
        for part in parts.of(_messages(row, features), row.get("tools")):
            unused[part].append(source)
        longest = max(longest, len(tokens))
        flags = np.array(supervised, dtype=bool)
        flags[:1] = False  # nothing predicts the first token
        if len(tokens) > max_seq_length:
            cut.append(source)
            tokens, flags = tokens[:max_seq_length], flags[:max_seq_length]
        if not flags.any():
            empty.append(source)
            continue
        if source not in cut[-1:] and not any(tokens[i] in ends for i in np.flatnonzero(flags)[-END:]):
            endless.append(source)
        split.examples.append(Example(np.array(tokens, dtype=np.int32), flags, source))
    if rows and not split.examples and not split.errors:
        split.errors.append(
            f"{name}: no row has a supervised token within {max_seq_length} tokens "
            f"(first: {empty[0]}, longest row {longest}); raise --max-seq-length or shorten the prompts"
        )
    split.notices += [
        f"{name}: {len(sources)} of {len(rows)} {what} ({places(sources)}); {remedy}"
        for sources, what, remedy in (
            (
                cut,
                f"rows are longer than {max_seq_length} tokens (the longest {longest}) and were cut",
                "raise --max-seq-length to keep them whole",
            ),
            (
                empty,
                "rows have no supervised token and were left out",
                "they have no answer, or the prompt fills --max-seq-length",
            ),
            (
                unstable,
                "rows have earlier turns that the chat template rewrites",
                "they train on their last assistant turn only",
            ),
            (
                endless,
                "rows do not end in an end-of-sequence token that is trained on",
                "the model may not learn to stop; let the chat template write one",
            ),
            (
                unused[_TOOLS],
                "rows have 'tools' that the chat template leaves out",
                "they train as if there were none; take a model whose template writes tools, "
                "or put them into a system message",
            ),
            (
                unused[_CALLS],
                "rows have 'tool_calls' that the chat template leaves out",
                "those turns train without them, empty where there is no other content; "
                "take a model whose template writes tool calls, or put them into 'content'",
            ),
        )
        if sources
    ]
    return split


def _tokenize(
    row: dict[str, Any], tokenizer: Any, features: Features, source: str
) -> tuple[list[int], list[bool], bool]:
    """Tokens, supervised flags, and whether every assistant turn could be found in the rendered chat."""
    if problem := row_problem(row, features):
        raise InputError(f"{source}: {problem}")
    if messages := _messages(row, features):
        return _tokenize_chat(messages, row.get("tools"), tokenizer, features.mask_prompt, source)
    try:
        tokens = list(tokenizer.encode(row[features.text]))
    except Exception as error:
        raise InputError(f"{source}: the tokenizer refuses this text ({first_line(error)})") from None
    if not tokens or tokens[-1] != tokenizer.eos_token_id:
        tokens.append(tokenizer.eos_token_id)
    return tokens, [True] * len(tokens), True
