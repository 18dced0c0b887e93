"""Tokens that the files of a model declare beside its vocabulary.

transformers, and so mlx-lm, reads them from tokenizer.json (`added_tokens`), tokenizer_config.json
(`added_tokens_decoder` and names such as `eos_token`), special_tokens_map.json and added_tokens.json.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nalora_mlx.core import storage
from nalora_mlx.core.errors import InputError

NAMES = ("bos", "eos", "unk", "pad")
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized")


@dataclass(frozen=True)
class AddedToken:
    """A token that is matched as a whole before text is split into words."""

    content: str
    id: int | None  # None: that of its content in the vocabulary, or the next free one
    special: bool
    flags: frozenset[str]  # of _FLAGS


@dataclass(frozen=True)
class DeclaredTokens:
    """Added tokens, each once, and the texts of the named special tokens."""

    added: list[AddedToken]
    names: dict[str, str]  # bos, eos, unk, pad -> text
    settings: dict[str, Any]  # content of tokenizer_config.json


def read_declared_tokens(model_dir: Path, added_tokens: list[dict[str, Any]]) -> DeclaredTokens:
    """Read the tokens that the files of a model declare.

    Args:
        model_dir: directory of the model.
        added_tokens: those of its tokenizer.json.

    Raises:
        InputError: a file is damaged, or two files contradict each other.
    """
    settings = read_optional_json(model_dir / "tokenizer_config.json")
    special_map = read_optional_json(model_dir / "special_tokens_map.json")
    decoder = settings.get("added_tokens_decoder") or {}
    # transformers reads special_tokens_map.json only without added_tokens_decoder, but then before the config.
    sources = [settings, special_map] if decoder else [special_map, settings]
    names = {}
    for name in NAMES:
        texts = [_content(source.get(f"{name}_token")) for source in sources]
        if found := [text for text in texts if text]:
            names[name] = found[0]
    specials = list(names.values())
    for source in sources:
        for key in ("additional_special_tokens", "extra_special_tokens"):
            values = source.get(key) or []
            specials += [
                _content(value) for value in (values.values() if isinstance(values, dict) else values)
            ]

    declared = [(token["id"], token, "tokenizer.json") for token in added_tokens]
    declared += [(int(i), token, "tokenizer_config.json") for i, token in decoder.items()]
    for text, i in read_optional_json(model_dir / "added_tokens.json").items():
        declared.append((i, {"content": text, "special": text in specials}, "added_tokens.json"))
    added: dict[str, AddedToken] = {}
    problems = []
    for i, token, file in declared:
        content = token["content"]
        known = added.get(content)
        if known is None:
            flags = frozenset(flag for flag in _FLAGS if token.get(flag))
            added[content] = AddedToken(content, i, bool(token.get("special")), flags)
        elif known.id != i:
            problems.append(f"{file} gives token {content!r} the id {i}, another file {known.id}")
    if problems:
        raise InputError(f"{model_dir}: {'; '.join(problems)}; correct the file that is wrong")
    for content in specials:
        added.setdefault(content, AddedToken(content, None, True, frozenset()))
    return DeclaredTokens(list(added.values()), names, settings)


def read_optional_json(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file; an empty dict if there is none."""
    return storage.read_json(path) if path.exists() else {}


def _content(token: Any) -> str:
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else ""
