"""Preference rows: two answers to the same prompt, two chats that part, or one answer with a label."""

import re
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from nalora_mlx.core.config_data import DEFAULT_KEYS
from nalora_mlx.core.errors import InputError
from nalora_mlx.data.rows.cells import is_blank, text_in
from nalora_mlx.data.rows.messages import SHAREGPT_KEYS, TEMPLATE_KEYS, Chat, Message, joined, read_turns

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
# Keys of a prompt. A key that the user has named takes the place of all of them.
PROMPT_KEYS = (DEFAULT_KEYS["prompt"], "question", "query", "instruction", *SHAREGPT_KEYS, "input")
_ANSWER_ROLES = ("assistant", "tool", "function", "ipython", "environment")  # of the turns of one answer
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}
_SPEAKER = re.compile(rf"(?:\A\s*|\n\n)({'|'.join(_SPEAKERS)}):")


def read_preference(prompt_key: str, content: Mapping[str, Any]) -> Chat:
    """Return the chat with the chosen answer, and the rejected end of it.

    Raises:
        InputError: the prompt or an answer is missing, or the two cannot be compared.
    """
    for name in (CHOSEN, REJECTED):
        if is_blank(content[name]):
            raise InputError(f"{name!r} is empty; remove the row, or write an answer")
    prompt, chosen, rejected = _parts(content, prompt_key)
    if prompt is not None and not (_is_chat(chosen) or _is_chat(rejected)):
        return _compared(joined(prompt, chosen), joined(prompt, rejected))
    whole = [_is_chat(turns) or len(turns.messages) > 1 for turns in (chosen, rejected)]
    if not any(whole):
        raise InputError(
            f"{CHOSEN!r} and {REJECTED!r} are answers, but there is no {prompt_key!r}; add it, or name its key with "
            "--prompt-key"
        )
    if not all(whole):
        raise InputError(
            f"one of {CHOSEN!r} and {REJECTED!r} is a whole chat and the other an answer; make them alike"
        )
    return _compared(chosen, rejected)


def _parts(content: Mapping[str, Any], prompt_key: str) -> tuple[Chat | None, Chat, Chat]:
    """Return the prompt, if there is one, and both answers or chats. Transcripts become messages."""
    key = _prompt_key(content, prompt_key)
    if key is None and all(chats := [_transcript(content[name]) for name in (CHOSEN, REJECTED)]):
        chosen, rejected = (Chat(messages or []) for messages in chats)
        return None, chosen, rejected
    chosen, rejected = (read_turns(content, name, "assistant", in_cells=True) for name in (CHOSEN, REJECTED))
    if key is None:
        return None, chosen, rejected
    if key == "instruction" and not is_blank(content.get("input")):
        return instruction(content, key, "input"), chosen, rejected
    asked = _transcript(content[key])
    if asked is not None and not asked[-1]["content"]:  # a transcript that the answers continue
        chosen, rejected = _stripped(chosen), _stripped(rejected)
        return Chat(asked[:-1]), chosen, rejected
    return read_turns(content, key, "user", in_cells=True), chosen, rejected


def _compared(chosen: Chat, rejected: Chat) -> Chat:
    """Return the chosen chat with the end of the rejected one, from the first message that differs.

    Raises:
        InputError: they are equal, have no common beginning, or do not part at an answer and end in one.
    """
    pairs = zip(chosen.messages, rejected.messages, strict=False)
    start = sum(1 for _ in takewhile(lambda pair: _rendered(pair[0]) == _rendered(pair[1]), pairs))
    ends = {CHOSEN: chosen.messages[start:], REJECTED: rejected.messages[start:]}
    if not any(ends.values()):
        raise InputError(f"{CHOSEN!r} and {REJECTED!r} are the same; remove the row, or correct one of them")
    if not start:
        raise InputError(
            f"{CHOSEN!r} and {REJECTED!r} begin with different messages; they must be answers to the same prompt"
        )
    if shorter := [name for name, messages in ends.items() if not messages]:
        raise InputError(f"{shorter[0]!r} has no answer of its own; it ends where the other goes on")
    for name, messages in ends.items():
        if messages[0]["role"] != "assistant":
            raise InputError(
                f"{CHOSEN!r} and {REJECTED!r} part at a message of role {messages[0]['role']!r}; they must be answers "
                "to the same prompt"
            )
        _check_end(messages, repr(name))
        _check_not_empty(messages, repr(name))
    if chosen.messages[start - 1]["role"] == "assistant":
        raise InputError(
            f"the prompt of {CHOSEN!r} and {REJECTED!r} ends in an assistant message; it must end in what they answer"
        )
    for name, chat in ((CHOSEN, chosen), (REJECTED, rejected)):
        _check_trained(chat, start, repr(name))
    if any(
        part["type"] == "image"
        for m in ends[REJECTED]
        if isinstance(m["content"], list)
        for part in m["content"]
    ):
        raise InputError(f"{REJECTED!r} holds images, and preference training takes none; remove the row")
    unknown = chosen.unknown_keys | rejected.unknown_keys
    return chosen._replace(rejected=ends[REJECTED], answer_start=start, unknown_keys=unknown)


