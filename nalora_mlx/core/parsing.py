"""Strict reading of settings: unknown keys and wrong types are errors, never ignored."""

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from nalora_mlx.core.errors import InputError
from nalora_mlx.core.synonyms import ADVICE, FILE_ONLY, RESULTS, SYNONYMS, VALUE_ADVICE, VALUES

CLOSE = 0.65  # similarity of spelling, from 0 to 1, above which a name is suggested

_TYPE_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    tuple: "a list",
    list: "a list",
    dict: "a mapping",
}


def nearest(name: str, known: Collection[str]) -> str:
    """Return a suggestion of the known name that is spelled most like a wrong one, or else a list of all of them."""
    return did_you_mean(name, known) or _list_of(known)


def did_you_mean(name: str, known: Collection[str]) -> str:
    """Return a suggestion of the known name that is spelled most like a wrong one; an empty string if none is close."""
    close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=CLOSE)
    return f"; did you mean {close[0]!r}?" if close else ""


def meant_name(
    name: str,
    known: Collection[str],
    groups: Mapping[str, str] | None = None,
    aliases: Mapping[str, str] | None = None,
    synonyms: Mapping[str, Sequence[str]] = SYNONYMS,
) -> str:
    """Return a suggestion of the setting, flag or command that a wrong name means; an empty string if there is none.

    Meaning comes before spelling: lora_layers means num_layers, although lora_parameters is spelled more like it. A
    name whose meaning is not among the known ones gets no suggestion by spelling, which would be wrong.

    Args:
        name: the wrong name, or a flag.
        known: the names, or the flags.
        groups: settings that belong under another key -> that key.
        aliases: further names of known ones -> the known ones.
        synonyms: names of other tools -> what they may stand for here.
    """
    plain = _plain(name)
    found = dict(aliases or {}) | {_plain(known_name): known_name for known_name in known}

    def suggestion(word: str) -> str:
        for meant in (word, *synonyms.get(word, ())):
            if meant == "adapter_path" and word in RESULTS and "train" not in found:
                continue  # only training writes there
            if meant in found and found[meant] != name:
                example = f", as in {FILE_ONLY[meant]}" if meant in FILE_ONLY else ""
                return f"; did you mean {found[meant]!r}{example}?"
            if groups and meant in groups:
                return f"; write {meant!r} under {groups[meant]!r}"
            if meant in FILE_ONLY and "config" in found and str(name).startswith("-"):
                return f"; write {FILE_ONLY[meant]} into the file of --config"
        return ""

    advice = f"; {ADVICE[plain]}" if plain in ADVICE else ""
    if direct := suggestion(plain):
        return direct + advice
    if plain in synonyms or advice:
        return advice
    words = [*found, *(word for word in synonyms if suggestion(word))]
    close = difflib.get_close_matches(plain, words, n=1, cutoff=CLOSE)
    return (suggestion(close[0]) if close else "") + advice


def _list_of(known: Collection[str]) -> str:
    return f"; known names: {', '.join(sorted(known))}"


def meant_value(setting: str, value: object, choices: Collection[str]) -> str:
    """Return a suggestion of the choice that a wrong value means; an empty string if there is none."""
    text = str(value).lower()
    known = {**{choice: choice for choice in choices}, **VALUES.get(setting, {})}
    close = difflib.get_close_matches(text, known, n=1, cutoff=CLOSE)
    if not close or known[close[0]] not in choices:
        return ""
    advice = f" {VALUE_ADVICE[text]}" if text in VALUE_ADVICE else ""
    return f"; did you mean {known[close[0]]!r}{advice}?"


def _plain(name: object) -> str:
    return str(name).lower().lstrip("-").replace("-", "_")


def reject_unknown(
    given: Any, known: Collection[str], where: str, groups: Mapping[str, str] | None = None
) -> None:
    """Raise InputError if `given` is not a mapping or has unknown keys; for `groups`, see `meant_name`."""
    if not isinstance(given, Mapping):
        raise InputError(f"{where} must be a mapping of names to values, not {type(given).__name__}")
    unknown = [
        f"unknown key {key!r}{meant_name(key, known, groups) or _list_of(known)}"
        for key in given
        if key not in known
    ]
    if unknown:
        raise InputError(f"{where}: " + "; ".join(unknown))


def parse_size(text: str | int) -> int:
    """Return the number of bytes in 1024, '500MB', '2GB' or '1.5GiB'."""
    if isinstance(text, int):
        return text
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([KMGT]?)(I?)B?\s*", str(text).upper())
    if not match:
        raise InputError(f"{text!r} is not a size; give bytes, or a number with KB, MB or GB")
    number, unit, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index(unit or " "))


def coerce(given: Mapping[str, Any], settings: type, where: str) -> dict[str, Any]:
    """Convert values from YAML, JSON or a command line to the annotated types of a dataclass's fields.

    Raises:
        InputError: lists all values of the wrong type, and the types that their settings take.
    """
    types = get_type_hints(settings)
    sizes = {f.name for f in fields(settings) if f.metadata.get("size")}
    result, wrong = {}, []
    for name, value in given.items():
        try:
            if name in sizes and value is not None:
                value = parse_size(value)
            result[name] = _convert(value, types[name])
        except (TypeError, ValueError, OverflowError) as error:
            detail = f" ({error})" if isinstance(error, InputError) else ""
            wrong.append(f"{name} is {value!r}; it takes {_describe(types[name])}{detail}")
    if wrong:
        raise InputError(f"{where}: " + "; ".join(wrong))
    return result


def base_types(annotation: Any) -> list[Any]:
    """Return the types in a union except None, or the annotation itself if it is not a union."""
    members = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    return [member for member in members if member is not NoneType]


def _describe(annotation: Any) -> str:
    names = [_TYPE_NAMES[get_origin(member) or member] for member in base_types(annotation)]
    return " or ".join(names)


def _convert(value: Any, annotation: Any) -> Any:
    """Convert a value to a type; raise TypeError, ValueError or OverflowError if it does not fit."""
    if isinstance(annotation, UnionType):
        if value is None and NoneType in get_args(annotation):
            return None
        *others, last = base_types(annotation)
        for member in others:
            try:
                return _convert(value, member)
            except (TypeError, ValueError, OverflowError):
                continue
        return _convert(value, last)
    kind = get_origin(annotation) or annotation
    if kind is Any:
        return value
    if kind in (int, float):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError
        if kind is int and value != int(value):
            raise TypeError
        return kind(value)
    if kind in (tuple, list):
        if not isinstance(value, list | tuple):
            raise TypeError
        item = get_args(annotation)[0]
        return kind(_convert(element, item) for element in value)
    if not isinstance(value, Mapping if kind is dict else kind):
        raise TypeError
    return value
