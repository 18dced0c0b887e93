"""Assistant turns of a chat as texts: what the model reads before a turn, and what it then has to write."""

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any, NamedTuple

from nalora_mlx.core.errors import InputError, first_line
from nalora_mlx.data.chats.contents import RenderedText, split_reasoning
from nalora_mlx.data.chats.placeholders import ImageTexts, expand_placeholders, image_count
from nalora_mlx.data.chats.text_encoder import TextEncoder
from nalora_mlx.data.rows.formats import Row

Messages = Sequence[dict[str, Any]]
# Stand for contents, to find where a template writes them. No text holds these private characters.
ANSWER, QUESTION = "\ue000answer\ue001", "\ue000question\ue001"


class Turn(NamedTuple):
    """An assistant turn.

    Attributes:
        context: the text that generation starts from: the messages before the turn, and the generation prompt.
        target: the text that the model then has to write, through the end of the turn.
        opened: what the generation prompt ends in and the finished turn does not have, such as "<think>".
    """

    context: str
    target: str
    opened: str = ""


class ChatRenderer:
    """Renders chats with the model's chat template, and finds their assistant turns.

    The messages of a chat are rendered as `generate`, `chat` and `serve` do, so the context of a turn is exactly
    what generation starts from.
    """

    def __init__(self, tokenizer: Any, encoder: TextEncoder, images: ImageTexts | None = None):
        self.tokenizer, self.encoder, self.images = tokenizer, encoder, images
        self._takes_texts = images is None or self._writes_texts()

    def render(self, row: Row, messages: Messages, generation_prompt: bool = False) -> str:
        """Return the text of a chat.

        Raises:
            InputError: the template refuses the chat.
        """
        if not self._takes_texts:
            messages = [_with_parts(message) for message in messages]
        try:
            text: str = self.tokenizer.apply_chat_template(
                list(messages),
                tools=row.tools,
                add_generation_prompt=generation_prompt,
                tokenize=False,
                **row.template_args,
            )
        except Exception as error:
            raise InputError(
                f"{row.source}: the model's chat template refuses this row ({first_line(error)})"
            ) from None
        if row.images and self.images is not None:
            present = row.images[: image_count(messages)]
            text = expand_placeholders(text, self.images, present, row.source)
        return text

    def _writes_texts(self) -> bool:
        """Return whether the template writes a content that is a text; some take lists of parts only."""
        try:
            messages = [{"role": "user", "content": QUESTION}]
            return QUESTION in self.tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception:
            return False

    def in_template_form(self, row: Row) -> Row:
        """Return a row with its tool calls in the form that the template reads.

        Templates take the arguments of calls as objects or as JSON texts, and some write calls only if there is no
        content. Use the first form that is rendered with all calls, or else the first that is rendered.
        """
        if not any(message.get("tool_calls") for message in row.messages):
            return row
        rendered = []
        for with_arguments, with_content in itertools.product(
            (_same, _as_json), (_same, _without_empty_content)
        ):
            messages = [with_content(with_arguments(message)) for message in row.messages]
            if (text := self._try(row, messages)) is None:
                continue
            calls = (call for message in row.messages for call in message.get("tool_calls") or ())
            if all(map(RenderedText(text).holds_call, calls)):
                return replace(row, messages=messages)
            rendered.append(messages)
        return replace(row, messages=rendered[0]) if rendered else row

    def turn(self, row: Row, index: int) -> Turn:
        """Return the assistant turn `index` of a chat.

        1. The context is the rendering of the messages before the turn, with the generation prompt.
        2. The rendering of the messages through the turn ends in the finished turn. If it begins with the context,
           the target is the rest.
        3. Otherwise find where the target starts, see `_diverging_turn`. If the generation prompt has closed a thought
           already, take the turn without its reasoning.
        4. If the template refuses a beginning of the chat, use the shortest longer one that it accepts.
        5. Cut the target after the end of the turn. If the turn has no end token, take the one that the next message
           begins with: some models end their turn by beginning the next one.

        Raises:
            InputError: the template refuses the chat.
        """
        messages = row.messages
        context = self._try(row, messages[:index], generation_prompt=True) if index else None
        end = index + 1
        while (text := self._try(row, messages[:end])) is None and end < len(messages):
            end += 1
        if text is None:
            text = self.render(row, messages)  # raises: the template refuses the whole chat
        later = messages[index + 1 : end]
        reasoning, silent = split_reasoning(messages[index])
        if context is not None and _closes_thought(context, text, reasoning):
            text = self._try(row, [*messages[:index], silent, *later]) or text
        if context is not None and text.startswith(context):
            turn = Turn(context, text[len(context) :])
        else:
            turn = self._diverging_turn(row, index, later, context, text)
        if later:
            turn = turn._replace(target=self._without_later(row, index, later, text, turn.target))
        target = self._through_end(turn.target)
        if not target.endswith(tuple(self.encoder.end_texts)):
            target += self._end_in_next_message(row, index, target)
        return turn._replace(target=target)

    def _diverging_turn(self, row: Row, index: int, later: Messages, context: str | None, text: str) -> Turn:
        """Return a turn whose finished rendering `text` does not begin with its context, if there is a context.

        1. Render the chat with a marker as the answer. The text before it is the header.
        2. Compare what the template writes between the previous message and the answer with what it writes after
           the previous message in the context. The target starts where they differ.
        """
        before, answer = row.messages[:index], {"role": "assistant", "content": ANSWER}
        header, found, _ = (self._try(row, [*before, answer, *later]) or "").partition(ANSWER)
        if not found:
            header = text[: _common_prefix(context or "", text)]
        start = _common_prefix(header, text)
        if context is None:
            return Turn(text[:start], text[start:])
        opened = ""
        if before and found:
            question = [*before[:-1], {**before[-1], "content": QUESTION}]
            written = (self._try(row, [*question, answer, *later]) or "").partition(ANSWER)[0]
            asked = self._try(row, question, generation_prompt=True) or ""
            if QUESTION in written and QUESTION in asked:
                written, asked = written.rpartition(QUESTION)[2], asked.rpartition(QUESTION)[2]
                shared = self._shared_start(written, asked)
                start = min(start, len(header) - len(written) + shared)
                opened = asked[shared:]
        target = text[start:]
        if opened.strip() and target.lstrip().startswith(opened.strip()):
            # The turn opens the same block, with other white space.
            target = target.lstrip().removeprefix(opened.strip())
            target = target.lstrip() if opened[-1].isspace() else target
            opened = ""
        return Turn(context, target, opened.strip())

    def _shared_start(self, a: str, b: str) -> int:
        """Return the length of the common beginning of two texts, cut back to the end of a token or of a word."""
        shared = a[: _common_prefix(a, b)]
        if len(shared) < min(len(a), len(b)):
            *whole, last = self.encoder.split(shared)
            unfinished = re.search(r"\S*$", last)
            shared = "".join(whole) + last[: unfinished.start() if unfinished else None]
        return len(shared)

    def _without_later(self, row: Row, index: int, later: Messages, text: str, target: str) -> str:
        """Cut the messages after a turn off its target."""
        marked = [{**later[0], "content": QUESTION}, *later[1:]]
        before_next, found, _ = (self._try(row, [*row.messages[: index + 1], *marked]) or "").partition(
            QUESTION
        )
        target = target[: max(len(before_next) - (len(text) - len(target)), 0)] if found else target
        ends = [target.find(end) + len(end) for end in self.encoder.end_texts if end in target]
        if not ends:
            raise InputError(
                f"{row.source}: the chat template refuses this chat up to message {index + 1}, and marks no end of "
                "that turn in the whole chat; remove the row, or use another --chat-template"
            )
        return target[: min(ends)]

    def _end_in_next_message(self, row: Row, index: int, target: str) -> str:
        """Return the end token that a message after a turn begins with, and the space before it, if there is one."""
        role = "tool" if row.messages[index].get("tool_calls") else "user"
        following = {**(row.messages[index + 1 : index + 2] or [{"role": role}])[0], "content": QUESTION}
        longer, found, _ = (self._try(row, [*row.messages[: index + 1], following]) or "").partition(QUESTION)
        pieces = self.encoder.split(longer)
        ends = [i for i, piece in enumerate(pieces) if piece in self.encoder.end_texts]
        if not found or not ends:
            return ""
        turn = "".join(pieces[: ends[-1]])
        is_last = turn.rstrip().endswith(self.encoder.split(target.rstrip())[-1].strip())
        space = turn[len(turn.rstrip()) :].removeprefix(target[len(target.rstrip()) :])
        return space + pieces[ends[-1]] if is_last else ""

    def _through_end(self, target: str) -> str:
        """Cut a target after its end-of-turn token: the first one among the control tokens that it ends in.

        Without one, cut what follows the last control token, since it is white space.
        """
        pieces = self.encoder.split(target)
        first = len(pieces)
        while first and (first % 2 == 0 or not pieces[first - 1].strip()):
            first -= 1
        closing = range(first, len(pieces))
        for index in closing:
            if pieces[index] in self.encoder.end_texts:
                return "".join(pieces[: index + 1])
        if any(index % 2 for index in closing):
            return "".join(pieces[:-1])
        return target

    def _try(self, row: Row, messages: Messages, generation_prompt: bool = False) -> str | None:
        """Return the text of a chat, None if the template refuses it."""
        try:
            return self.render(row, messages, generation_prompt)
        except InputError:
            return None


