"""Whether a value is valid by a JSON schema in a file."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nalora_mlx.core.errors import InputError, first_line


def load_schema(path: Path) -> Callable[[Any], bool]:
    """Return a function that says whether a value is valid by a JSON schema.

    The key "$schema" chooses the draft, 2020-12 without it. "format" is not checked, as the drafts propose. References
    lead to other places of the same file or to the drafts themselves; nothing is loaded from elsewhere.

    Args:
        path: a file with a JSON schema.

    Raises:
        InputError: the file cannot be read or is no valid schema, it refers to something outside, or the package
            jsonschema is missing.
    """
    try:
        from jsonschema import SchemaError
        from jsonschema.validators import Draft202012Validator, validator_for
        from jsonschema_specifications import REGISTRY
        from referencing.exceptions import Unresolvable
        from referencing.jsonschema import specification_with
    except ImportError:
        from nalora_mlx.core.optional_dependencies import install_command

        raise InputError(f"checking a JSON schema needs jsonschema; {install_command('eval')}") from None
    schema = _read(path)
    draft = Draft202012Validator
    if isinstance(schema, dict) and "$schema" in schema:
        draft = validator_for(schema, default=None) if isinstance(schema["$schema"], str) else None
        if draft is None:
            raise InputError(f"{path}: $schema is {schema['$schema']!r}, which is no draft of JSON Schema")
    try:
        draft.check_schema(schema)
        root = specification_with(draft.META_SCHEMA["$schema"]).create_resource(schema)
        _resolve_references(root, REGISTRY.resolver_with_root(root))
        validator = draft(schema, registry=REGISTRY)
    except SchemaError as error:
        place = "/".join(map(str, error.absolute_path))
        where = f" at {place}" if place else ""
        raise InputError(f"{path}: no valid JSON schema{where}: {first_line(error)}") from None
    except Unresolvable as error:
        raise InputError(
            f"{path}: refers to {error.ref!r}, which is not in this file; put it there, under $defs"
        ) from None

    def is_valid(value: Any) -> bool:
        try:
            return validator.is_valid(value)
        except RecursionError:
            raise InputError(f"{path}: a reference leads back to itself without end") from None

    return is_valid


def _read(path: Path) -> Any:
    try:
        schema = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read as a JSON schema ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({first_line(error)}); give a file with a JSON schema") from None
    if not isinstance(schema, dict | bool):
        raise InputError(f"{path}: a JSON schema is an object, not {type(schema).__name__}")
    return schema


def _resolve_references(resource: Any, resolver: Any) -> None:
    """Look up every reference in a schema; raise Unresolvable for the first that leads nowhere."""
    if isinstance(resource.contents, dict):
        for key in ("$ref", "$dynamicRef"):
            if isinstance(reference := resource.contents.get(key), str):
                resolver.lookup(reference)
    for part in resource.subresources():
        _resolve_references(part, resolver.in_subresource(part))
