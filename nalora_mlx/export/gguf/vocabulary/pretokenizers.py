"""llama.cpp's names for the pre-tokenizers of byte-level BPE.

A pre-tokenizer splits text into words by regular expressions. GGUF stores only its name (`tokenizer.ggml.pre`), so the
one in tokenizer.json has to be recognized: by its regular expressions, or else by how it splits random text. Unknown
ones are rejected.
"""

import json
import random
from pathlib import Path
from typing import Any

from nalora_mlx.core.errors import InputError
from nalora_mlx.core.notices import Note
from nalora_mlx.export.gguf.vocabulary.pretokenizer_table import (
    BYTE_LEVEL,
    DIFFERENCES,
    DIGITS,
    KNOWN_NAMES,
    PRE_TOKENIZERS,
    PreTokenizer,
)


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
        given_name: `gguf_tokenizer_pre` of the model, used if the pre-tokenizer is unknown, or to choose among names.

    Raises:
        InputError: both are unknown, or the normalizer is unsupported.
    """
    notes: list[str] = []
    for step in flatten_steps(tokenizer.get("normalizer"), "normalizers"):
        if step["type"] not in ("NFC", "NFD", "NFKC", "NFKD"):
            raise unsupported_tokenizer(path, f"has a normalizer {step['type']}, which llama.cpp lacks")
        notes.append(
            Note(
                f"mlx-lm normalizes text to Unicode {step['type']} and llama.cpp does not, so text in another form "
                "(accents or Hangul syllables in separate characters, Hebrew and Arabic with vowel points) gets "
                "different tokens there"
            )
        )
    row = _find_row(tokenizer)
    if row is None:
        if given_name is None or given_name not in KNOWN_NAMES:
            found = json.dumps(tokenizer.get("pre_tokenizer"), ensure_ascii=False)
            raise unsupported_tokenizer(path, f"has an unknown pre-tokenizer: {found}")
        return given_name, [*notes, Note(f"the pre-tokenizer is taken from gguf_tokenizer_pre: {given_name}")]
    name, differs, remedy = row.name, row.differs, ""
    if row.closer is not None:
        closer, differs_less = row.closer
        if given_name == closer:
            return closer, notes + [DIFFERENCES[key] for key in differs_less]
        remedy = f' ("gguf_tokenizer_pre": "{closer}" in tokenizer_config.json avoids it in recent llama.cpp)'
    if not _joins_digits(tokenizer["model"]["vocab"]):
        differs = tuple(key for key in differs if key != "digits")
    return name, notes + [
        DIFFERENCES[key] + remedy if key == "marks" else DIFFERENCES[key] for key in differs
    ]


def _joins_digits(vocab: dict[str, int]) -> bool:
    return any(len(token) > 1 and token.isdecimal() for token in vocab)


def _find_row(tokenizer: dict[str, Any]) -> PreTokenizer | None:
    pre_tokenizer = tokenizer.get("pre_tokenizer")
    patterns = _split_patterns(flatten_steps(pre_tokenizer, "pretokenizers"))
    rows = [row for row in PRE_TOKENIZERS if row.patterns == patterns]
    if not rows:
        texts = _probe_texts("".join(patterns or ()))
        rows = list(PRE_TOKENIZERS)
        for some in (texts[:100], texts):  # most differ on the first texts
            words = _split(pre_tokenizer, some)
            rows = [row for row in rows if _split(row.as_json(), some) == words]
    ignore_merges = bool(tokenizer["model"].get("ignore_merges"))
    exact = [row for row in rows if row.ignore_merges == ignore_merges]
    if exact or not rows:
        return exact[0] if exact else None
    return rows[0] if _merges_reach_every_token(tokenizer) else None


def _split_patterns(steps: list[dict[str, Any]]) -> tuple[str, ...] | None:
    """Return the regular expressions that split the text, in order; None if a step is of another kind."""
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


_PROBE_ALPHABET = (
    "aaeesstrdmvlLTREVSDMIX  ''''\t\n\n\r0123456789.,;:!?/\\-_+*=<>()[]{}|~`@#$%^&\"\x0b\x01"
    "\u00e9\u00c9\u00df\u0130\u017f\u01c5\u02b0\u0301\u0323\u20e3\ufe0f\u03b1\u0391\u0436\u0416\u10d0\u0541\u0581"
    "\u05d0\u05b8\u0627\u0650\u0661\u0905\u093f\u0940\u0967\u09be\u0bbf\u0e01\u0e31\u0e50\u1780\u17b7\u1100\u1161\uac00"
    "\u3042\u30ab\u30fc\u309a\uff76\u4e2d\u9fff\u3400\U00020000\u3105\u3131\u3001\u3002\uff0c\uff01\u2018\u201d\u2014\u2026"
    "\u00bd\u00b2\u2167\u2460\u20ac\u2192\u00aa\u00a0\u2003\u3000\u2028\u0085\u200b\u200d\ufeff\U0001f642\ue000\ufffd"
)


def _probe_texts(pattern: str, count: int = 4000) -> list[str]:
    """Return random texts of all kinds of characters, among them those that a regular expression names."""
    codes = {ord(c) + i for c in pattern if ord(c) > 127 for i in (-1, 0, 1)}
    named = [chr(code) for code in sorted(codes) if not 0xD800 <= code <= 0xDFFF]
    generator = random.Random(0)
    ascii_only = [c for c in _PROBE_ALPHABET if ord(c) < 128]
    alphabets = [ascii_only, list(_PROBE_ALPHABET), [*ascii_only, *_PROBE_ALPHABET, *named]]
    return ["".join(generator.choices(alphabets[i % 3], k=4 + i % 13)) for i in range(count)]


def _split(pre_tokenizer: dict[str, Any] | None, texts: list[str]) -> list[list[str]] | None:
    """Return the words of each text; None if the tokenizers package does not know the pre-tokenizer."""
    from tokenizers import Tokenizer

    model = {"type": "BPE", "vocab": {}, "merges": []}
    try:
        tokenizer = Tokenizer.from_str(json.dumps({"model": model, "pre_tokenizer": pre_tokenizer}))
    except Exception:  # tokenizers raises no other class
        return None
    return [[word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)] for text in texts]


def _merges_reach_every_token(tokenizer: dict[str, Any]) -> bool:
    """Return whether BPE alone makes each token from its own text, so that ignore_merges has no effect."""
    from tokenizers import Tokenizer

    model = {**tokenizer["model"], "ignore_merges": False}
    bpe = Tokenizer.from_str(json.dumps({**tokenizer, "model": model})).model
    added = {token["content"] for token in tokenizer.get("added_tokens") or []}
    return all(len(bpe.tokenize(token)) == 1 for token in model["vocab"] if token not in added)
