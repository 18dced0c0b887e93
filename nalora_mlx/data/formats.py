"""Rows of training data: formats and per-token loss masks.

A row becomes tokens with a mask that says which of them are supervised (predicted and scored). Formats and their
keys are those of mlx_lm.lora: text, prompt/completion, chat messages with tools.
"""

import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Features:
    """The keys under which a row holds its parts, and whether prompts are masked."""

    prompt: str = "prompt"
    completion: str = "completion"
    chat: str = "messages"
    text: str = "text"
    mask_prompt: bool = False


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


def _messages(row: dict[str, Any], features: Features) -> list[dict[str, Any]]:
    """The chat that a row holds; empty for a text."""
    if features.prompt in row and features.completion in row:
        return [
            {"role": "user", "content": row[features.prompt]},
            {"role": "assistant", "content": row[features.completion]},
        ]
    return list(row.get(features.chat, ()))
