"""llama.cpp's names for the pre-tokenizers of byte-level BPE, one table row each.

A pre-tokenizer splits text into words by regular expressions. GGUF stores only its name (`tokenizer.ggml.pre`), so
tokenizer.json has to be recognized by its expressions; unknown ones are rejected.
tests/interop/test_gguf_tokenizer.py compares the tokens of every row with those of llama.cpp.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nalora_mlx.core.errors import InputError

_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_REST_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LOWER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_UPPER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
LLAMA3 = rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
GPT4 = (  # splits as LLAMA3 does
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|"
    r"\s+(?!\S)|\s+"
)
QWEN2 = rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
TEKKEN = rf"{_LOWER}|{_UPPER}|\p{{N}}|{_REST_SLASH}"
GPT4O = rf"{_LOWER}{_ENGLISH}?|{_UPPER}{_ENGLISH}?|\p{{N}}{{1,3}}|{_REST_SLASH}"
BYTE_LEVEL = "ByteLevel"  # stands for GPT-2's regex, which is built into the ByteLevel pre-tokenizer
DIGITS = r"\p{N}"
_CASE_NOTE = "llama.cpp may split words with non-ASCII upper case or combining marks differently"


@dataclass(frozen=True)
class PreTokenizer:
    """A pre-tokenizer that llama.cpp knows."""

    name: str  # in llama.cpp
    patterns: tuple[str, ...]  # applied one after another
    ignore_merges: bool = False  # keep a word whole if it is a token
    note: str = ""  # how llama.cpp differs


PRE_TOKENIZERS = (
    PreTokenizer("gpt-2", (BYTE_LEVEL,)),
    PreTokenizer("smollm", (DIGITS, BYTE_LEVEL)),  # also starcoder, granite, command-r
    PreTokenizer("llama-bpe", (LLAMA3,), ignore_merges=True),
    PreTokenizer("dbrx", (LLAMA3,)),  # also glm4, olmo2
    PreTokenizer("dbrx", (GPT4,)),
    PreTokenizer("qwen2", (QWEN2,)),
    PreTokenizer("tekken", (TEKKEN,), ignore_merges=True, note=_CASE_NOTE),
    PreTokenizer("gpt-4o", (GPT4O,), note=_CASE_NOTE),
)
# Other names of llama.cpp for the same splits.
ALIASES = {"smollm": {"starcoder", "refact", "command-r"}, "dbrx": {"chatglm-bpe", "glm4", "smaug-bpe"}}
# Names accepted from `gguf_tokenizer_pre`, which models converted from GGUF have.
KNOWN_NAMES = {
    "deepseek-coder",
    "deepseek-llm",
    "deepseek-v3",
    "falcon",
    "mpt",
    "olmo",
    "qwen35",
    "stablelm2",
}.union((row.name for row in PRE_TOKENIZERS), *ALIASES.values())


def unsupported_tokenizer(path: Path, reason: str) -> InputError:
    """Return the error for a tokenizer that llama.cpp does not have; it lists those that are supported."""
    known = ", ".join(sorted({row.name for row in PRE_TOKENIZERS}))
    return InputError(
        f"{path}: {reason}; supported are byte-level BPE with the pre-tokenizers {known}, and SentencePiece BPE"
    )


def flatten_steps(step: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """Return the steps of a normalizer, pre-tokenizer or post-processor, with sequences (under `key`) flattened."""
    if not step:
        return []
    if step["type"] == "Sequence":
        return [flat for inner in step[key] for flat in flatten_steps(inner, key)]
    return [step]


def identify_pretokenizer(
    path: Path, tokenizer: dict[str, Any], given_name: str | None
) -> tuple[str, list[str]]:
    """Return llama.cpp's name for the pre-tokenizer of a tokenizer.json, and notes for the user.

    Args:
        path: the file, for messages.
        tokenizer: its content.
        given_name: `gguf_tokenizer_pre` of the model, used if the regular expressions are unknown.

    Raises:
        InputError: both are unknown, or the normalizer is unsupported.
    """
    notes = []
    for step in flatten_steps(tokenizer.get("normalizer"), "normalizers"):
        if step["type"] not in ("NFC", "NFD", "NFKC", "NFKD"):
            raise unsupported_tokenizer(path, f"has a normalizer {step['type']}, which llama.cpp lacks")
        notes.append(
            f"mlx-lm normalizes text to Unicode {step['type']} and llama.cpp does not, so text in another form, "
            "which is rare, gets different tokens there; nothing to do"
        )
    row = _find_row(tokenizer)
    if row is None:
        if given_name is None or given_name not in KNOWN_NAMES:
            found = json.dumps(tokenizer.get("pre_tokenizer"), ensure_ascii=False)
            raise unsupported_tokenizer(path, f"has an unknown pre-tokenizer: {found}")
        return given_name, [*notes, f"the pre-tokenizer is taken from gguf_tokenizer_pre: {given_name}"]
    if given_name and given_name != row.name and given_name not in ALIASES.get(row.name, ()):
        notes.append(
            f"the pre-tokenizer is taken from tokenizer.json ({row.name}), as in mlx-lm, and not from "
            f"gguf_tokenizer_pre ({given_name}); nothing to do"
        )
    return row.name, notes + [row.note] * bool(row.note)


def _find_row(tokenizer: dict[str, Any]) -> PreTokenizer | None:
    patterns = _split_patterns(flatten_steps(tokenizer.get("pre_tokenizer"), "pretokenizers"))
    rows = [row for row in PRE_TOKENIZERS if row.patterns == patterns]
    ignore_merges = bool(tokenizer["model"].get("ignore_merges"))
    exact = [row for row in rows if row.ignore_merges == ignore_merges]
    if exact or not rows:
        return exact[0] if exact else None
    return rows[0] if _merges_reach_every_token(tokenizer) else None


def _split_patterns(steps: list[dict[str, Any]]) -> tuple[str, ...] | None:
    """Return the regular expressions that split the text, in order; None if a step is of an unknown kind."""
    patterns: list[str] = []
    for step in steps:
        kind = step["type"]
        if kind == "ByteLevel" and not step.get("add_prefix_space", True):
            patterns += [BYTE_LEVEL] if step.get("use_regex", True) else []
        elif kind == "Digits":
            patterns.append(DIGITS if step.get("individual_digits") else rf"{DIGITS}+")
        elif kind == "Split" and (step["behavior"], step["invert"]) in (
            ("Isolated", False),
            ("Removed", True),
        ):
            patterns.append(step["pattern"].get("Regex", ""))
        else:
            return None
    return tuple(patterns)


def _merges_reach_every_token(tokenizer: dict[str, Any]) -> bool:
    """Return whether BPE alone makes each token from its own text, so that ignore_merges has no effect."""
    from tokenizers import Tokenizer

    model = {**tokenizer["model"], "ignore_merges": False}
    bpe = Tokenizer.from_str(json.dumps({**tokenizer, "model": model})).model
    added = {token["content"] for token in tokenizer.get("added_tokens") or []}
    return all(len(bpe.tokenize(token)) == 1 for token in model["vocab"] if token not in added)
