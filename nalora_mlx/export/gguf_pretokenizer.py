"""The name by which llama.cpp knows how a byte-level BPE cuts text into words: one row a way of cutting.

GGUF holds that name (`tokenizer.ggml.pre`) and no regex, so a tokenizer.json has to be recognized by its regexes;
what is not recognized is refused. Every row is held to llama.cpp by tests/interop/test_gguf_tokenizer.py.
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
GPT4 = (  # the cuts of LLAMA3, written another way
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|"
    r"\s+(?!\S)|\s+"
)
QWEN2 = rf"{_ENGLISH}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
TEKKEN = rf"{_LOWER}|{_UPPER}|\p{{N}}|{_REST_SLASH}"
GPT4O = rf"{_LOWER}{_ENGLISH}?|{_UPPER}{_ENGLISH}?|\p{{N}}{{1,3}}|{_REST_SLASH}"
BYTE_LEVEL = "ByteLevel"  # GPT-2's regex, which the ByteLevel pre-tokenizer has built in
DIGITS = r"\p{N}"
_CASE_NOTE = (
    "llama.cpp knows no upper case and no combining marks beyond ASCII here: such words may split differently"
)


@dataclass(frozen=True)
class PreTokenizer:
    """One way of cutting: llama.cpp's name, the regexes that cut one after another, and what is not the same."""

    name: str
    cuts: tuple[str, ...]
    ignore_merges: bool = False  # a word that is a token stays whole
    note: str = ""


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
# llama.cpp's names that stand for the same cuts, and those of ways that are not in the table: a model that was
# converted from GGUF carries its name as `gguf_tokenizer_pre`.
SAME = {"smollm": {"starcoder", "refact", "command-r"}, "dbrx": {"chatglm-bpe", "glm4", "smaug-bpe"}}
TAGS = {
    "deepseek-coder",
    "deepseek-llm",
    "deepseek-v3",
    "falcon",
    "mpt",
    "olmo",
    "qwen35",
    "stablelm2",
}.union((row.name for row in PRE_TOKENIZERS), *SAME.values())


def refuse(path: Path, what: str) -> InputError:
    """Return the error for a tokenizer that llama.cpp has not, with the list of those it has."""
    known = ", ".join(sorted({row.name for row in PRE_TOKENIZERS}))
    return InputError(f"{path}: {what}; known are byte-level BPE that cuts as {known}, and SentencePiece BPE")


def flat(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """Return the steps of a normalizer, pre-tokenizer or post-processor, its sequences (under `key`) unrolled."""
    if not part:
        return []
    if part["type"] == "Sequence":
        return [step for inner in part[key] for step in flat(inner, key)]
    return [part]


def name_cuts(path: Path, tokenizer: dict[str, Any], tag: str | None) -> tuple[str, list[str]]:
    """Return llama.cpp's name for the cuts of a tokenizer.json, and what the user should know.

    `tag` is the name the model brought along; it counts where the regexes are not recognized.
    Raises InputError where neither is known.
    """
    notes = []
    for step in flat(tokenizer.get("normalizer"), "normalizers"):
        if step["type"] not in ("NFC", "NFD", "NFKC", "NFKD"):
            raise refuse(path, f"has a normalizer {step['type']}, which llama.cpp has not")
        notes.append(
            f"mlx-lm turns text into Unicode's {step['type']} form first, llama.cpp does not: text in another form, "
            "which is rare, gives other tokens there; nothing to do"
        )
    row = _recognize(tokenizer)
    if row is None:
        if tag is None or tag not in TAGS:
            cuts = json.dumps(tokenizer.get("pre_tokenizer"), ensure_ascii=False)
            raise refuse(path, f"cuts text into words in a way that is not known: {cuts}")
        return tag, [*notes, f"the way of cutting text is taken from gguf_tokenizer_pre: {tag}"]
    if tag and tag != row.name and tag not in SAME.get(row.name, ()):
        notes.append(
            f"text is cut into words as tokenizer.json does it ({row.name}), as in mlx-lm; gguf_tokenizer_pre, which "
            f"says {tag}, is left aside; nothing to do"
        )
    return row.name, notes + [row.note] * bool(row.note)


def _recognize(tokenizer: dict[str, Any]) -> PreTokenizer | None:
    cuts = _cuts(flat(tokenizer.get("pre_tokenizer"), "pretokenizers"))
    rows = [row for row in PRE_TOKENIZERS if row.cuts == cuts]
    ignore_merges = bool(tokenizer["model"].get("ignore_merges"))
    exact = [row for row in rows if row.ignore_merges == ignore_merges]
    if exact or not rows:
        return exact[0] if exact else None
    return rows[0] if _merges_reach_every_token(tokenizer) else None


def _cuts(steps: list[dict[str, Any]]) -> tuple[str, ...] | None:
    """Return the regexes that cut the text, in order; None where a step is of an unknown kind."""
    cuts: list[str] = []
    for step in steps:
        kind = step["type"]
        if kind == "ByteLevel" and not step.get("add_prefix_space", True):
            cuts += [BYTE_LEVEL] if step.get("use_regex", True) else []
        elif kind == "Digits":
            cuts.append(DIGITS if step.get("individual_digits") else rf"{DIGITS}+")
        elif kind == "Split" and (step["behavior"], step["invert"]) in (
            ("Isolated", False),
            ("Removed", True),
        ):
            cuts.append(step["pattern"].get("Regex", ""))
        else:
            return None
    return tuple(cuts)


def _merges_reach_every_token(tokenizer: dict[str, Any]) -> bool:
    """Return whether BPE alone makes each token of its own text: then ignore_merges changes nothing."""
    from tokenizers import Tokenizer

    model = {**tokenizer["model"], "ignore_merges": False}
    bpe = Tokenizer.from_str(json.dumps({**tokenizer, "model": model})).model
    added = {token["content"] for token in tokenizer.get("added_tokens") or []}
    return all(len(bpe.tokenize(token)) == 1 for token in model["vocab"] if token not in added)
