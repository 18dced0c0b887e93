"""Arguments of chat templates, such as enable_thinking: read from JSON, and checked."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from nalora_mlx.core.errors import InputError

# Names that transformers' apply_chat_template takes itself, or sets for the template.
RESERVED = frozenset(
    {
        *("add_generation_prompt", "chat_template", "continue_final_message", "conversation", "max_length"),
        *("messages", "padding", "return_assistant_tokens_mask", "return_dict", "return_tensors"),
        *("sanitize_control_tokens", "self", "tokenize", "tokenizer_kwargs", "tools", "truncation"),
    }
)
EXAMPLE = '{"enable_thinking": false}'


def parse_template_args(text: str) -> dict[str, Any]:
    """Return the arguments in a JSON text.

    Raises:
        InputError: it is not a JSON object, or the arguments are invalid.
    """
    try:
        args = json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=_reject_constant)
    except (ValueError, RecursionError) as error:
        raise InputError(f"not valid JSON ({error}); it takes an object such as {EXAMPLE}") from None
    if problems := template_args_problems(args):
        raise InputError("; ".join(problems))
    return dict(args)


def _without_duplicates(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise ValueError(f"{twice[0]!r} is given twice")
    return dict(pairs)


def _reject_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def template_args_problems(args: Any) -> list[str]:
    """Return why values cannot be arguments of a chat template, one sentence each."""
    if not isinstance(args, Mapping):
        return [f"{args!r} is not an object of names and values such as {EXAMPLE}"]
    found = []
    for name, value in args.items():
        if not isinstance(name, str):
            found.append(f"{name!r} is not a name; write it in quotes")
        elif name in RESERVED:
            found.append(f"{name} cannot be given, because rendering sets it; remove it")
        elif not _is_json(value):
            found.append(f"{name} is {value!r}, which JSON cannot hold; write it in quotes")
    return found


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return False
    return True
