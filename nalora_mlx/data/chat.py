"""Chats as tokens: rendered by the model's chat template, with a loss mask over the assistant turns."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from nalora_mlx.core.errors import InputError, first_line
from nalora_mlx.data.findings import Finding
from nalora_mlx.data.formats import Row

Messages = list[dict[str, Any]]


class Encoding(NamedTuple):
    """The tokens of a row.

    Attributes:
        tokens: token ids.
        loss_mask: whether each token is supervised.
        rewritten: whether the chat template renders earlier turns differently once later turns follow.
    """

    tokens: list[int]
    loss_mask: list[bool]
    rewritten: bool = False


class _Turn(NamedTuple):
    """The tokens [start, end) of an assistant turn, and whether the chat up to `end` is rendered as it was."""

    start: int
    end: int
    unchanged: bool


def encode_chat(row: Row, tokenizer: Any, mask_prompt: bool) -> Encoding:
    """Render a chat; with `mask_prompt`, supervise the assistant turns only.

    The loss mask:

    1. Render the whole chat.
    2. Find each assistant turn in it, see `_find_turn`.
    3. Supervise every turn found. If the template rewrites earlier turns (for example, drops their reasoning), only
       the last turn is rendered as the model would write it, so supervise that one alone.

    Raises:
        InputError: the model has no chat template, or the template rejects the chat.
    """
    if not getattr(tokenizer, "has_chat_template", True):
        raise InputError(
            f"{row.source}: the model has no chat template; use 'text' rows or an instruct model"
        )
    tokens = _render(row, row.messages, tokenizer)
    if not mask_prompt:
        return Encoding(tokens, [True] * len(tokens))
    turns = [
        _find_turn(row, index, tokens, tokenizer)
        for index, message in enumerate(row.messages)
        if message["role"] == "assistant"
    ]
    rewritten = not all(turn.unchanged for turn in turns)
    loss_mask = [False] * len(tokens)
    for turn in turns[-1:] if rewritten else turns:
        loss_mask[turn.start : turn.end] = [True] * (turn.end - turn.start)
    return Encoding(tokens, loss_mask, rewritten)


def _find_turn(row: Row, index: int, tokens: list[int], tokenizer: Any) -> _Turn:
    """Find the assistant turn `index` in the tokens of the whole chat.

    1. Render three beginnings of the chat: the history before the turn, the prompt (the history and the generation
       prompt), and the chat through the turn.
    2. The turn starts where the prompt ends or departs from the whole chat. Some templates open a thought in the
       generation prompt that the finished turn does not have.
    3. It ends where the chat through the turn ends or departs from the whole chat.
    4. If the prompt departs within the history, or the end would be before the start, the template has changed the
       beginning, and the lengths of these renderings are the best estimate.
    """
    messages = row.messages
    history = _render(row, messages[:index], tokenizer) if index else []
    prompt = _render(row, messages[:index], tokenizer, generation_prompt=True) if index else []
    last = index == len(messages) - 1
    through = tokens if last else _render(row, messages[: index + 1], tokenizer)
    unchanged = tokens[: len(history)] == history and tokens[: len(through)] == through
    start, end = _common_prefix(prompt, tokens), _common_prefix(through, tokens)
    if start < len(history):
        start = min(len(prompt), len(tokens))
    if end < start:
        end = min(len(through), len(tokens))
    return _Turn(start, max(start, end), unchanged)


def _render(row: Row, messages: Messages, tokenizer: Any, generation_prompt: bool = False) -> list[int]:
    try:
        return _apply_template(tokenizer, messages, row.tools, generation_prompt)
    except Exception as error:
        raise InputError(
            f"{row.source}: the model's chat template refuses this row ({first_line(error)})"
        ) from None


def _apply_template(
    tokenizer: Any, messages: Messages, tools: Any, generation_prompt: bool = False
) -> list[int]:
    return list(
        tokenizer.apply_chat_template(
            messages, tools=tools, add_generation_prompt=generation_prompt, return_dict=False
        )
    )


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the length of the longest common prefix."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


class TemplateCheck:
    """Finds tools and tool calls that a chat template ignores, by rendering a chat with and without them.

    A template may render tools only if there is a system message, for example. Chats with the same roles are assumed
    to be rendered alike, so only the first of them is checked.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._ignored: dict[tuple[Finding, bool, frozenset[str]], bool] = {}

    def ignored_parts(self, row: Row) -> list[Finding]:
        """Return which parts of a chat the template ignores. The template must have accepted the chat."""
        messages, tools = row.messages, row.tools
        without: dict[Finding, tuple[Messages, Any]] = {}
        if messages and tools:
            without[Finding.IGNORED_TOOLS] = messages, None
        if any(message.get("tool_calls") for message in messages):
            bare = [{k: v for k, v in message.items() if k != "tool_calls"} for message in messages]
            without[Finding.IGNORED_TOOL_CALLS] = bare, tools
        roles = frozenset(message["role"] for message in messages)
        ignored = []
        for part, (other_messages, other_tools) in without.items():
            key = part, bool(tools), roles
            if key not in self._ignored:
                self._ignored[key] = self._same(row, other_messages, other_tools)
            if self._ignored[key]:
                ignored.append(part)
        return ignored

    def _same(self, row: Row, messages: Messages, tools: Any) -> bool:
        """Return whether other messages and tools render as the row does."""
        rendered = _apply_template(self._tokenizer, row.messages, row.tools)
        try:
            return rendered == _apply_template(self._tokenizer, messages, tools)
        except Exception:  # the template needs the part, so it does not ignore it
            return False
