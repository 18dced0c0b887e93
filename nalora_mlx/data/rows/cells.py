"""Values of a row: blank ones, JSON in the cells of a table, and strings that are not Unicode."""

import json
from typing import Any

from nalora_mlx.core.errors import InputError

_SURROGATE = "half of a surrogate pair, which is not a character; fix the escapes (\\ud83d ...)"
_CONTAINERS = (str, list, dict)


def is_blank(value: Any) -> bool:
    """Return whether a value stands for nothing: null, or an empty string, list or object, as tables hold them."""
    return value is None or (isinstance(value, _CONTAINERS) and not value)


def parsed_cell(value: Any) -> Any:
    """Return the list or object in a string of JSON, as a .csv cell holds it; any other value as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            pass
    return value


def text_in(content: Any, key: str) -> str:
    """Return the string under a key.

    Raises:
        InputError: it is no string, or is not Unicode.
    """
    text = content[key]
    if type(text) is not str:
        raise InputError(f"{key!r} must be a string, not {type(text).__name__}")
    if not text.isascii():
        check_unicode(text, repr(key))
    return text


def check_unicode(value: Any, what: str) -> None:
    """Raise InputError unless all strings in a value can be encoded. JSON escapes may leave half a surrogate pair."""
    if isinstance(value, str):
        try:
            value.isascii() or value.encode()
        except UnicodeEncodeError:
            raise InputError(f"{what} holds {_SURROGATE}") from None
    elif isinstance(value, dict):
        for key, item in value.items():
            check_unicode(key, what)
            check_unicode(item, what)
    elif isinstance(value, list):
        for item in value:
            check_unicode(item, what)
