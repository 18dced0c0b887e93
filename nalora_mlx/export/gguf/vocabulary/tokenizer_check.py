"""Comparison of a vocabulary, read from files, with the tokenizer that mlx-lm loads from the same files."""

import json
from pathlib import Path
from typing import Any

from nalora_mlx.core.errors import InputError, first_line
from nalora_mlx.export.gguf.vocabulary.declared_tokens import read_optional_json
from nalora_mlx.export.gguf.vocabulary.ends import configured_ends
from nalora_mlx.export.gguf.vocabulary.pieces import CONTROL, USER_DEFINED
from nalora_mlx.export.gguf.vocabulary.tokenizer import Vocabulary, read_vocabulary_file

# Texts on which tokenizers disagree: spaces, digits, case, code, and letters of one or two code points.
PROBE_TEXTS = (
    *("a", " a", "a  b\t\tc\n\n  d \r\n e ", "2024 10.5 1,000", "I'LL don't WE'RE", "f(x)=[1]; //!?... a_b"),
    "Stra\u00dfe \u00c5 e\u0301",
    "\u65e5\u672c\u8a9e\u3002 \ud55c \u0e44\u0e17\u0e22",
    "\U0001f642\u200d\u00a0",
)


def compare_with_mlx_lm(model_dir: Path, vocabulary: Vocabulary) -> list[str]:
    """Return notes on how mlx-lm's tokenizer differs from the vocabulary: tokens of texts, special tokens, ends.

    mlx-lm creates the tokenizer class that tokenizer_config.json names, and some classes use only the vocabulary and
    the merges of tokenizer.json.

    Raises:
        InputError: a special token has another id in mlx-lm.
    """
    from mlx_lm.tokenizer_utils import load

    config, generation = (
        read_optional_json(model_dir / name) for name in ("config.json", "generation_config.json")
    )
    try:
        # Without this, transformers asks on the terminal whether to run the model's Python code.
        trust = {"trust_remote_code": False}
        tokenizer = load(model_dir, trust, eos_token_ids=configured_ends(config, generation))
    except Exception as error:  # needs remote code or a missing package
        return [
            f"the tokens were not compared with mlx-lm, which cannot load the tokenizer: {first_line(error)}"
        ]
    _check_special_tokens(model_dir, tokenizer, vocabulary)
    return _compare_texts(model_dir, tokenizer, vocabulary) + _compare_ends(tokenizer, vocabulary)


def _check_special_tokens(model_dir: Path, tokenizer: Any, vocabulary: Vocabulary) -> None:
    theirs, problems = tokenizer.get_vocab(), []
    for i, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True)):
        if kind in (CONTROL, USER_DEFINED) and theirs.get(token, i) != i:
            problems.append(f"{token!r} is token {i} in the files and {theirs[token]} in mlx-lm")
    if problems:
        raise InputError(
            f"{model_dir}: {'; '.join(problems[:5])}; correct tokenizer_config.json or added_tokens.json"
        )


def _compare_texts(model_dir: Path, tokenizer: Any, vocabulary: Vocabulary) -> list[str]:
    path, content = read_vocabulary_file(model_dir)
    special = [t for t, kind in zip(vocabulary.tokens, vocabulary.types, strict=True) if kind == CONTROL]
    try:
        if content is not None:
            from tokenizers import Tokenizer

            reference = Tokenizer.from_str(json.dumps(content))
            _add_other_tokens(reference, vocabulary)
            texts = [*PROBE_TEXTS, *(f"{token}a {token} a" for token in special[:8])]
            expected = [encoding.ids for encoding in reference.encode_batch(texts)]
            actual = [list(tokenizer.encode(text)) for text in texts]
        else:
            from sentencepiece import SentencePieceProcessor

            texts = list(PROBE_TEXTS)
            expected = SentencePieceProcessor(str(path)).encode(texts)
            actual = [list(tokenizer.encode(text, add_special_tokens=False)) for text in texts]
    except Exception as error:  # sentencepiece is missing, or a Python tokenizer rejects a text
        return [f"the tokens were not compared with mlx-lm's: {first_line(error)}"]
    for text, ours, theirs in zip(texts, actual, expected, strict=True):
        if ours != theirs:
            return [
                f"mlx-lm's {type(tokenizer._tokenizer).__name__} tokenizes some texts differently from {path.name}, "
                f"for example {text!r}; the GGUF follows {path.name}"
            ]
    return []


def _add_other_tokens(reference: Any, vocabulary: Vocabulary) -> None:
    """Add the tokens that other files than tokenizer.json declare."""
    from tokenizers import AddedToken

    known = {token.content for token in reference.get_added_tokens_decoder().values()}
    for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True):
        if kind in (CONTROL, USER_DEFINED) and known.isdisjoint((token, token.replace(" ", "▁"))):
            reference.add_tokens([AddedToken(token, special=kind == CONTROL, normalized=False)])


def _compare_ends(tokenizer: Any, vocabulary: Vocabulary) -> list[str]:
    theirs, ours = set(tokenizer.eos_token_ids), set(vocabulary.ends)
    names = {i: repr(token) for i, token in enumerate(vocabulary.tokens)}
    notes = []
    if lost := theirs - ours:
        found = ", ".join(names.get(i, str(i)) for i in sorted(lost))
        notes.append(f"mlx-lm ends an answer at {found} too, llama.cpp does not; give it as a stop word")
    if extra := ours - theirs:
        found = ", ".join(names[i] for i in sorted(extra))
        notes.append(f"llama.cpp ends an answer at {found}, as the tokenizer's files say; mlx-lm does not")
    return notes
