"""Tokenization: rows become token ids with a loss mask over the supervised tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nalora_mlx.core.errors import InputError, first_line, listed
from nalora_mlx.data.chat import Encoding, TemplateCheck, encode_chat
from nalora_mlx.data.findings import Finding, Findings
from nalora_mlx.data.formats import Features, Row, parse_rows

END_WINDOW = (
    4  # the end token must be among the last supervised tokens; templates may write a line break after it
)


@dataclass(frozen=True)
class Example:
    """One tokenized row.

    Attributes:
        tokens: int32 token ids [n].
        loss_mask: bool [n], true for supervised tokens. The first token never is: nothing predicts it.
        source: where the row comes from, as file:line.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    source: str

    @property
    def inputs(self) -> int:
        """Number of tokens the model reads: all but the last, which is only a target."""
        return len(self.tokens) - 1

    @property
    def supervised_tokens(self) -> int:
        """Number of targets that count in the loss."""
        return int(self.loss_mask[1:].sum())


@dataclass
class Split:
    """The tokenized rows of one split, and sentences about rows that are odd or unusable.

    Attributes:
        sequences: tokenized rows; a chat may become several.
        notices: what is odd about rows, and what to do.
        errors: what makes rows unusable, and what to do.
    """

    sequences: list[Example]
    notices: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.sequences)


def tokenize_split(
    rows: Sequence[tuple[str, dict[str, Any]]],
    tokenizer: Any,
    features: Features,
    max_seq_length: int,
    name: str = "data",
) -> Split:
    """Tokenize rows, truncate long ones, and drop those without a supervised token; notices say which.

    Args:
        rows: (source, row) pairs.
        tokenizer: tokenizer wrapper of mlx-lm.
        features: keys of the rows, and whether prompts are masked.
        max_seq_length: maximum number of tokens per row.
        name: of the split, for messages.

    Raises:
        InputError: rows are invalid, or none has a supervised token; the message names the rows.
    """
    parsed, problems = parse_rows(rows, features)
    split = tokenize_rows(parsed, tokenizer, features.mask_prompt, max_seq_length, name)
    if problems or split.errors:
        raise InputError(listed(problems + split.errors))
    return split


def tokenize_rows(
    rows: Sequence[Row], tokenizer: Any, mask_prompt: bool, max_seq_length: int, name: str = "data"
) -> Split:
    """Tokenize parsed rows as `tokenize_split` does, but collect problems in `errors` instead of raising."""
    split, findings, template = Split([]), Findings(), TemplateCheck(tokenizer)
    end_tokens = set(getattr(tokenizer, "eos_token_ids", None) or {tokenizer.eos_token_id})
    longest = 0
    for row in rows:
        try:
            encoding = _encode(row, tokenizer, mask_prompt)
        except InputError as error:
            split.errors.append(str(error))
            continue
        if encoding.rewritten:
            findings.add(Finding.REWRITTEN_TURNS, row.source)
        for part in template.ignored_parts(row):
            findings.add(part, row.source)
        length = len(encoding.tokens)
        longest = max(longest, length)
        if length > max_seq_length:
            findings.add(Finding.TRUNCATED, row.source)
        tokens = np.array(encoding.tokens[:max_seq_length], dtype=np.int32)
        loss_mask = np.array(encoding.loss_mask[:max_seq_length], dtype=bool)
        loss_mask[:1] = False  # nothing predicts the first token
        if not loss_mask.any():
            findings.add(Finding.UNSUPERVISED, row.source)
            continue
        ending = tokens[np.flatnonzero(loss_mask)[-END_WINDOW:]].tolist()
        if length <= max_seq_length and end_tokens.isdisjoint(ending):
            findings.add(Finding.NO_END_TOKEN, row.source)
        split.sequences.append(Example(tokens, loss_mask, row.source))
    dropped = findings.sources[Finding.UNSUPERVISED]
    if dropped and not split.sequences and not split.errors:
        split.errors.append(
            f"{name}: no row has a supervised token within {max_seq_length} tokens "
            f"(first: {dropped[0]}, longest row {longest}); raise --max-seq-length or shorten the prompts"
        )
    split.notices = findings.notices(name, len(rows), limit=max_seq_length, longest=longest)
    return split


def _encode(row: Row, tokenizer: Any, mask_prompt: bool) -> Encoding:
    if row.messages:
        return encode_chat(row, tokenizer, mask_prompt)
    try:
        tokens = list(tokenizer.encode(row.text))
    except Exception as error:
        raise InputError(f"{row.source}: the tokenizer refuses this text ({first_line(error)})") from None
    if not tokens or tokens[-1] != tokenizer.eos_token_id:
        tokens.append(tokenizer.eos_token_id)
    return Encoding(tokens, [True] * len(tokens))
