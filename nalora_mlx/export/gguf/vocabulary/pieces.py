"""SentencePiece BPE vocabularies: pieces and their scores, read from tokenizer.model or tokenizer.json."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nalora_mlx.core.errors import InputError
from nalora_mlx.core.notices import Note
from nalora_mlx.export.gguf.vocabulary.pretokenizers import flatten_steps, unsupported_tokenizer

# Token types, with the same numbers in SentencePiece and GGUF.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_NORMALIZATION_NOTE = Note(
    "the tokenizer normalizes text and llama.cpp does not: unusual characters or spaces may split differently"
)
_RAW_BPE_NOTE = "the tokenizer needs llama.cpp's tokenizer model gemma4, which versions before 2026 lack"
_SPACE_NOTE = "llama.cpp adds a space before text that follows a special token, mlx-lm does not"


@dataclass
class Pieces:
    """A SentencePiece vocabulary, by token id, and notes for the user."""

    tokens: list[str]
    types: list[int]
    scores: list[float] | None  # None if only merges reproduce the tokens
    add_space_prefix: bool  # whether text gets a leading space
    notes: list[str]
    merges: list[tuple[str, str]] | None = None


# --- tokenizer.json ----------------------------------------------------------------------------------


def pieces_from_json(path: Path, tokenizer: dict[str, Any]) -> Pieces:
    """Read a SentencePiece BPE that was converted to tokenizer.json; the scores are recovered from its merges.

    Args:
        path: the file, for messages.
        tokenizer: its content.

    Raises:
        InputError: the BPE was not made by SentencePiece, or handles spaces in an unsupported way.
    """
    model = tokenizer["model"]
    notes: list[str] = []
    prefix = marks_spaces = False
    for step in flatten_steps(tokenizer.get("normalizer"), "normalizers"):
        if step["type"] == "Prepend" and step["prepend"] == "▁":
            prefix = True
        elif step["type"] == "Replace" and (step["pattern"], step["content"]) == ({"String": " "}, "▁"):
            marks_spaces = True
        elif step["type"] in ("Precompiled", "NFC", "NFKC"):
            notes.append(_NORMALIZATION_NOTE)
        else:
            raise unsupported_tokenizer(path, f"has a normalizer {step['type']}, which llama.cpp lacks")
    for step in flatten_steps(tokenizer.get("pre_tokenizer"), "pretokenizers"):
        scheme = step.get("prepend_scheme", "always")
        if step["type"] == "Metaspace" and not step.get("split", True):
            marks_spaces, prefix = True, prefix or scheme != "never"
            if scheme == "first":
                notes.append(_SPACE_NOTE)
            if scheme != "never":
                notes.append("a leading space in a text counts once in mlx-lm and twice in llama.cpp")
        elif not (step["type"] == "Split" and step["pattern"] == {"String": " "} and marks_spaces):
            raise unsupported_tokenizer(path, f"has a pre-tokenizer {step['type']}, which llama.cpp lacks")
    if not marks_spaces:
        raise unsupported_tokenizer(path, "does not represent spaces as ▁")
    tokens = [""] * (1 + max(model["vocab"].values()))
    for token, i in model["vocab"].items():
        tokens[i] = token
    added = {token["content"] for token in tokenizer.get("added_tokens") or []}
    types = [_token_type(token, model.get("unk_token")) for token in tokens]
    merges = merge_pairs(model)
    try:
        return Pieces(tokens, types, _recover_scores(path, tokens, merges, added), prefix, notes)
    except InputError:
        if prefix or any("\n" in left + right and {*left, *right} != {"\n"} for left, right in merges):
            raise  # llama.cpp's BPE of raw text adds no space before a text, and cuts it at line ends
        return Pieces(tokens, types, None, False, [*notes, _RAW_BPE_NOTE], merges)


def merge_pairs(model: dict[str, Any]) -> list[tuple[str, str]]:
    """Return a BPE's merges, best first. tokenizer.json has them as "a b" or as ["a", "b"]."""
    pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model.get("merges") or [])
    return [(left, right) for left, right in pairs]


def _token_type(token: str, unknown: str | None) -> int:
    if token == unknown:
        return UNKNOWN
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return BYTE
    return NORMAL if token else UNUSED