def labelled_start(chat: Chat) -> int:
    """Return where the answer begins that a label is about: after the last message that is not its own or a tool's.

    Raises:
        InputError: there is no answer, or nothing before it.
    """
    others = [i for i, message in enumerate(chat.messages) if message["role"] not in _ANSWER_ROLES]
    start = others[-1] + 1 if others else 0
    _check_end(chat.messages, "the chat")
    _check_not_empty(chat.messages[start:], "the answer")
    if not start:
        raise InputError("has an answer with a label, and no prompt before it; add the prompt")
    _check_trained(chat, start, "the answer")
    return start


def _check_end(messages: Sequence[Message], what: str) -> None:
    """Raise InputError unless messages end in one of the assistant."""
    if messages[-1]["role"] != "assistant":
        raise InputError(
            f"{what} ends in a message of role {messages[-1]['role']!r}; it must end in an assistant message"
        )


def _check_not_empty(messages: Sequence[Message], what: str) -> None:
    """Raise InputError if the assistant says nothing."""
    if not any(m["role"] == "assistant" and (_has_text(m) or m.get("tool_calls")) for m in messages):
        raise InputError(f"{what} is empty; remove the row, or write an answer")


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
    """Return how to train on the chosen answers of rows like this one, as the end of a sentence."""
    key = _prompt_key(content, prompt_key)
    if key is None and _transcript(content[CHOSEN]):
        return f", --text-key {CHOSEN} on the chosen texts"
    if _is_chat(read_turns(content, CHOSEN, "assistant", in_cells=True)):
        return f", --chat-key {CHOSEN} on the chosen answers"
    if key in SHAREGPT_KEYS:
        return "; to train on the chosen answers, put them at the end of the chats"
    flag = "" if key == prompt_key else f"--prompt-key {key} "
    return f", {flag}--completion-key {CHOSEN} on the chosen answers"


def _prompt_key(content: Mapping[str, Any], configured: str) -> str | None:
    """Return the key of the prompt that a row has; only the configured one, if it is not the usual one."""
    keys = PROMPT_KEYS if configured == PROMPT_KEYS[0] else (configured,)
    return next((key for key in keys if not is_blank(content.get(key))), None)


def _is_chat(turns: Chat) -> bool:
    return turns.messages[0]["role"] != "assistant"


def _rendered(message: Message) -> Message:
    """Return what chat templates read of a message."""
    return {key: value for key, value in message.items() if key in TEMPLATE_KEYS}


def _has_text(message: Message) -> bool:
    content = message.get("content")
    return bool(content.strip() if isinstance(content, str) else content)


def _check_trained(chat: Chat, start: int, what: str) -> None:
    """Raise InputError if an answer has turns that are not to be trained on."""
    if untrained := [index for index in chat.untrained if index >= start]:
        raise InputError(
            f"message {min(untrained) + 1} has 'weight' 0 or 'train' false, but preference training compares all turns "
            f"of {what}; remove the key"
        )


def _transcript(text: Any) -> list[Message] | None:
    """Return the messages of a text like "\\n\\nHuman: ...\\n\\nAssistant: ..."; None if it is none.

    Turns of the same speaker become one message.
    """
    if not isinstance(text, str):
        return None
    before, *pieces = _SPEAKER.split(text)
    if before.strip() or len(pieces) < 4 or pieces[0] != "Human":
        return None
    messages: list[Message] = []
    for speaker, said in zip(pieces[::2], pieces[1::2], strict=True):
        role, content = _SPEAKERS[speaker], said.strip()
        if messages and messages[-1]["role"] == role:
            content = "\n\n".join(filter(None, (messages.pop()["content"], content)))
        messages.append({"role": role, "content": content})
    return messages


def _stripped(turns: Chat) -> Chat:
    """Return an answer that is a text without the blanks around it."""
    return turns._replace(
        messages=[
            m | {"content": m["content"].strip()} if isinstance(m["content"], str) else m
            for m in turns.messages
        ]
    )


def instruction(content: Mapping[str, Any], key: str, context_key: str) -> Chat:
    """Return a user message with an instruction, followed by its input if there is one."""
    parts = [text_in(content, name) for name in (key, context_key) if not is_blank(content.get(name))]
    texts = [part for part in parts if part.strip()] or [""]
    return Chat([{"role": "user", "content": "\n\n".join(texts)}])
