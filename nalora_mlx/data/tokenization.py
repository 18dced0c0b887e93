"""Tokenization: rows become token ids with a loss mask over the supervised tokens."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from nalora_mlx.core.config import TrainingConfig
from nalora_mlx.core.errors import InputError, first_line, listed
from nalora_mlx.data.chats.chat_encoder import ChatEncoder, TokenSequence
from nalora_mlx.data.chats.dropped import control_token, dropped_parts
from nalora_mlx.data.chats.text_encoder import TextEncoder
from nalora_mlx.data.findings import Finding, Findings
from nalora_mlx.data.media import RowMedia
from nalora_mlx.data.rows.formats import Features, Row, parse_rows
from nalora_mlx.data.sources.loading import numbered

# The end token must be among the last supervised tokens; templates may write a line break after it.
END_WINDOW = 4
ALL_TOKENS = Features()  # the usual keys, and no mask


class Lane(NamedTuple):
    """What a row adds to a sequence of a batch: arrays over its inputs.

    Attributes:
        inputs: int32 token ids that the model reads.
        targets: int32 token ids that follow them.
        loss_mask: bool, true where the target counts in the loss.
        answers: int32, the number of the answer that a target belongs to, -1 for none; None in supervised training.
        sft_mask: bool, true where ORPO trains on the target as supervised training does.
        segments: int32 from 1, which inputs attend to each other; None if all do.
        branches: int32, 0 for what all inputs of a segment attend to, else the branch within which they attend to
            each other; None without branches.
        positions: int32, the position of each input in its text; None if it follows from the order.
        token_weights: float32, how many tokens an input stands for; None for one each.
    """

    inputs: np.ndarray
    targets: np.ndarray
    loss_mask: np.ndarray
    answers: np.ndarray | None = None
    sft_mask: np.ndarray | None = None
    segments: np.ndarray | None = None
    branches: np.ndarray | None = None
    positions: np.ndarray | None = None
    token_weights: np.ndarray | None = None


@dataclass(frozen=True)
class Example:
    """One tokenized sequence: a row, or a part of one.

    Attributes:
        tokens: int32 token ids [n].
        loss_mask: bool [n], true for supervised tokens. The first token never is: nothing predicts it.
        source: where the row comes from, as file:line.
        images: of the row; a sequence that is the beginning of a chat may lack the last ones.
        media: what these images add to the tokens; None until they are encoded.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    source: str
    images: tuple[Any, ...] = ()
    media: RowMedia | None = None

    @property
    def inputs(self) -> int:
        """Number of tokens the model reads: all but the last, which is only a target."""
        return len(self.tokens) - 1

    @property
    def supervised_tokens(self) -> int:
        """Number of targets that count in the loss."""
        return int(self.loss_mask[1:].sum())

    @property
    def lanes(self) -> tuple[Lane, ...]:
        """The sequences that the row adds to a batch, without padding: one."""
        return (Lane(self.tokens[:-1], self.tokens[1:], self.loss_mask[1:]),)


@dataclass
class Split:
    """The tokenized rows of one split, and sentences about rows that are odd or unusable.

    Attributes:
        sequences: tokenized rows, `Example` or `PreferenceExample`; a chat may become several.
        notices: what is odd about rows, and what to do.
        errors: what makes rows unusable, and what to do.
        rows: number of rows that the sequences come from; a row of weight 2 counts twice.
    """

    sequences: list[Any]
    notices: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    rows: int = 0

    def __len__(self) -> int:
        return len(self.sequences)


def tokenize_split(
    rows: Iterable[Mapping[str, Any]] | Iterable[tuple[str, Mapping[str, Any]]],
    tokenizer: Any,
    features: Features = ALL_TOKENS,
    max_seq_length: int = TrainingConfig.max_seq_length,
    name: str = "data",
) -> Split:
    """Tokenize rows, truncate long ones, and drop those without a supervised token; notices say which.

    Args:
        rows: dicts in any supported format, or (source, dict) pairs, whose sources messages name.
        tokenizer: tokenizer wrapper of mlx-lm.
        features: keys of the rows, and whether prompts are masked.
        max_seq_length: maximum number of tokens per sequence.
        name: of the split, for messages.

    Raises:
        InputError: rows are invalid, or none has a supervised token; the message names the rows.
    """
    given: list[Any] = list(rows)
    with_sources = all(isinstance(row, tuple) for row in given)
    parsed, problems = parse_rows(given if with_sources else numbered(given), features)
    split = tokenize_rows(parsed, ChatEncoder(tokenizer, features.mask_prompt), max_seq_length, name)
    if problems or split.errors:
        raise InputError(listed(problems + split.errors))
    return split


