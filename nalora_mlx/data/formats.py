"""Formats of training rows: plain text, prompt and completion, or chat messages with tools, as in mlx_lm.lora."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from nalora_mlx.core.config import RunConfig
from nalora_mlx.core.errors import InputError

_SURROGATE = "half of a surrogate pair, which is not a character; fix the escapes"


@dataclass(frozen=True)
class Features:
    """The keys of a row's parts, and whether prompts are masked."""

    prompt: str = "prompt"
    completion: str = "completion"
    chat: str = "messages"
    text: str = "text"
    mask_prompt: bool = False

    @classmethod
    def from_config(cls, config: RunConfig, overrides: Mapping[str, Any] | None = None) -> "Features":
        """Return the features of a run; `overrides` may hold other keys for one dataset, as chat_feature."""
        keys = {
            part: (overrides or {}).get(f"{part}_feature", getattr(config, f"{part}_feature"))
            for part in ("prompt", "completion", "chat", "text")
        }
        return cls(**keys, mask_prompt=config.mask_prompt)


@dataclass(frozen=True)
class Row:
    """One valid row of training data: a chat or a text.

    Attributes:
        source: where it comes from: file:line or dataset[split]:number.
        messages: the chat, empty for a text. A prompt and completion become a user and an assistant message.
        tools: what the row holds under "tools", for the chat template.
        text: the text, empty for a chat.
        template_args: arguments of the chat template that the row brings, under "chat_template_kwargs".
        untrained: indices of the assistant messages that are not trained on ("weight": 0 or "train": false).
        weight: how many times an epoch holds the row.
        chunk: whether a text longer than the sequence length becomes several sequences, instead of being truncated.
        rejected: the worse answer of a preference row, as the messages that follow `messages` without its last turn.
        images: the images of a row, as paths or bytes, in the order of their appearance.
    """

    source: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    text: str = ""
    template_args: Mapping[str, Any] = field(default_factory=dict)
    untrained: frozenset[int] = frozenset()
    weight: int = 1
    chunk: bool = False
    rejected: list[dict[str, Any]] | None = None
    images: tuple[Any, ...] = ()


def parse_row(source: str, content: Mapping[str, Any], features: Features) -> Row:
    """Return the row that a JSON object holds.

    If several formats fit, prompt and completion come before chat, and chat before text.

    Raises:
        InputError: the keys fit no format, or a value has the wrong type.
    """
    try:
        if features.prompt in content and features.completion in content:
            prompt, completion = (_text(content, key) for key in (features.prompt, features.completion))
            messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
            return Row(source, messages, _tools(content))
        if features.chat in content:
            return Row(source, _messages(content[features.chat], features.chat), _tools(content))
        if features.text in content:
            if features.mask_prompt:
                raise InputError("--mask-prompt needs prompt/completion or chat rows; this row is a text")
            return Row(source, [], _tools(content), _text(content, features.text))
        found = ", ".join(map(repr, content)) or "nothing"
        raise InputError(
            f"no known format; give {features.prompt!r} and {features.completion!r}, "
            f"or {features.chat!r}, or {features.text!r} (found {found[:200]})"
        )
    except InputError as error:
        raise InputError(f"{source}: {error}") from None


def parse_rows(
    contents: Iterable[tuple[str, Mapping[str, Any]]], features: Features
) -> tuple[list[Row], list[str]]:
    """Parse (source, JSON object) pairs; return the valid rows and one problem for each of the others."""
    rows, problems = [], []
    for source, content in contents:
        try:
            rows.append(parse_row(source, content, features))
        except InputError as error:
            problems.append(str(error))
    return rows, problems


def _text(content: Mapping[str, Any], key: str) -> str:
    text = content[key]
    if not isinstance(text, str):
        raise InputError(f"{key!r} must be a string, not {type(text).__name__}")
    if not _is_unicode(text):
        raise InputError(f"{key!r} holds {_SURROGATE} (\\ud83d ...)")
    return text


def _messages(messages: Any, key: str) -> list[dict[str, Any]]:
    if (
        not isinstance(messages, list)
        or not messages
        or not all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages)
    ):
        raise InputError(f"{key!r} must be a list of messages with 'role' and 'content'")
    for number, message in enumerate(messages, 1):
        content = message.get("content")
        if content is None and not message.get("tool_calls"):
            raise InputError(f"message {number} of {key!r} has no 'content'; add it, or 'tool_calls'")
        if not isinstance(content, str | list | None):
            raise InputError(
                f"the 'content' of message {number} must be a string, not {type(content).__name__}"
            )
        if not _is_unicode(json.dumps(message, ensure_ascii=False, default=str)):
            raise InputError(f"message {number} holds {_SURROGATE} (\\ud83d ...)")
    return messages


def _tools(content: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    tools = content.get("tools")
    if tools is None or (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        return tools
    raise InputError("'tools' must be a list of objects")


def _is_unicode(text: str) -> bool:
    """Return whether a string can be encoded; JSON escapes may leave half of a surrogate pair."""
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)
