"""Strict reading of settings: unknown keys and wrong types are errors, never ignored."""

import difflib
import re
from collections.abc import Collection, Mapping
from dataclasses import fields
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from nalora_mlx.core.errors import InputError
from nalora_mlx.core.synonyms import ADVICE, FILE_ONLY, SYNONYMS

_TYPE_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    tuple: "a list",
    list: "a list",
    dict: "a mapping",
}


def nearest(name: str, known: Collection[str], groups: Mapping[str, str] | None = None) -> str:
    """Return a suggestion of the known name that is closest to a wrong one, or else a list of all known names."""
    return did_you_mean(name, known, groups) or f"; known names: {', '.join(sorted(known))}"


def did_you_mean(name: str, known: Collection[str], groups: Mapping[str, str] | None = None) -> str:
    """Return a suggestion of the known name that is closest to a wrong one; an empty string if none is close.

    Names of other tools come first, see `synonyms`: of lora_layers, num_layers is closer in meaning than
    lora_parameters.

    Args:
        name: the wrong name, or a flag.
        known: the names, or the flags.
        groups: settings that belong under another key -> that key.
    """
    plain = str(name).lower().lstrip("-").replace("-", "_")
    meant = SYNONYMS.get(plain, plain)
    found = {known_name.lstrip("-").replace("-", "_"): known_name for known_name in known}
    advice = f"; {ADVICE[plain]}" if plain in ADVICE else ""
    if meant in found and meant != name:
        example = f", as in {FILE_ONLY[meant]}" if meant in FILE_ONLY else ""
        return f"; did you mean {found[meant]!r}{example}?{advice}"
    if groups and meant in groups:
        return f"; write {meant!r} under {groups[meant]!r}{advice}"
    if meant in FILE_ONLY and str(name).startswith("--"):
        return f"; write {FILE_ONLY[meant]} into the file of --config"
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return (f"; did you mean {close[0]!r}?" if close else "") + advice


def reject_unknown(
    given: Any, known: Collection[str], where: str, groups: Mapping[str, str] | None = None
) -> None:
    """Raise InputError if `given` is not a mapping or has unknown keys; for `groups`, see `did_you_mean`."""
    if not isinstance(given, Mapping):
        raise InputError(f"{where} must be a mapping of names to values, not {type(given).__name__}")
    unknown = [f"unknown key {key!r}{nearest(key, known, groups)}" for key in given if key not in known]
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
