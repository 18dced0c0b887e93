"""Preference rows: a prompt with a chosen and a rejected answer, or two chats that differ in the last answer."""

from collections.abc import Mapping
from itertools import takewhile
from typing import Any

from nalora_mlx.core.errors import InputError
from nalora_mlx.data.rows.cells import is_blank, parsed_cell, text_in
from nalora_mlx.data.rows.messages import SHAREGPT_KEYS, Chat, Message, joined, read_chat

CHOSEN, REJECTED, LABEL = "chosen", "rejected", "label"
_LABELS = {
    "true": True,
    "1": True,
    "yes": True,
    "good": True,
    "false": False,
    "0": False,
    "no": False,
    "bad": False,
}
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
        return _compared(chosen, rejected.messages, len(prompt.messages))
    pairs = zip(chosen.messages, rejected.messages, strict=False)
    count = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    if not count:
        raise InputError(
            "'chosen' and 'rejected' begin with different messages; they must be two answers in the same chat"
        )
    return _compared(chosen, rejected.messages[count:], count)


def _compared(chosen: Chat, rejected: list[Message], start: int) -> Chat:
    """Return a chat whose messages from `start` on are compared with others.

    Raises:
        InputError: they are equal, one is missing or empty, or they do not begin and end with an answer.
    """
    answers = {CHOSEN: chosen.messages[start:], REJECTED: rejected}
    if answers[CHOSEN] == rejected:
        raise InputError("'chosen' and 'rejected' are the same; remove the row, or correct one of them")
    for name, messages in answers.items():
        if not messages:
            raise InputError(f"{name!r} has no answer of its own; it ends where the other goes on")
        if messages[0]["role"] != "assistant":
            raise InputError(
                f"'chosen' and 'rejected' part at a {messages[0]['role']} message; they must be answers to the same "
                "prompt"
            )
        if messages[-1]["role"] != "assistant":
            raise InputError(f"{name!r} ends in a {messages[-1]['role']} message; it must end in an answer")
        if not any(not is_blank(message.get("content")) or message.get("tool_calls") for message in messages):
            raise InputError(f"{name!r} is empty; remove the row, or write an answer")
    return chosen._replace(rejected=rejected, answer_start=start)


def read_label(value: Any) -> bool:
    """Return a label as bool; a cell of a table may hold it as text.

    Raises:
        InputError: it is something else.
    """
    label = _LABELS.get(str(value).strip().lower().removesuffix(".0"))
    if label is None:
        raise InputError(f"'label' is {str(value)[:50]!r}; it must be true or false")
    return label


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
