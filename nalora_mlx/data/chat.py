"""Rows of training data: formats and per-token loss masks.

A row becomes tokens with a mask that says which of them are supervised (predicted and scored). Formats and their
keys are those of mlx_lm.lora: text, prompt/completion, chat messages with tools.
"""

from collections.abc import Callable
from typing import Any

from nalora_mlx.core.errors import InputError, first_line

_TOOLS, _CALLS = "tools", "tool_calls"  # keys of a row and of a message that a chat template may leave out


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
