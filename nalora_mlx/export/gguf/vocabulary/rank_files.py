"""Byte-level BPE vocabularies that are stored as ranks: Mistral's tekken.json and Kimi's tiktoken.model.

A rank file lists the tokens, as bytes, in the order in which they were learned. Two neighbours are joined if their text
is a token, those of the best rank first. Both readers return the same content as a tokenizer.json.
"""

import base64
from pathlib import Path
from typing import Any

from nalora_mlx.core import storage
from nalora_mlx.core.errors import InputError
from nalora_mlx.export.gguf.vocabulary.pretokenizer_table import KIMI, PreTokenizer


def read_tekken(path: Path) -> dict[str, Any]:
    """Read a tekken.json: special tokens have the first ids, then come the ranked ones.

    Raises:
        InputError: the file is damaged, or of the first version, which does not list its special tokens.
    """
    content = storage.read_json(path)
    try:
        config, special = content["config"], content["special_tokens"]
        count = config["default_num_special_tokens"]
        names = {token["rank"]: token["token_str"] for token in special}
        size = config.get("default_vocab_size", count + len(content["vocab"])) - count
        ranked = [base64.b64decode(token["token_bytes"]) for token in content["vocab"][:size]]
        pattern = config["pattern"]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}: is not a tekken file with special_tokens ({type(error).__name__}: {error}); "
            "convert the tokenizer to tokenizer.json with transformers"
        ) from error
    specials = [(i, names.get(i, f"<SPECIAL_{i}>")) for i in range(count)]
    return _as_json(ranked, count, PreTokenizer("", (pattern,)), specials)


def read_tiktoken(path: Path) -> dict[str, Any]:
    """Read a tiktoken.model of Kimi, whose regular expressions are in its Python code, not in a file.

    Raises:
        InputError: the file is damaged, or of another model.
    """
    settings = path.with_name("tokenizer_config.json")
    name = storage.read_json(settings).get("tokenizer_class") if settings.exists() else "TikTokenTokenizer"
    if name != "TikTokenTokenizer":
        raise InputError(
            f"{path}: of tokenizer_class {name}, how it splits words is unknown; supported is Kimi's"
        )
    try:
        pairs = [line.split() for line in path.read_bytes().splitlines() if line.strip()]
        ranks = {int(rank): base64.b64decode(token) for token, rank in pairs}
        ranked = [ranks[i] for i in range(len(ranks))]
    except (KeyError, ValueError) as error:
        raise InputError(f"{path}: is not a tiktoken file: {error}") from error
    return _as_json(ranked, 0, PreTokenizer("", (KIMI,)), [])


def _as_json(
    ranked: list[bytes], first: int, pre_tokenizer: PreTokenizer, specials: list[tuple[int, str]]
) -> dict[str, Any]:
    characters = _byte_characters()
    texts = ["".join(characters[byte] for byte in token) for token in ranked]
    ranks = {text: rank for rank, text in enumerate(texts)}
    merges = []
    for text in texts:
        cuts = [(text[:i], text[i:]) for i in range(1, len(text))]
        merges += [[left, right] for left, right in cuts if left in ranks and right in ranks]
    vocab = {text: first + rank for text, rank in ranks.items()} | {text: i for i, text in specials}
    flags = {"special": True} | dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
    return {
        "model": {"type": "BPE", "vocab": vocab, "merges": merges, "ignore_merges": True},
        "pre_tokenizer": pre_tokenizer.as_json(),
        "added_tokens": [{"id": i, "content": text} | flags for i, text in specials],
    }


def _byte_characters() -> list[str]:
    """Return the character that stands for each byte in a byte-level BPE: itself if it is printable."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