def tokenize_rows(
    rows: Sequence[Row], encoder: ChatEncoder, max_seq_length: int, name: str = "data"
) -> Split:
    """Tokenize parsed rows as `tokenize_split` does, but collect problems in `errors` instead of raising."""
    split, findings = Split([]), Findings()
    longest, split_chats = 0, 0
    for row in rows:
        try:
            sequences, lost = encode_row(row, encoder, max_seq_length, findings)
        except InputError as error:
            split.errors.append(str(error))
            continue
        if len(sequences) > 1 and row.messages:
            split_chats += len(sequences)
            findings.add(Finding.SPLIT_CHATS, row.source)
        if lost:
            findings.add(Finding.LOST_TURNS if sequences else Finding.TRUNCATED, row.source)
        supervised, longest = False, max(longest, lost)
        for sequence in sequences:
            length = len(sequence.tokens)
            longest = max(longest, length)
            tokens = np.array(sequence.tokens[:max_seq_length], dtype=np.int32)
            loss_mask = np.array(sequence.loss_mask[:max_seq_length], dtype=bool)
            if length > max_seq_length:
                findings.add(Finding.TRUNCATED, row.source)
            elif not ends(tokens, loss_mask, encoder.text_encoder.end_tokens) and not row.chunk:
                findings.add(Finding.NO_END_TOKEN, row.source)
            loss_mask[:1] = False  # nothing predicts the first token
            if row.images and encoder.images is not None:
                is_image = np.isin(sequence.tokens, list(encoder.images.token_ids))
                if is_image[max_seq_length - 1 :].any():
                    split.errors.append(
                        f"{row.source}: an image reaches beyond the maximum of {max_seq_length} tokens (the row has "
                        f"{length}); raise --max-seq-length, or make its images smaller"
                    )
                    break
                loss_mask &= ~is_image[:max_seq_length]
            if loss_mask.any():
                supervised = True
                split.sequences.append(Example(tokens, loss_mask, row.source, row.images))
        split.rows += supervised
        if not supervised:
            findings.add(Finding.UNSUPERVISED, row.source)
    dropped = findings.sources[Finding.UNSUPERVISED]
    if dropped and not split.sequences and not split.errors:
        split.errors.append(
            f"{name}: no row has a supervised token within {max_seq_length} tokens "
            f"(first: {dropped[0]}, longest row {longest}); raise --max-seq-length or shorten the prompts"
            if findings.sources[Finding.TRUNCATED]
            else f"{name}: no row has an answer to train on (first: {dropped[0]}); add assistant turns, or remove "
            "--mask-prompt to train on everything"
        )
    split.notices = findings.notices(
        name,
        len(rows),
        limit=max_seq_length,
        longest=longest,
        sequences=split_chats,
        **finding_details(encoder, rows),
    )
    return split


def finding_details(encoder: ChatEncoder, rows: Sequence[Row]) -> dict[str, str]:
    """Return the remedies of notices that depend on the rows and on the chat template."""
    return {
        "chunk_remedy": ", or cut texts with --chunk" if any(row.text for row in rows) else "",
        "opened_remedy": _opened_remedy(encoder),
        "reasoning_remedy": "with --mask-prompt each turn is trained as it is generated, with its reasoning"
        if not encoder.mask_prompt
        else "it is not trained on; use a --chat-template that writes it, or put it into the content as that "
        "template expects it",
    }


def ends(tokens: np.ndarray, loss_mask: np.ndarray, end_tokens: set[int]) -> bool:
    """Return whether every supervised span ends in an end-of-sequence token."""
    last = np.flatnonzero(loss_mask & ~np.append(loss_mask[1:], False))
    return all(
        not end_tokens.isdisjoint(tokens[max(end - END_WINDOW + 1, 0) : end + 1].tolist()) for end in last
    )


def _opened_remedy(encoder: ChatEncoder) -> str:
    if "enable_thinking" in encoder.template:
        return """--chat-template-args '{"enable_thinking": false}' leaves it out, in training and in use"""
    return "give the rows what belongs there (reasoning_content, say), or use another --chat-template"


def encode_row(
    row: Row, encoder: ChatEncoder, max_seq_length: int, findings: Findings
) -> tuple[list[TokenSequence], int]:
    """Return the sequences of a row, and `Encoding.lost`; record what is odd about the row."""
    if not row.messages:
        return _encode_text(row, encoder.text_encoder, max_seq_length, findings), 0
    encoding = encoder(row, max_seq_length)
    if encoding.opened:
        findings.add(Finding.OPENED_PROMPT, row.source, encoding.opened)
    for finding, detail in dropped_parts(row, encoder, encoding):
        findings.add(finding, row.source, detail)
    template = encoder.template
    if unread := [name for name in row.template_args if template and name not in template]:
        findings.add(Finding.UNREAD_ARGUMENTS, row.source, unread[0])
    if token := control_token(row, encoder):
        findings.add(Finding.CONTROL_TOKENS, row.source, token)
    if encoder.mask_prompt and row.messages[-1]["role"] != "assistant":
        findings.add(Finding.UNANSWERED, row.source)
    return encoding.sequences, encoding.lost


def _encode_text(
    row: Row, encoder: TextEncoder, max_seq_length: int, findings: Findings
) -> list[TokenSequence]:
    """Return the tokens of a text, with the special tokens that the tokenizer adds and an end-of-sequence token.

    With `row.chunk`, a long text becomes sequences that overlap by one token, so that each token but the first is a
    target exactly once.
    """
    tokenizer = encoder.tokenizer
    try:
        tokens = list(tokenizer.encode(row.text))
    except Exception as error:
        raise InputError(f"{row.source}: the tokenizer refuses this text ({first_line(error)})") from None
    start, end = getattr(tokenizer, "bos_token_id", None), tokenizer.eos_token_id
    if start is not None and tokens[:2] == [start, start]:
        del tokens[0]
        findings.add(Finding.DOUBLE_START, row.source, tokenizer.decode([start]))
    if end is not None and tokens[-1:] != [end]:
        tokens.append(end)
    window = max_seq_length if row.chunk else len(tokens)
    starts = range(0, max(len(tokens) - 1, 1), max(window - 1, 1))
    return [TokenSequence(part := tokens[i : i + window], [True] * len(part)) for i in starts]