def _recover_scores(
    path: Path, tokens: list[str], merges: list[tuple[str, str]], added: set[str]
) -> list[float]:
    """Return scores by token id with which SentencePiece makes the same merges, in the same order.

    SentencePiece joins the neighbours whose text is the best-scored token. Scores can therefore replace merges only if
    1. all merges that make a token follow one another, and
    2. every split of a token into two tokens is a merge.
    Both hold for converted SentencePiece models, but not for BPE in general. The first need not hold for runs of one
    character (Gemma's line ends and spaces) if longer runs have better ranks: a run then only grows from the left, by
    one character at a time.
    """
    rank: dict[str, int] = {}
    runs: set[str] = set()  # characters
    previous = ""
    reason = "is a BPE with byte_fallback that was not made by SentencePiece"
    for i, (left, right) in enumerate(merges):
        joined = left + right
        if joined in rank and joined != previous:
            if len(set(joined)) > 1:
                raise unsupported_tokenizer(
                    path, f"{reason} (the merges of token {joined!r} are not adjacent)"
                )
            runs.add(joined[0])
        rank.setdefault(joined, i)
        previous = joined
    length = dict.fromkeys(runs, 1)
    for left, right in reversed(merges):
        if right in runs and set(left) == {right}:
            if len(left) != length[right]:
                raise unsupported_tokenizer(
                    path, f"{reason} (token {left + right!r} does not rank by its length)"
                )
            length[right] += 1
    known, vocab = set(merges), set(tokens) - added
    for token in vocab:
        for i in range(1, len(token)):
            left, right = token[:i], token[i:]
            if left in vocab and right in vocab and (left, right) not in known:
                raise unsupported_tokenizer(path, f"{reason} (no merge of {left!r} and {right!r})")
    return [-float(rank.get(token, len(merges))) for token in tokens]


# --- tokenizer.model ---------------------------------------------------------------------------------


def pieces_from_proto(path: Path) -> Pieces:
    """Read a tokenizer.model.

    The file is parsed here because the sentencepiece package reports neither the algorithm nor user-defined pieces.
    Format: sentencepiece_model.proto of github.com/google/sentencepiece.

    Raises:
        InputError: the file is damaged, or its model is not a BPE with byte fallback.
    """
    tokens, types, scores = [], [], []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    try:
        for number, value in _parse_protobuf(path.read_bytes()):
            if number == 1:  # pieces
                piece = dict(_parse_protobuf(value))
                tokens.append(piece[1].decode("utf-8"))
                scores.append(struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0)
                types.append(piece.get(3, NORMAL))
            elif number == 2:  # trainer_spec
                trainer = dict(_parse_protobuf(value))
            elif number == 3:  # normalizer_spec
                normalizer = dict(_parse_protobuf(value))
    except (OSError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        raise InputError(f"{path}: is not a readable SentencePiece model: {error}") from error
    algorithm = trainer.get(3, 1)  # model_type
    if algorithm != 2:
        kind = {1: "Unigram", 3: "Word", 4: "Char"}.get(algorithm, "unknown")
        raise unsupported_tokenizer(path, f"is a SentencePiece {kind} model")
    if BYTE not in types:
        raise unsupported_tokenizer(path, "is a SentencePiece model without byte fallback")
    if trainer.get(24, 0):  # treat_whitespace_as_suffix
        raise unsupported_tokenizer(path, "is a SentencePiece model that puts spaces after words")
    for i, kind in enumerate(types):
        if kind == USER_DEFINED:  # matched after spaces become ▁ in SentencePiece, and before in llama.cpp
            tokens[i] = tokens[i].replace("▁", " ")
    normalizes = normalizer.get(2) or normalizer.get(4, 1)  # precompiled_charsmap, remove_extra_whitespaces
    notes: list[str] = [_NORMALIZATION_NOTE] if normalizes else []
    prefix = bool(normalizer.get(3, 1))  # add_dummy_prefix
    return Pieces(tokens, types, scores, prefix, notes + [_SPACE_NOTE] * prefix)


def _parse_protobuf(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yield (field number, value) of a protobuf message: an int for varints, bytes for other types."""
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = data[position]
            position += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while position < len(data):
        number, wire = divmod(varint(), 8)
        if wire == 0:
            yield number, varint()
            continue
        size = {1: 8, 5: 4}.get(wire)
        if wire == 2:
            size = varint()
        if size is None or position + size > len(data):
            raise ValueError("truncated, or of another format")
        yield number, data[position : position + size]
        position += size
