"""Rows of training data: formats and per-token loss masks.

A row becomes tokens with a mask that says which of them are supervised (predicted and scored). Formats and their
keys are those of mlx_lm.lora: text, prompt/completion, chat messages with tools.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nalora_mlx.errors import InputError, first_line, listed, places

_TOOLS, _CALLS = "tools", "tool_calls"  # keys of a row and of a message that a chat template may leave out
END = 4  # of the last supervised tokens one must end the sequence; templates may write a line break after it


@dataclass(frozen=True)
class Features:
    """The keys under which a row holds its parts, and whether prompts are masked."""

    prompt: str = "prompt"
    completion: str = "completion"
    chat: str = "messages"
    text: str = "text"
    mask_prompt: bool = False


@dataclass(frozen=True)
class Example:
    """One tokenized row: token ids [n], supervised flags [n] (never the first), and where it came from."""

    tokens: np.ndarray
    supervised: np.ndarray
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


# --- tokenizing ---------------------------------------------------------------------------------------------


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


def row_problem(row: dict[str, Any], features: Features) -> str | None:
    """What is wrong with a row's keys and types, and what to do; None if nothing is."""
    texts = [key for key in (features.prompt, features.completion) if key in row]
    if len(texts) < 2:
        texts = []
    if not texts and features.chat in row:
        return _chat_problem(row, features)
    if not texts and features.text in row:
        if features.mask_prompt:
            return "--mask-prompt needs prompt/completion or chat rows; this one is a text"
        texts = [features.text]
    if not texts:
        found = ", ".join(map(repr, row)) or "nothing"
        return (
            f"no known format; give {features.prompt!r} and {features.completion!r}, "
            f"or {features.chat!r}, or {features.text!r} (found {found[:200]})"
        )
    for key in texts:
        if not isinstance(row[key], str):
            return f"{key!r} is a {type(row[key]).__name__}; it must be a text"
        if not _is_unicode(row[key]):
            return f"{key!r} holds half of a surrogate pair, which is no character; mend the escapes (\\ud83d ...)"
    return _tools_problem(row)


def _chat_problem(row: dict[str, Any], features: Features) -> str | None:
    messages = row[features.chat]
    if (
        not isinstance(messages, list)
        or not messages
        or not all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages)
    ):
        return f"{features.chat!r} must be a list of messages with 'role' and 'content'"
    for number, message in enumerate(messages, 1):
        content = message.get("content")
        if content is None and not message.get("tool_calls"):
            return f"message {number} of {features.chat!r} has no 'content'; give it one, or 'tool_calls'"
        if not isinstance(content, str | list | None):
            return f"the 'content' of message {number} is a {type(content).__name__}; it must be a text"
        if not _is_unicode(json.dumps(message, ensure_ascii=False, default=str)):
            return f"message {number} holds half of a surrogate pair, which is no character; mend the escapes"
    return _tools_problem(row)


def _tools_problem(row: dict[str, Any]) -> str | None:
    tools = row.get("tools")
    if tools is None or (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        return None
    return f"'tools' is a {type(tools).__name__}; it must be a list of objects"


def _is_unicode(text: str) -> bool:
    """Whether a text can be written; JSON may hold half of a surrogate pair."""
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


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


def _messages(row: dict[str, Any], features: Features) -> list[dict[str, Any]]:
    """The chat that a row holds; empty for a text."""
    if features.prompt in row and features.completion in row:
        return [
            {"role": "user", "content": row[features.prompt]},
            {"role": "assistant", "content": row[features.completion]},
        ]
    return list(row.get(features.chat, ()))


class _UnusedParts:
    """Finds what a chat template leaves out, by rendering a chat with it and without it.

    A template may write tools only beside a system message, say; so chats of the same roles are taken to be alike,
    and only the first of them is rendered.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.known: dict[tuple[str, bool, frozenset[str]], bool] = {}

    def of(self, messages: list[dict[str, Any]], tools: Any) -> list[str]:
        """Those of a chat's parts that the template leaves out; it must have rendered this chat before."""
        bare = [{k: v for k, v in message.items() if k != _CALLS} for message in messages]
        others = {}
        if messages and tools:
            others[_TOOLS] = (messages, None)
        if any(message.get(_CALLS) for message in messages):
            others[_CALLS] = (bare, tools)
        roles = frozenset(message["role"] for message in messages)
        for part, other in others.items():
            if (part, bool(tools), roles) not in self.known:
                same = self._render(messages, tools) == self._render(*other)
                self.known[part, bool(tools), roles] = same
        return [part for part in others if self.known[part, bool(tools), roles]]

    def _render(self, messages: list[dict[str, Any]], tools: Any) -> list[int] | None:
        try:
            return list(self.tokenizer.apply_chat_template(messages, tools=tools, return_dict=False))
        except Exception:  # without the part the template refuses the chat, and so it reads the part
            return None


def _tokenize_chat(
    messages: list[dict[str, Any]], tools: Any, tokenizer: Any, mask_prompt: bool, source: str
) -> tuple[list[int], list[bool], bool]:
    def render(part: list[dict[str, Any]], generation_prompt: bool) -> list[int]:
        try:
            return list(
                tokenizer.apply_chat_template(
                    part, tools=tools, add_generation_prompt=generation_prompt, return_dict=False
                )
            )
        except Exception as error:
            raise InputError(
                f"{source}: the model's chat template refuses this row ({first_line(error)})"
            ) from None

    if not getattr(tokenizer, "has_chat_template", True):
        raise InputError(
            f"{source}: the model has no chat template; give 'text' rows, or take an instruct model"
        )
    tokens = render(messages, False)
    if not mask_prompt:
        return tokens, [True] * len(tokens), True
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    spans, stable = [], True
    for turn in turns:
        start, end, found = _turn_span(messages, turn, tokens, render)
        stable = stable and found
        spans.append((start, end))
    if not stable:
        # The template changes what came before (it drops earlier reasoning, say): only the last turn is itself.
        spans = spans[-1:]
    supervised = [False] * len(tokens)
    for start, end in spans:
        supervised[start:end] = [True] * (end - start)
    return tokens, supervised, stable


def _turn_span(
    messages: list[dict[str, Any]], turn: int, tokens: list[int], render: Callable[..., list[int]]
) -> tuple[int, int, bool]:
    """Where an assistant turn begins and ends in the rendered chat, and whether all before it is unchanged there.

    It begins where the generation prompt ends, or where that departs from the chat: some templates open a thought
    in the prompt that the finished turn does not have.
    """
    history = render(messages[:turn], False) if turn else []
    prompt = render(messages[:turn], True) if turn else []
    through = tokens if turn == len(messages) - 1 else render(messages[: turn + 1], False)
    stable = tokens[: len(history)] == history and tokens[: len(through)] == through
    start, end = _common(prompt, tokens), _common(through, tokens)
    if start < len(history):  # the beginning of the chat is another one: lengths are all there is to go by
        start = min(len(prompt), len(tokens))
    if end < start:
        end = min(len(through), len(tokens))
    return start, max(start, end), stable


def _common(one: list[int], other: list[int]) -> int:
    """Length of the common beginning."""
    for i, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return i
    return min(len(one), len(other))
