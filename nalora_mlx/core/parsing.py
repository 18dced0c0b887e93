"""Strict reading of settings: unknown keys, wrong types and bad YAML are each named, none is passed over."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from nalora_mlx.core.errors import InputError


def nearest(name: str, known: Any) -> str:
    """Say which known name is meant, or list them: '; did you mean ...?'."""
    return did_you_mean(name, known) or f"; known are {', '.join(sorted(known))}"


def did_you_mean(name: str, known: Any) -> str:
    """Say which known name is close to a wrong one; nothing if none is."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def reject_unknown(given: Any, known: Any, where: str) -> None:
    """Raise InputError naming each unknown key and its nearest known one."""
    if not isinstance(given, Mapping):
        raise InputError(f"{where} must be a mapping of names to values, not {type(given).__name__}")
    unknown = [f"unknown key {key!r}{nearest(key, known)}" for key in given if key not in known]
    if unknown:
        raise InputError(f"{where}: " + "; ".join(unknown))


def parse_size(text: str | int) -> int:
    """Bytes from 1024, '500MB', '2GB' or '1.5GiB'."""
    if isinstance(text, int):
        return text
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([KMGT]?)(I?)B?\s*", str(text).upper())
    if not match:
        raise InputError(f"{text!r} is no size; write bytes or a number with KB, MB, GB")
    number, unit, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index(unit or " "))


def coerce(given: Mapping[str, Any], settings: type, where: str) -> dict[str, Any]:
    """Turn what YAML or a command line gave into the declared types.

    Raises:
        InputError: lists every value that does not fit, with its name and the type wanted.
    """
    declared = {f.name: f for f in fields(settings)}
    result, wrong = {}, []
    for name, value in given.items():
        try:
            result[name] = _coerce(value, str(declared[name].type), bool(declared[name].metadata.get("size")))
        except (TypeError, ValueError, OverflowError) as error:
            detail = f" ({error})" if isinstance(error, InputError) else ""
            wrong.append(f"{name} is {value!r}; it takes {_type_name(str(declared[name].type))}{detail}")
    if wrong:
        raise InputError(f"{where}: " + "; ".join(wrong))
    return result


def _type_name(declared: str) -> str:
    base = declared.removesuffix(" | None")
    names = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text"}
    return names.get(base, "a list" if base.startswith("tuple") else "a mapping")


def _coerce(value: Any, declared: str, size: bool) -> Any:
    if declared.endswith("| None"):
        if value is None:
            return None
        declared = declared.removesuffix(" | None")
    if size:
        return parse_size(value)
    if declared == "bool":
        if not isinstance(value, bool):
            raise TypeError
        return value
    if declared in ("int", "float"):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError
        if declared == "int" and value != int(value):
            raise TypeError
        return int(value) if declared == "int" else float(value)
    if declared == "str":
        if not isinstance(value, str):
            raise TypeError
        return value
    if declared.startswith("tuple"):
        if isinstance(value, str) or not isinstance(value, list | tuple):
            raise TypeError
        item = declared.removeprefix("tuple[").split(",")[0]
        return tuple(_coerce(v, item, False) for v in value)
    if not isinstance(value, Mapping) and not ("list" in declared and isinstance(value, list)):
        raise TypeError
    return value


# YAML 1.1 reads 1e-5 as a text; this resolver makes it the number that a person means.
_FLOAT = re.compile(r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$")


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file of settings as written, in a loader of our own.

    Raises:
        InputError: the file is missing, no YAML, or not a mapping; the message has file and line.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """A safe loader whose extra resolver does not leak into the process."""

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
