"""Strict reading of settings: unknown keys, wrong types and invalid YAML are errors, never ignored."""

import difflib
import re
from collections.abc import Collection, Mapping
from dataclasses import fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from nalora_mlx.core.errors import InputError

_TYPE_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    tuple: "a list",
    list: "a list",
    dict: "a mapping",
}
# YAML 1.1 reads 1e-5 as a string. A resolver with this pattern reads it as a number.
_FLOAT = re.compile(r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$")


def nearest(name: str, known: Collection[str]) -> str:
    """Return a suggestion of the known name that is closest to a wrong one, or else a list of all known names."""
    return did_you_mean(name, known) or f"; known names: {', '.join(sorted(known))}"


def did_you_mean(name: str, known: Collection[str]) -> str:
    """Return a suggestion of the known name that is closest to a wrong one; an empty string if none is close."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def reject_unknown(given: Any, known: Collection[str], where: str) -> None:
    """Raise InputError if `given` is not a mapping or has unknown keys."""
    if not isinstance(given, Mapping):
        raise InputError(f"{where} must be a mapping of names to values, not {type(given).__name__}")
    unknown = [f"unknown key {key!r}{nearest(key, known)}" for key in given if key not in known]
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


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file of settings.

    Raises:
        InputError: the file is missing, is not valid YAML, or does not hold a mapping; the message names file and line.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """A class of our own, so that the resolver does not change yaml.SafeLoader for the whole process."""

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"no config file at {path}; check --config") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the config file {path}: {error}") from None
    try:
        content = yaml.load(text, Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise InputError(f"{path}{line}: not valid YAML: {getattr(error, 'problem', error)}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise InputError(f"{path}:1: a config file must hold 'key: value' lines")
    return content