def _closes_thought(context: str, text: str, reasoning: str) -> bool:
    """Return whether a context ends in an empty thought, where a finished turn has reasoning."""
    context, text, reasoning = ("".join(part.split()) for part in (context, text, reasoning))
    before, found, after = text.rpartition(reasoning) if reasoning else ("", "", "")
    return bool(found) and not text.startswith(context) and (before + after).startswith(context)


def _with_parts(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message whose content is a list of parts."""
    content = message.get("content")
    return (
        {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message
    )


def _same(message: dict[str, Any]) -> dict[str, Any]:
    return message


def _as_json(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message with the arguments of its tool calls as JSON texts."""

    def convert(call: dict[str, Any]) -> dict[str, Any]:
        if "function" in call:
            return {**call, "function": convert(call["function"])}
        return {**call, "arguments": json.dumps(call.get("arguments") or {}, ensure_ascii=False)}

    calls = message.get("tool_calls")
    return {**message, "tool_calls": [convert(call) for call in calls]} if calls else message


def _without_empty_content(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message without its content if it has tool calls and the content is empty."""
    is_empty = message.get("tool_calls") and not message.get("content")
    return {key: value for key, value in message.items() if key != "content"} if is_empty else message


def _common_prefix(a: str, b: str) -> int:
    """Return the length of the longest common beginning."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
