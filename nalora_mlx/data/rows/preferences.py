"""Preference rows: a prompt with a chosen and a rejected answer, or two chats that differ in the last answer."""

from collections.abc import Mapping
from typing import Any

from nalora_mlx.core.errors import InputError
from nalora_mlx.data.rows.cells import is_blank, parsed_cell, text_in
from nalora_mlx.data.rows.messages import SHAREGPT_KEYS, Chat, joined, read_chat

CHOSEN, REJECTED = "chosen", "rejected"
_PROMPT_KEYS = ("question", "query", "instruction", *SHAREGPT_KEYS)  # after the configured one


def read_preference(prompt_key: str, content: Mapping[str, Any]) -> Chat:
    """Return the chat with the chosen answer, and the rejected one.

    Raises:
        InputError: the prompt or an answer is missing, or the chats have no common beginning.
    """
    chosen, rejected = (read_turns(content, key, "assistant") for key in (CHOSEN, REJECTED))
    if _is_chat(chosen) != _is_chat(rejected):
        raise InputError(
            "one of 'chosen' and 'rejected' is a whole chat and the other an answer; make them alike"
        )
    if not _is_chat(chosen):
        key = _prompt_key(content, prompt_key)
        if key is None:
            raise InputError(
                "'chosen' and 'rejected' are answers, but there is no 'prompt'; add it, "
                "or give --text-key chosen to train on whole texts"
            )
        prompt = read_turns(content, key, "user")
        if key == "instruction" and not is_blank(content.get("input")):
            prompt = instruction(content, key, "input")
        chosen = joined(prompt, chosen)
        if len(chosen.messages) != len(prompt.messages) + 1:
            raise InputError("'chosen' must be one answer, the message that follows the prompt")
        return chosen._replace(rejected=rejected.messages)
    count = len(chosen.messages) - 1
    if chosen.messages[-1]["role"] != "assistant" or len(rejected.messages) <= count:
        raise InputError("'chosen' must end in an answer, and 'rejected' must hold another one at its place")
    if chosen.messages[:count] != rejected.messages[:count]:
        raise InputError("'chosen' and 'rejected' must be the same chat up to the last message of 'chosen'")
    return chosen._replace(rejected=rejected.messages[count:])


def supervised_remedy(content: Mapping[str, Any], prompt_key: str) -> str:
    """Return how to train on the chosen answers of rows like this one."""
    if _is_chat(read_turns(content, CHOSEN, "assistant")):
        return f"--chat-key {CHOSEN} trains on the chosen answers"
    key = _prompt_key(content, prompt_key)
    if key in SHAREGPT_KEYS:
        return "to train on the chosen answers, put them at the end of the chats"
    flag = "" if key == prompt_key else f"--prompt-key {key} "
    return f"{flag}--completion-key {CHOSEN} trains on the chosen answers"


def _prompt_key(content: Mapping[str, Any], configured: str) -> str | None:
    return next((key for key in (configured, *_PROMPT_KEYS) if not is_blank(content.get(key))), None)


def _is_chat(turns: Chat) -> bool:
    return turns.messages[0]["role"] != "assistant"


def read_turns(content: Mapping[str, Any], key: str, role: str) -> Chat:
    """Return what a row holds under a key as messages; a string becomes one of the given role.

    Raises:
        InputError: it is neither a string nor messages.
    """
    value = content[key]
    if isinstance(value, list) or key in SHAREGPT_KEYS:
        return read_chat(value, key)
    if _are_messages([value]):
        return read_chat([value], key)
    if key in (CHOSEN, REJECTED) and _are_messages(parsed := parsed_cell(value)):
        return read_chat(parsed, key)
    return Chat([{"role": role, "content": text_in(content, key)}])


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(item, dict) and ("role" in item or "from" in item) for item in value
    )


def instruction(content: Mapping[str, Any], key: str, context_key: str) -> Chat:
    """Return a user message with an instruction, followed by its input if there is one."""
    parts = [text_in(content, name) for name in (key, context_key) if not is_blank(content.get(name))]
    texts = [part for part in parts if part.strip()] or [""]
    return Chat([{"role": "user", "content": "\n\n".join(texts)}])
