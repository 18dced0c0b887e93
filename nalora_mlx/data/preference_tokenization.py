"""Tokenization of preference rows: each answer after exactly the tokens that generation would start from."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from nalora_mlx.core.config import KTO, ORPO, PreferenceConfig
from nalora_mlx.core.errors import InputError, listed
from nalora_mlx.data.chats.chat_encoder import ChatEncoder, TokenSequence
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

    Rows whose answers do not differ are left out, with a notice; if none is left, the notice is the problem.

    Args:
        rows: parsed rows.
        tokenizer: tokenizer wrapper of mlx-lm.
        config: the train mode.
        mask_prompt: in ORPO, whether its supervised part leaves prompts out.
        max_seq_length: maximum number of tokens of a prompt with one answer.
        name: of the split, for messages.
    """
    encoder, split = ChatEncoder(tokenizer, mask_prompt=True), Split([])
    findings, left_out = Findings(), Findings()
    longest = 0
    for row in rows:
        try:
            encoded = [_encode(one, encoder, max_seq_length, findings) for one in _answers(row)]
        except InputError as error:
            split.errors.append(str(error))
            continue
        if any(len(answer.sequences) > 1 for answer in encoded):
            left_out.add(Finding.SPLIT_ANSWERS, row.source)
            continue
        longest = max(longest, *(answer.length for answer in encoded))
        was_cut = any(answer.length > max_seq_length for answer in encoded)
        cut = [_cut(answer, row.source, max_seq_length) for answer in encoded]
        answers = [answer for answer in cut if answer is not None]
        if len(answers) < len(cut):
            left_out.add(Finding.UNSUPERVISED, row.source)
            continue
        if len(answers) == 2 and np.array_equal(answers[0].tokens, answers[1].tokens):
            left_out.add(Finding.SAME_ANSWERS if was_cut else Finding.SAME_RENDERING, row.source)
            continue
        if was_cut:
            findings.add(Finding.TRUNCATED, row.source)
        elif not all(ends(a.tokens, a.loss_mask, encoder.text_encoder.end_tokens) for a in answers):
            findings.add(Finding.NO_END_TOKEN, row.source)
        split.rows += 1
        split.sequences += _examples(answers, row, config, mask_prompt)
    details = {"limit": max_seq_length, "longest": longest, **finding_details(encoder, rows)}
    split.notices = findings.notices(name, len(rows), **details)
    without = left_out.notices(name, len(rows), **details)
    if without and not split.sequences and not split.errors:
        split.errors = without
    else:
        split.notices += without
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


def fits(row: Any, config: PreferenceConfig) -> bool:
    """Return whether something is a tokenized row with what the train mode reads."""
    if not isinstance(row, PreferenceExample):
        return isinstance(row, Example) and not config.prefers
    answers = 1 if config.train_mode == KTO else 2
    has_sft_mask = config.train_mode == ORPO
    return config.prefers and len(row.answers) == answers and (row.sft_mask is not None) == has_sft_mask


def _answers(row: Row) -> list[Row]:
    """Return a row for each of its answers, in which only the turns of the answer are trained on."""
    before = frozenset(range(row.answer_start))
    rows = [replace(row, untrained=before)]
    if row.rejected is not None:
        messages = row.messages[: row.answer_start] + row.rejected
        rows.append(replace(row, messages=messages, untrained=before))
    return rows


class _Encoded(NamedTuple):
    """The tokens of an answer after its prompt, in one sequence if they are usable, and their length before cutting."""

    sequences: list[TokenSequence]
    length: int


def _encode(row: Row, encoder: ChatEncoder, max_seq_length: int, findings: Findings) -> _Encoded:
    sequences, lost = encode_row(row, encoder, max_seq_length, findings)
    needed = lost + 1 if lost else 0  # a turn that is left out needs at least a token after its context
    return _Encoded(sequences, max([needed, *(len(sequence.tokens) for sequence in sequences)]))


def _cut(encoded: _Encoded, source: str, max_seq_length: int) -> Example | None:
    """Return an answer within the maximum length; None if no token of it is left."""
    if not encoded.sequences:
        return None
    tokens = np.array(encoded.sequences[0].tokens[:max_seq_length], np.int32)
    loss_mask = np.array(encoded.sequences[0].loss_mask[:max_seq_length], bool)
    loss_mask[:1] = False  # nothing predicts the first token
    return Example(tokens, loss_mask, source) if loss_mask.any() else None


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
    """Give each row the answer of the last row before it with another prompt, as a sample of mismatched answers.

    The rows before the first one are the last ones. If all prompts are equal, the answer is that of the row before.
    """
    starts = [int(example.answers[0].loss_mask.argmax()) for example in examples]
    prompts = [
        example.answers[0].tokens[:start].tobytes() for example, start in zip(examples, starts, strict=True)
    ]
    count = len(examples)
    others = [i - 1 for i in range(count)]
    if len(set(prompts)) > 1:
        for i in (*range(count), *range(count)):  # twice, because the first rows look back to the last ones
            if prompts[i - 1] == prompts[i]:
                others[i] = others[i - 1]
    found = []
    for example, start, other in zip(examples, starts, others, strict=True):
        own, answer = example.answers[0], examples[other].answers[0]
        first = starts[other]
        tokens = np.concatenate([own.tokens[:start], answer.tokens[first:]])[:max_seq_length]
        mask = np.concatenate([own.loss_mask[:start], answer.loss_mask[first:]])[:max_seq_length]
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
