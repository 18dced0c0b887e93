"""Contents of messages, and whether a rendered chat holds them."""

import json
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")  # the first one that a message has counts
_THOUGHT = re.compile(r"\s*<think>(.*?)</think>\s*(.*)", re.DOTALL)


def split_reasoning(message: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the reasoning of a message, and the message without it.

    Reasoning has a key of its own, or stands before the content as <think>...</think>.
    """
    reasoning = next(filter(None, map(message.get, REASONING_KEYS)), "")
    rest = {key: value for key, value in message.items() if key not in REASONING_KEYS}
    content = message.get("content")
    if isinstance(content, str) and (thought := _THOUGHT.fullmatch(content)):
        reasoning, rest["content"] = reasoning or thought[1], thought[2]
    return reasoning, rest


class RenderedText:
    """A rendered chat."""

    def __init__(self, text: str):
        self.text = text

    @cached_property
    def _without_space(self) -> str:
        return "".join(self.text.split())

    def holds(self, content: Any) -> bool:
        """Return whether all texts and numbers in a content are in the text.

        They may be trimmed, escaped as in JSON, or have other white space.
        """
        return all(
            leaf.strip() in self.text
            or "".join(leaf.split()) in self._without_space
            or json.dumps(leaf, ensure_ascii=False)[1:-1] in self.text
            or json.dumps(leaf)[1:-1] in self.text
            for leaf in _leaves(content)
        )

    def holds_call(self, call: Mapping[str, Any]) -> bool:
        """Return whether the name and the arguments of a tool call are in the text.

        Arguments that a template wrote as a Python object do not count.
        """
        function = call.get("function", call)
        name, arguments = function.get("name"), function.get("arguments")
        if isinstance(arguments, dict) and arguments and repr(arguments) in self.text:
            return False
        return self.holds([name, arguments])


def _leaves(value: Any) -> Iterator[str]:
    """Yield the texts and numbers in nested lists and objects; of objects, only the values."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, str | int | float) and not isinstance(value, bool):
        yield str(value)
