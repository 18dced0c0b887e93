"""Strict reading of YAML files. Plain values mean what YAML 1.2 says, and a key given twice is an error."""

import re
from pathlib import Path
from typing import Any

from nalora_mlx.core.errors import InputError

# YAML 1.1, which PyYAML reads, takes 010 for 8, 1:30 for 90, 1e-5 for a text and 2024-01-01 for a date. Here, 010 is
# 10, 1e-5 is a number, and the others are texts. Yes, no, on and off stay booleans, as in mlx_lm.lora.
_PATTERNS = {
    "bool": (r"yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF", "yYnNtTfFoO"),
    "int": (r"[-+]?(?:0o[0-7_]+|0x[0-9a-fA-F_]+|0b[01_]+|[0-9][0-9_]*)", "-+0123456789"),
    "float": (
        r"[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "merge": (r"<<", "<"),
}


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file of settings.

    Raises:
        InputError: the file is missing, is not valid YAML, holds a key twice, or does not hold a mapping; the message
            names file and line.
    """
    import yaml

    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"no config file at {path}; check --config") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the config file {path}: {error}") from None
    try:
        content = yaml.load(text, _loader())
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise InputError(f"{path}{line}: not valid YAML: {getattr(error, 'problem', error)}") from None
    except RecursionError:
        raise InputError(f"{path}: not valid YAML: nested too deeply") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise InputError(f"{path}:1: a config file must hold 'key: value' lines")
    return content


def _loader() -> Any:
    """Return a loader class of our own, so that yaml.SafeLoader stays as it is for the rest of the process."""
    import yaml

    class Loader(yaml.SafeLoader):
        """A loader that refuses a key given twice, and reads whole numbers as decimal."""

        def compose_mapping_node(self, anchor: Any) -> Any:
            node = super().compose_mapping_node(anchor)
            lines: dict[tuple[str, str], int] = {}
            for key, _ in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    continue
                if (name := (key.tag, key.value)) in lines:
                    raise yaml.composer.ComposerError(
                        None,
                        None,
                        f"key {key.value!r} is given twice, first in line {lines[name]}",
                        key.start_mark,
                    )
                lines[name] = key.start_mark.line + 1
            return node

        def construct_int(self, node: Any) -> int:
            digits = self.construct_scalar(node).replace("_", "")
            return int(digits, 0 if digits.lstrip("+-")[1:2].isalpha() else 10)

    Loader.yaml_implicit_resolvers = {}
    for kind, (pattern, first) in _PATTERNS.items():
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{kind}", re.compile(f"(?:{pattern})$"), list(first))
    Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_int)
    return Loader
