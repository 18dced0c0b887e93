"""Tools and tool calls in the shape that chat templates read, from the other shapes that data has them in."""

import json
from typing import Any

from nalora_mlx.core.errors import InputError
from nalora_mlx.data.rows.cells import check_unicode, is_blank, parsed_cell


def read_tools(value: Any, key: str) -> list[dict[str, Any]] | None:
    """Return the tools of a row; None if there are none. "functions", the old key of OpenAI, holds bare functions.

    Raises:
        InputError: they are not a list of objects.
    """
    tools = parsed_cell(value)
    if is_blank(tools):
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise InputError(f"{key!r} must be a list of objects")
    check_unicode(tools, repr(key))
    if key == "functions":
        return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
    return tools


def read_calls(value: Any, number: int) -> list[dict[str, Any]]:
    """Return the tool calls of a message, with the arguments as objects.

    Raises:
        InputError: they are not a list of objects, or arguments are a string that holds no JSON object.
    """
    calls = parsed_cell(value)
    if is_blank(calls):
        return []
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise InputError(f"the 'tool_calls' of message {number} must be a list of objects")
    return [_with_parsed_arguments(call, number) for call in calls]


def read_old_call(value: Any, number: int) -> list[dict[str, Any]]:
    """Return the "function_call" of a message as tool calls: an object, or JSON of one or of a list of them.

    Raises:
        InputError: it is something else.
    """
    call = parsed_cell(value)
    calls = [call] if isinstance(call, dict) else call
    if not isinstance(calls, list) or not calls or not all(_is_call(item) for item in calls):
        raise InputError(
            f"the function call of message {number} must be an object (or JSON of one) with 'name' and 'arguments'"
        )
    return read_calls([{"type": "function", "function": item} for item in calls], number)


def _is_call(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("name"), str)


def _with_parsed_arguments(call: dict[str, Any], number: int) -> dict[str, Any]:
    function = call.get("function", call)
    if not isinstance(function, dict):
        raise InputError(f"a 'function' in the 'tool_calls' of message {number} must be an object")
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        return call
    try:
        parsed = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        raise InputError(
            f"the 'arguments' of a tool call in message {number} must be an object, or a string that holds one as JSON"
        )
    function = function | {"arguments": parsed}
    return call | {"function": function} if "function" in call else function
