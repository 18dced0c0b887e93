"""A SentencePiece BPE as llama.cpp wants it: its pieces with scores, from tokenizer.model or tokenizer.json."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nalora_mlx.core.errors import InputError
from nalora_mlx.export.gguf_pretokenizer import flat, refuse

# Token types: the same numbers in SentencePiece and in GGUF.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_NORMALIZES = (
    "the tokenizer normalizes text, llama.cpp does not: unusual characters or spaces may split differently"
)
_SPACE_AFTER = "text after a special token gets a space in front in llama.cpp, not in mlx-lm"


@dataclass
class Pieces:
    """The vocabulary by token id, whether text gets a space in front, and what the user should know."""

    tokens: list[str]
    types: list[int]
    scores: list[float]
    add_space_prefix: bool
    notes: list[str]


# --- tokenizer.json ----------------------------------------------------------------------------------


def pieces_from_json(path: Path, tokenizer: dict[str, Any]) -> Pieces:
    """Read a SentencePiece BPE that was converted to tokenizer.json: its merges give back the scores.

    Raises InputError for one that SentencePiece did not make or that treats spaces in another way.
    """
    model, notes = tokenizer["model"], []
    prefix = marks_spaces = False
    for step in flat(tokenizer.get("normalizer"), "normalizers"):
        if step["type"] == "Prepend" and step["prepend"] == "▁":
            prefix = True
        elif step["type"] == "Replace" and (step["pattern"], step["content"]) == ({"String": " "}, "▁"):
            marks_spaces = True
        elif step["type"] in ("Precompiled", "NFC", "NFKC"):
            notes.append(_NORMALIZES)
        else:
            raise refuse(path, f"has a normalizer {step['type']}, which llama.cpp has not")
    for step in flat(tokenizer.get("pre_tokenizer"), "pretokenizers"):
        scheme = step.get("prepend_scheme", "always")
        if step["type"] == "Metaspace" and not step.get("split", True):
            marks_spaces, prefix = True, prefix or scheme != "never"
            if scheme == "first":
                notes.append(_SPACE_AFTER)
            if scheme != "never":
                notes.append("a space that begins a text counts once in mlx-lm, twice in llama.cpp")
        elif not (step["type"] == "Split" and step["pattern"] == {"String": " "} and marks_spaces):
            raise refuse(path, f"has a pre-tokenizer {step['type']}, which llama.cpp has not")
    if not marks_spaces:
        raise refuse(path, "does not write spaces as ▁")
    tokens = [""] * (1 + max(model["vocab"].values()))
    for token, i in model["vocab"].items():
        tokens[i] = token
    added = {token["content"] for token in tokenizer.get("added_tokens") or []}
    types = [_type(token, model.get("unk_token")) for token in tokens]
    return Pieces(tokens, types, _scores(path, tokens, merge_pairs(model), added), prefix, notes)


def merge_pairs(model: dict[str, Any]) -> list[tuple[str, str]]:
    """Return a BPE's merges, best first; tokenizer.json writes them as "a b" or as ["a", "b"]."""
    pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model.get("merges") or [])
    return [(left, right) for left, right in pairs]


def _type(token: str, unknown: str | None) -> int:
    if token == unknown:
        return UNKNOWN
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return BYTE
    return NORMAL if token else UNUSED


def _scores(path: Path, tokens: list[str], merges: list[tuple[str, str]], added: set[str]) -> list[float]:
    """Return the scores, by id, with which joining the best-scored neighbours repeats the merges.

    SentencePiece joins any two neighbours whose text is a token. So every cut of a token into two tokens must be
    a merge, and a token's merges must follow one another: true of what was converted, not of any other BPE.
    """
    rank: dict[str, int] = {}
    before = ""
    foreign = "is a BPE with byte_fallback that SentencePiece did not make"
    for left, right in merges:
        joined = left + right
        if joined in rank and joined != before:
            raise refuse(path, f"{foreign} (token {joined!r} comes from merges far apart)")
        rank.setdefault(joined, len(rank))
        before = joined
    known, vocab = set(merges), set(tokens) - added
    for token in vocab:
        for i in range(1, len(token)):
            left, right = token[:i], token[i:]
            if left in vocab and right in vocab and (left, right) not in known:
                raise refuse(path, f"{foreign} (no merge of {left!r} and {right!r})")
    return [-float(rank.get(token, len(rank))) for token in tokens]


# --- tokenizer.model ---------------------------------------------------------------------------------


def pieces_from_proto(path: Path) -> Pieces:
    """Read a tokenizer.model. Format: sentencepiece_model.proto of github.com/google/sentencepiece.

    It is read here, because the package's own interface tells neither the algorithm nor user-defined pieces.
    Raises InputError for a broken file and for anything but BPE with byte fallback.
    """
    tokens, types, scores = [], [], []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    try:
        for number, value in _fields(path.read_bytes()):
            if number == 1:
                piece = dict(_fields(value))
                tokens.append(piece[1].decode("utf-8"))
                scores.append(struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0)
                types.append(piece.get(3, NORMAL))
            elif number == 2:
                trainer = dict(_fields(value))
            elif number == 3:
                normalizer = dict(_fields(value))
    except (OSError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        raise InputError(f"{path}: is not a SentencePiece model that can be read: {error}") from error
    algorithm = trainer.get(3, 1)
    if algorithm != 2:
        kind = {1: "Unigram", 3: "Word", 4: "Char"}.get(algorithm, "empty")
        raise refuse(path, f"is a SentencePiece {kind} model")
    if BYTE not in types:
        raise refuse(path, "is a SentencePiece model without byte fallback")
    if trainer.get(24, 0):
        raise refuse(path, "is a SentencePiece model that marks spaces after words")
    for i, kind in enumerate(types):
        if kind == USER_DEFINED:  # SentencePiece looks for them after it has marked spaces, llama.cpp before
            tokens[i] = tokens[i].replace("▁", " ")
    notes = [_NORMALIZES] if normalizer.get(2) or normalizer.get(4, 1) else []
    prefix = bool(normalizer.get(3, 1))
    return Pieces(tokens, types, scores, prefix, notes + [_SPACE_AFTER] * prefix)


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yield (field number, value) of a protobuf message: int for varints, bytes for all else."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(data):
        number, wire = divmod(varint(), 8)
        if wire == 0:
            yield number, varint()
            continue
        size = {1: 8, 5: 4}.get(wire)
        if wire == 2:
            size = varint()
        if size is None or at + size > len(data):
            raise ValueError("it is cut short or of another format")
        yield number, data[at : at + size]
        at += size
