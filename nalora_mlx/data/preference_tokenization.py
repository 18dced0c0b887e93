"""Tokenization of preference rows: each answer after exactly the tokens that generation would start from."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from nalora_mlx.core.config import KTO, ORPO, PreferenceConfig
from nalora_mlx.core.errors import InputError, listed
from nalora_mlx.data.chats.chat_encoder import ChatEncoder
from nalora_mlx.data.findings import Finding, Findings
from nalora_mlx.data.preferences import PreferenceExample
from nalora_mlx.data.rows.formats import IMAGES, LABELS, PREFERENCES, Features, Row, parse_rows
from nalora_mlx.data.sources.loading import numbered
from nalora_mlx.data.tokenization import Example, Split, encode_row, ends, finding_details

MANY_LONGER = 0.75  # of the pairs with a longer chosen answer, and
MUCH_LONGER = 1.5  # times the mean length, from which on length alone tells the answers apart


def tokenize_preferences(
    rows: Sequence[Row],
    tokenizer: Any,
    config: PreferenceConfig,
    mask_prompt: bool,
    max_seq_length: int,
    name: str = "data",
) -> Split:
    """Tokenize parsed preference rows; problems are collected in `errors`.

    The answers are supervised, and nothing else: all assistant turns from where the two chats part. KTO also takes
    pairs, and makes a desirable and an undesirable row of each.

    Args:
        rows: parsed rows.
        tokenizer: tokenizer wrapper of mlx-lm.
        config: the train mode.
        mask_prompt: in ORPO, whether its supervised part leaves prompts out.
        max_seq_length: maximum number of tokens of a prompt with one answer.
        name: of the split, for messages.
    """
    encoder, findings, split = ChatEncoder(tokenizer, mask_prompt=True), Findings(), Split([])
    for row in rows:
        try:
            answers = [_encode(row, encoder, max_seq_length, findings)]
            if row.rejected is not None:
                other = replace(row, messages=row.messages[: row.answer_start] + row.rejected)
                answers.append(_encode(other, encoder, max_seq_length, findings))
        except InputError as error:
            split.errors.append(str(error))
            continue
        complete = [answer for answer in answers if answer is not None]
        if len(complete) < len(answers) or (
            len(complete) == 2 and np.array_equal(complete[0].tokens, complete[1].tokens)
        ):
            findings.add(Finding.SAME_ANSWERS, row.source)
            continue
        split.rows += 1
        split.sequences += _examples(complete, row, config, mask_prompt)
    if rows and not split.sequences and not split.errors:
        split.errors.append(
            f"{name}: no row has answers that differ within {max_seq_length} tokens; raise --max-seq-length"
        )
    longest = max(
        (len(answer.tokens) for example in split.sequences for answer in example.answers), default=0
    )
    split.notices = findings.notices(
        name, len(rows), limit=max_seq_length, longest=longest, **finding_details(encoder, rows)
    )
    if config.train_mode == KTO:
        split.sequences = _with_mismatched(split.sequences, max_seq_length)
        split.notices += _balance_notices(split.sequences, config, name)
    elif split.sequences:
        split.notices += _length_notices(split.sequences, name)
    return split


def tokenize_preference_rows(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: Any,
    config: PreferenceConfig,
    mask_prompt: bool,
    max_seq_length: int,
    name: str = "data",
) -> Split:
    """Tokenize preference rows that are dicts, as `tokenize_preferences` does.

    Raises:
        InputError: rows are invalid; the message names them.
    """
    accepted = accepted_rows(config)
    parsed, problems = parse_rows(numbered(rows), Features(mask_prompt=mask_prompt), accepted=accepted)
    split = tokenize_preferences(parsed, tokenizer, config, mask_prompt, max_seq_length, name)
    if problems or split.errors:
        raise InputError(listed(problems + split.errors))
    return split


def accepted_rows(config: PreferenceConfig) -> set[str]:
    """Return the kinds of rows that a run trains on, see `parse_rows`."""
    if not config.prefers:
        return {IMAGES}
    return {PREFERENCES, LABELS} if config.train_mode == KTO else {PREFERENCES}


def _encode(row: Row, encoder: ChatEncoder, max_seq_length: int, findings: Findings) -> Example | None:
    """Return a chat with its answers supervised; None if they are beyond the maximum length."""
    before = frozenset(range(row.answer_start if row.rejected is not None else len(row.messages) - 1))
    if row.rejected is None and row.messages[-1]["role"] != "assistant":
        raise InputError(
            f"{row.source}: ends in a {row.messages[-1]['role']} message; it must end in an answer"
        )
    sequences, _ = encode_row(replace(row, untrained=before), encoder, max_seq_length, findings)
    if len(sequences) > 1:
        raise InputError(
            f"{row.source}: its answers have several assistant turns, and the model's chat template renders earlier "
            "turns in another way once later ones follow; let the chats part at their last answer"
        )
    if not sequences:
        return None
    sequence = sequences[0]
    tokens = np.array(sequence.tokens[:max_seq_length], np.int32)
    loss_mask = np.array(sequence.loss_mask[:max_seq_length], bool)
    if len(sequence.tokens) > max_seq_length:
        findings.add(Finding.TRUNCATED, row.source)
    elif not ends(tokens, loss_mask, encoder.text_encoder.end_tokens):
        findings.add(Finding.NO_END_TOKEN, row.source)
    loss_mask[:1] = False
    return Example(tokens, loss_mask, row.source) if loss_mask.any() else None


def _examples(
    answers: Sequence[Example], row: Row, config: PreferenceConfig, mask_prompt: bool
) -> list[PreferenceExample]:
    """Return the rows of a run that one row of data becomes."""
    if config.train_mode == KTO:
        labels = (row.label,) if row.rejected is None else (True, False)
        return [
            PreferenceExample((answer,), desirable=bool(label))
            for answer, label in zip(answers, labels, strict=True)
        ]
    sft_mask = None
    if config.train_mode == ORPO:
        sft_mask = answers[0].loss_mask if mask_prompt else np.arange(len(answers[0].tokens)) > 0
    return [PreferenceExample(tuple(answers), sft_mask=sft_mask)]


def _with_mismatched(examples: Sequence[PreferenceExample], max_seq_length: int) -> list[PreferenceExample]:
    """Give each row the answer of the last row before it with another prompt, as a sample of mismatched answers."""
    found = []
    for i, example in enumerate(examples):
        others = (examples[i - back] for back in range(1, len(examples) + 1))
        other = next((one for one in others if one.source != example.source), example).answers[0]
        own = example.answers[0]
        start, first = int(own.loss_mask.argmax()), int(other.loss_mask.argmax())
        tokens = np.concatenate([own.tokens[:start], other.tokens[first:]])[:max_seq_length]
        mask = np.concatenate([own.loss_mask[:start], other.loss_mask[first:]])[:max_seq_length]
        found.append(replace(example, mismatched=Example(tokens, mask, example.source)))
    return found


def _balance_notices(examples: Sequence[PreferenceExample], config: PreferenceConfig, name: str) -> list[str]:
    """Return a notice if good and bad answers weigh very differently in KTO."""
    good = sum(example.desirable for example in examples)
    bad = len(examples) - good
    if name != "train" or not examples:
        return []
    if not good or not bad:
        return [f"{name}: all labels are {'true' if good else 'false'}; KTO learns from both kinds"]
    ratio = config.desirable_weight * good / (config.undesirable_weight * bad)
    if 0.5 <= ratio <= 2:
        return []
    weight, flag = (bad / good, "--desirable-weight") if ratio < 1 else (good / bad, "--undesirable-weight")
    return [
        f"{name}: {good} rows have the label true and {bad} false; {flag} {weight:.2g} makes both count the same"
    ]


def _length_notices(examples: Sequence[PreferenceExample], name: str) -> list[str]:
    """Return a notice if the length alone tells chosen answers from rejected ones."""
    lengths = np.array([[answer.supervised_tokens for answer in example.answers] for example in examples])
    longer = float((lengths[:, 0] > lengths[:, 1]).mean())
    chosen, rejected = lengths.mean(axis=0)
    if longer < MANY_LONGER or chosen < MUCH_LONGER * rejected:
        return []
    return [
        f"{name}: {longer:.0%} of the chosen answers are longer than the rejected ones, {chosen:.0f} tokens against "
        f"{rejected:.0f} on average; the model may only learn to write longer answers"
    ]
