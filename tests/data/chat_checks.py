"""Checks of tokenized chats against turns that were written by hand."""

from typing import Any, NamedTuple

import numpy as np

from tests.data.chat_cases import Chat
from tests.data.chat_oracle import Format


class ExpectedTurn(NamedTuple):
    """What precedes an assistant turn, and the texts of which the turn must be one."""

    context: str
    targets: list[str]


def encode(tokenizer: Any, text: str) -> list[int]:
    """Return the tokens that mlx_lm.generate makes of a rendered text."""
    return list(tokenizer.encode(text, add_special_tokens=False))


def decode(tokenizer: Any, tokens: Any) -> str:
    return tokenizer.decode([int(token) for token in tokens], skip_special_tokens=False)


def expected_turns(form: Format, chat: Chat) -> list[ExpectedTurn]:
    return [
        ExpectedTurn(form.context(chat.messages[:i], chat.tools), form.target(chat.messages[: i + 1]))
        if i
        else ExpectedTurn(*form.first(chat.messages[:1], chat.tools))
        for i, message in enumerate(chat.messages)
        if message["role"] == "assistant"
    ]


def spans(loss_mask: np.ndarray) -> list[tuple[int, int]]:
    """Return the supervised spans [start, end) of a sequence."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], loss_mask.astype(int), [0]])))
    return [(int(start), int(end)) for start, end in zip(edges[::2], edges[1::2], strict=True)]


def supervised(split: Any, tokenizer: Any) -> list[str]:
    """Return the texts of the supervised spans."""
    return [
        decode(tokenizer, sequence.tokens[start:end])
        for sequence in split.sequences
        for start, end in spans(sequence.loss_mask)
    ]


def check_sequences(sequences: Any, turns: list[ExpectedTurn], tokenizer: Any) -> None:
    """Check that the supervised spans are the turns, each once, each after its context, in as few sequences as the
    rule says, and that a sequence ends with its last turn.
    """
    found = [(sequence, *span) for sequence in sequences for span in spans(sequence.loss_mask)]
    shown = "\n".join(repr(decode(tokenizer, s.tokens[start:end])) for s, start, end in found)
    assert len(found) == len(turns), f"{len(turns)} turns, but the spans are\n{shown}"
    previous = None
    for turn, (sequence, start, end) in zip(turns, found, strict=True):
        tokens = sequence.tokens.tolist()
        context = encode(tokenizer, turn.context)
        assert tokens[:start] == context, (
            f"context {decode(tokenizer, tokens[:start])!r}\nexpected {turn.context!r}"
        )
        # The text through the end of the turn, written by the tokenizer itself, so that a doubled or lost blank shows.
        wholes = [encode(tokenizer, turn.context + target) for target in turn.targets]
        written, texts = decode(tokenizer, tokens[:end]), [decode(tokenizer, whole) for whole in wholes]
        assert written in texts, f"trained {written!r}\nexpected {texts!r}"
        whole = wholes[texts.index(written)]
        if whole[:start] == context:
            assert tokens[:end] == whole, "the turn's tokens are not those of the joint text"
        if previous is not None:
            earlier, tail = previous
            shares = context[: len(tail)] == tail
            assert (earlier is sequence) == shares, f"sequences are {'not ' * shares}shared at {turn.targets}"
        previous = sequence, tokens[:end]
    for sequence in sequences:
        assert sequence.loss_mask[-1], "a sequence goes on after its last turn"
