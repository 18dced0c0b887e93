"""Messages of chats in one shape, whatever shape their source has: a role, text content, and tool calls.

Values of a row are never changed. Messages that have the shape already are shared with the row.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from nalora_mlx.core.errors import InputError
from nalora_mlx.data.rows.cells import check_unicode, is_blank, parsed_cell, text_in
from nalora_mlx.data.rows.images import place_images, read_content, read_images
from nalora_mlx.data.rows.tool_calls import read_calls, read_old_call

Message = dict[str, Any]

SHAREGPT_KEYS = ("conversations", "conversation")
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "system": "system",
    "function_call": "function_call",  # becomes an assistant message with tool calls
    "observation": "tool",
    "tool": "tool",
    "function_response": "tool",
}
# Those that chat templates of the field read. The others may be read by a template of the user's.
TEMPLATE_KEYS = frozenset(
    {
        *(
            "role",
            "content",
            "name",
            "tool_calls",
            "tool_call_id",
            "reasoning_content",
            "reasoning",
            "thinking",
        ),
        *("tools", "functions", "documents", "citations", "tool_plan", "tool_responses"),
        *("prefix", "partial", "channel", "recipient", "content_type", "metadata"),
    }
)
_KEYS_OF_MESSAGES = ({"role", "content"}, {"role", "tool_calls"}, {"from", "value"})
_MESSAGES_IN_TEXT = re.compile(r"""\s*\[\s*\{\s*['"](role|content|from|value)['"]\s*:""")


class Chat(NamedTuple):
    """The messages of a row, and what was found in them.

    Attributes:
        messages: each with a role and content.
        untrained: indices of assistant messages with "weight": 0 or "train": false.
        images: of the image parts, in order; None for a part that names no image.
        unknown_keys: keys of messages that no known chat template reads.
        rejected: in preference rows, the worse end of the chat, in place of the messages from `answer_start` on.
        answer_start: index of the first message that the two do not share.
    """

    messages: list[Message]
    untrained: frozenset[int] = frozenset()
    images: tuple[Any, ...] = ()
    unknown_keys: frozenset[str] = frozenset()
    rejected: list[Message] | None = None
    answer_start: int = 0


def joined(*chats: Chat) -> Chat:
    """Return chats as one, with the rejected answer of the last."""
    messages: list[Message] = []
    untrained: set[int] = set()
    for chat in chats:
        untrained |= {index + len(messages) for index in chat.untrained}
        messages += chat.messages
    images = tuple(image for chat in chats for image in chat.images)
    unknown = frozenset(key for chat in chats for key in chat.unknown_keys)
    last = chats[-1]
    start = len(messages) - len(last.messages) + last.answer_start if last.rejected is not None else 0
    return Chat(messages, frozenset(untrained), images, unknown, last.rejected, start)


def read_turns(content: Mapping[str, Any], key: str, role: str, in_cells: bool = False) -> Chat:
    """Return what a row holds under a key as messages; a string becomes one of the given role.

    Args:
        content: the row.
        key: may hold a string, a message or a list of messages.
        role: of a string.
        in_cells: whether the string may be JSON of messages, as in a cell of a table.

    Raises:
        InputError: it is neither a string nor messages.
    """
    value = content[key]
    if isinstance(value, list) or key in SHAREGPT_KEYS:
        return read_chat(value, key)
    if isinstance(value, dict) and not value.keys().isdisjoint(("role", "from")):
        return read_chat([value], key)
    text = text_in(content, key)
    if in_cells:
        parsed = parsed_cell(text)
        if isinstance(parsed, list) and parsed and all(map(_is_message, parsed)):
            return read_chat(parsed, key)
        if parsed is text and _MESSAGES_IN_TEXT.match(text):
            raise InputError(
                f"{key!r} is a text that looks like messages and is not JSON; write the messages with json.dumps"
            )
    return Chat([{"role": role, "content": text}])


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and any(keys <= value.keys() for keys in _KEYS_OF_MESSAGES)


def read_chat(value: Any, key: str) -> Chat:
    """Return the messages that a row holds under a key: with role and content, or from and value as in ShareGPT.

    Raises:
        InputError: the value is not a list of messages, or one of them is wrong.
    """
    messages: list[Message] = []
    untrained: set[int] = set()
    images: list[Any] = []
    unknown: set[str] = set()
    sharegpt, old_calls = key in SHAREGPT_KEYS, False
    for number, entry in enumerate(_entries(value, key), 1):
        content = entry.get("content")
        if len(entry) == 2 and not sharegpt and type(content) is str and "role" in entry:
            if not (content.isascii() and entry["role"].isascii()):
                check_unicode(entry, f"message {number}")
            messages.append(entry)
            continue
        message, trained = _read_message(entry, number, key, images)
        if not trained and message["role"] == "assistant":
            untrained.add(number - 1)
        unknown |= {name for name in message.keys() - TEMPLATE_KEYS if not is_blank(message[name])}
        old_calls = old_calls or not is_blank(entry.get("function_call"))
        messages.append(message)
    if old_calls:  # in OpenAI's old format the results have a role of their own
        messages = [m | {"role": "tool"} if m["role"] == "function" else m for m in messages]
    return Chat(messages, frozenset(untrained), tuple(images), frozenset(unknown))


def _entries(value: Any, key: str) -> list[Message]:
    """Return the messages in a list, in JSON (of a .csv cell), or in an object of lists (as Arrow may hold them)."""
    entries = parsed_cell(value)
    if isinstance(entries, dict) and entries and all(isinstance(column, list) for column in entries.values()):
        lengths = {len(column) for column in entries.values()}
        if len(lengths) == 1:
            entries = [dict(zip(entries, row, strict=True)) for row in zip(*entries.values(), strict=True)]
    if not isinstance(entries, list) or not entries:
        detail = "; it is a string that holds no JSON list" if isinstance(entries, str) else ""
        raise InputError(f"{key!r} must be a list of messages with 'role' and 'content'{detail}")
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict) or not isinstance(entry.get("role") or entry.get("from"), str):
            raise InputError(
                f"{key!r} must be a list of messages with 'role' and 'content'; message {number} is none"
            )
    return entries


def _read_message(entry: Message, number: int, key: str, images: list[Any]) -> tuple[Message, bool]:
    """Return a message in the usual shape, and whether to train on it; its images go to `images`."""
    message = {name: value for name, value in entry.items() if value is not None}
    check_unicode(message, f"message {number}")
    if not message.get("role"):
        message = _from_sharegpt(message, number)
    elif key in SHAREGPT_KEYS:
        message["role"] = SHAREGPT_ROLES.get(message["role"].lower(), message["role"])
    if message["role"] == "function_call":
        message |= {"role": "assistant", "function_call": message.pop("content", None)}
    calls = read_calls(message.pop("tool_calls", None), number)
    old_call = message.pop("function_call", None)
    if not calls and not is_blank(old_call):
        calls = read_old_call(old_call, number)
    trained = _is_trained(message, number)
    own_images = [image for key in ("images", "image") for image in read_images(message.pop(key, None))]
    content = message.get("content")
    if is_blank(content) and content != "" and not (calls or own_images):
        raise InputError(f"message {number} of {key!r} has no 'content'; add it, or 'tool_calls'")
    inline: list[Any] = []
    message["content"] = read_content("" if is_blank(content) else content, number, inline)
    if own_images:
        (message,), inline[:] = place_images([message], inline, own_images)
    images += inline
    if calls:
        message["tool_calls"] = calls
    return message, trained


def _from_sharegpt(entry: Message, number: int) -> Message:
    role = SHAREGPT_ROLES.get(entry["from"].lower())
    if role is None:
        known = ", ".join(SHAREGPT_ROLES)
        raise InputError(f"message {number} is from {entry['from']!r}; it must be from one of {known}")
    others = {name: value for name, value in entry.items() if name not in ("from", "value")}
    return others | {"role": role} | ({"content": entry["value"]} if "value" in entry else {})


def _is_trained(message: Message, number: int) -> bool:
    """Remove "weight" and "train" from a message; return whether they say to train on it."""
    weight, train = message.pop("weight", 1), message.pop("train", True)
    if isinstance(weight, bool) or weight not in (0, 1):
        raise InputError(f"the 'weight' of message {number} is {weight!r}; it must be 0 or 1")
    if not isinstance(train, bool):
        raise InputError(f"the 'train' of message {number} is {train!r}; it must be true or false")
    return weight == 1 and train
