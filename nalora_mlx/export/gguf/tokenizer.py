"""Tokenizers in GGUF: byte-level BPE or SentencePiece BPE, special tokens and chat template.

tokenizer.json takes precedence over tokenizer.model, as in mlx-lm.
"""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nalora_mlx.core import storage
from nalora_mlx.core.errors import InputError
from nalora_mlx.export.gguf.pieces import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Pieces,
    merge_pairs,
    pieces_from_json,
    pieces_from_proto,
)
from nalora_mlx.export.gguf.pretokenizers import flatten_steps, identify_pretokenizer, unsupported_tokenizer

# Texts on which tokenizers disagree: spaces, digits, case, code, and letters of one or two code points.
PROBE_TEXTS = (
    *("a", " a", "a  b\t\tc\n\n  d \r\n e ", "2024 10.5 1,000", "I'LL don't WE'RE", "f(x)=[1]; //!?... a_b"),
    "Stra\u00dfe \u00c5 e\u0301",
    "\u65e5\u672c\u8a9e\u3002 \ud55c \u0e44\u0e17\u0e22",
    "\U0001f642\u200d\u00a0",
)

NO_CHAT_TEMPLATE = "the model has no chat template: programs will guess one"


@dataclass
class Vocabulary:
    """Everything that llama.cpp needs to tokenize, and notes for the user. Lists are indexed by token id."""

    tokens: list[str]
    types: list[int]
    pretokenizer: str = "default"
    merges: list[str] | None = None  # of a byte-level BPE
    scores: list[float] | None = None  # of a SentencePiece BPE
    add_space_prefix: bool = False
    prefix: list[str] = field(default_factory=list)  # special tokens that mlx-lm adds before every text
    suffix: list[str] = field(default_factory=list)  # and after it
    special: dict[str, int] = field(default_factory=dict)  # bos, eos, unk, pad, eot -> id
    add_bos: bool = False
    add_eos: bool = False
    strips_right: bool = False  # whether an added token strips the spaces after it
    chat_template: Any = None
    notes: list[str] = field(default_factory=list)

    def replace_chat_template(self, text: str) -> None:
        """Set the chat template to that of an adapter."""
        self.chat_template = text
        self.notes = [note for note in self.notes if note != NO_CHAT_TEMPLATE]

    def write(self, writer: Any) -> None:
        """Write the vocabulary to the metadata of a GGUFWriter."""
        writer.add_tokenizer_model("llama" if self.merges is None else "gpt2")
        writer.add_tokenizer_pre(self.pretokenizer)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.merges is not None:
            writer.add_token_merges(self.merges)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
            writer.add_add_space_prefix(self.add_space_prefix)
        for name, token in sorted(self.special.items()):
            getattr(writer, f"add_{name}_token_id")(token)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        if self.chat_template:
            writer.add_chat_template(self.chat_template)


def read_vocabulary(model_dir: Path, config: dict[str, Any], size: int) -> Vocabulary:
    """Read the tokenizer of a model.

    Args:
        model_dir: directory of the model.
        config: content of its config.json.
        size: number of embeddings; the vocabulary gets as many tokens.

    Raises:
        InputError: a file is missing or damaged, or llama.cpp has no such tokenizer.
    """
    settings = _read_optional_json(model_dir / "tokenizer_config.json")
    path = model_dir / "tokenizer.json"
    if path.exists():
        vocabulary = _from_json(path, storage.read_json(path), settings)
    elif (path := model_dir / "tokenizer.model").exists():
        vocabulary = _from_proto(path, settings)
    else:
        raise InputError(
            f"{model_dir}: has no tokenizer.json and no tokenizer.model; copy them from the base model"
        )
    _fit_to_embedding(vocabulary, size)
    _set_special_tokens(
        vocabulary, settings, config, _read_optional_json(model_dir / "generation_config.json")
    )
    jinja = model_dir / "chat_template.jinja"
    vocabulary.chat_template = jinja.read_text("utf-8") if jinja.exists() else settings.get("chat_template")
    if not vocabulary.chat_template:
        vocabulary.notes.append(NO_CHAT_TEMPLATE)
    token, count = Counter(vocabulary.tokens).most_common(1)[0]
    if count > 1:
        raise InputError(f"{path}: token {token!r} occurs {count} times; llama.cpp cannot load that")
    return vocabulary


def _read_optional_json(path: Path) -> dict[str, Any]:
    return storage.read_json(path) if path.exists() else {}


def compare_with_mlx_lm(model_dir: Path, vocabulary: Vocabulary) -> list[str]:
    """Return a note if mlx-lm tokenizes a text differently from the tokenizer file, with an example.

    mlx-lm creates the tokenizer class that tokenizer_config.json names, and some classes use only the vocabulary and
    the merges of tokenizer.json.
    """
    from mlx_lm.tokenizer_utils import load

    path = model_dir / "tokenizer.json"
    special = [t for t, kind in zip(vocabulary.tokens, vocabulary.types, strict=True) if kind == CONTROL]
    try:
        tokenizer = load(model_dir)
        if path.exists():
            from tokenizers import Tokenizer

            texts = [*PROBE_TEXTS, *(f"{token}a {token} a" for token in special[:8])]
            expected = [encoding.ids for encoding in Tokenizer.from_file(str(path)).encode_batch(texts)]
            actual = [list(tokenizer.encode(text)) for text in texts]
        else:
            from sentencepiece import SentencePieceProcessor

            path, texts = model_dir / "tokenizer.model", list(PROBE_TEXTS)
            expected = SentencePieceProcessor(str(path)).encode(texts)
            actual = [list(tokenizer.encode(text, add_special_tokens=False)) for text in texts]
    except Exception:  # the tokenizer needs remote code or a missing package: nothing to compare
        return []
    for text, ours, theirs in zip(texts, actual, expected, strict=True):
        if ours != theirs:
            return [
                f"mlx-lm's {type(tokenizer._tokenizer).__name__} tokenizes some texts differently from {path.name}, "
                f"for example {text!r}; the GGUF follows {path.name}"
            ]
    return []


def _from_json(path: Path, tokenizer: dict[str, Any], settings: dict[str, Any]) -> Vocabulary:
    model = tokenizer.get("model") or {}
    steps = flatten_steps(tokenizer.get("pre_tokenizer"), "pretokenizers")
    if model.get("type") != "BPE":
        raise unsupported_tokenizer(path, f"is a {model.get('type')} tokenizer")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise unsupported_tokenizer(path, "marks subwords or word ends")
    if any(step["type"] == "ByteLevel" for step in steps):
        pretokenizer, notes = identify_pretokenizer(path, tokenizer, settings.get("gguf_tokenizer_pre"))
        tokens = [""] * (1 + max(model["vocab"].values()))
        for token, i in model["vocab"].items():
            tokens[i] = token
        types = [NORMAL if token else UNUSED for token in tokens]
        merges = [f"{left} {right}" for left, right in merge_pairs(model)]
        vocabulary = Vocabulary(tokens, types, pretokenizer, merges, notes=notes)
    elif model.get("byte_fallback"):
        vocabulary = _from_pieces(pieces_from_json(path, tokenizer))
    else:
        raise unsupported_tokenizer(
            path, "is a BPE without bytes (no ByteLevel pre-tokenizer, no byte_fallback)"
        )
    _add_tokens(vocabulary, tokenizer.get("added_tokens") or [])
    for step in flatten_steps(tokenizer.get("post_processor"), "processors"):
        if step["type"] == "TemplateProcessing":
            _read_prefix_and_suffix(vocabulary, step["single"])
        elif step["type"] != "ByteLevel":
            raise unsupported_tokenizer(path, f"has a post-processor {step['type']}, which llama.cpp lacks")
    return vocabulary


def _from_proto(path: Path, settings: dict[str, Any]) -> Vocabulary:
    vocabulary = _from_pieces(pieces_from_proto(path))
    added = _read_optional_json(path.with_name("added_tokens.json"))
    tokens = [{"id": i, "content": content, "special": True} for content, i in added.items()]
    tokens += [{"id": int(i), **token} for i, token in settings.get("added_tokens_decoder", {}).items()]
    _add_tokens(vocabulary, tokens)
    for name, affix, default in (("bos", vocabulary.prefix, True), ("eos", vocabulary.suffix, False)):
        token = _token_text(settings.get(f"{name}_token"))
        if token and settings.get(f"add_{name}_token", default):
            affix.append(token)
    return vocabulary


def _from_pieces(pieces: Pieces) -> Vocabulary:
    return Vocabulary(
        pieces.tokens,
        pieces.types,
        scores=pieces.scores,
        add_space_prefix=pieces.add_space_prefix,
        notes=pieces.notes,
    )


def _add_tokens(vocabulary: Vocabulary, added: list[dict[str, Any]]) -> None:
    """Set the text and type of every added token."""
    strips_left = False
    for token in added:
        i, content = token["id"], token["content"]
        _extend(vocabulary, i + 1)
        vocabulary.strips_right |= bool(token.get("rstrip"))
        strips_left |= bool(token.get("lstrip") or token.get("single_word"))
        if vocabulary.scores is not None and "▁" in content and not token.get("special"):
            if not token.get("normalized"):
                continue  # matches only text that contains ▁ itself: for text with spaces, an ordinary piece
            content = content.replace("▁", " ")  # llama.cpp matches it before spaces become ▁
        vocabulary.tokens[i] = content
        if vocabulary.types[i] not in (UNKNOWN, BYTE):
            vocabulary.types[i] = CONTROL if token.get("special") else USER_DEFINED
    if strips_left:
        vocabulary.notes.append(
            "mlx-lm strips the spaces before some special tokens of this model, llama.cpp does not"
        )


def _extend(vocabulary: Vocabulary, size: int) -> None:
    missing = max(0, size - len(vocabulary.tokens))
    vocabulary.tokens += [""] * missing
    vocabulary.types += [UNUSED] * missing
    if vocabulary.scores is not None:
        vocabulary.scores += [0.0] * missing


def _fit_to_embedding(vocabulary: Vocabulary, size: int) -> None:
    """Pad or cut the vocabulary to the size of the embedding, as llama.cpp requires, and name the unused ids."""
    extra = [token for token in vocabulary.tokens[size:] if token]
    if extra:
        vocabulary.notes.append(f"left out {len(extra)} tokens without an embedding: {', '.join(extra[:5])}")
    _extend(vocabulary, size)
    del vocabulary.tokens[size:], vocabulary.types[size:]
    if vocabulary.scores is not None:
        del vocabulary.scores[size:]
    vocabulary.tokens[:] = [token or f"[PAD{i}]" for i, token in enumerate(vocabulary.tokens)]


def _read_prefix_and_suffix(vocabulary: Vocabulary, template: list[dict[str, Any]]) -> None:
    affix = vocabulary.prefix
    for part in template:
        if "Sequence" in part:
            affix = vocabulary.suffix
        else:
            affix.append(part["SpecialToken"]["id"])


def _set_special_tokens(
    vocabulary: Vocabulary, settings: dict[str, Any], config: dict[str, Any], generation: dict[str, Any]
) -> None:
    """Set the ids of special tokens, from the tokenizer's config or else the model's, and which are added to texts."""
    ids = {token: i for i, token in enumerate(vocabulary.tokens)}
    end_ids: list[int] = []
    for name in ("bos", "eos", "unk", "pad"):
        key = f"{name}_token_id"
        config_ids = _valid_ids(config.get(key), len(ids)) + _valid_ids(generation.get(key), len(ids))
        token = _token_text(settings.get(f"{name}_token"))
        if token in ids:
            vocabulary.special[name] = ids[token]
        elif config_ids:
            vocabulary.special[name] = config_ids[0]
        if name == "eos":
            end_ids = config_ids
    # Chat models may have several end tokens. GGUF stores a second one; llama.cpp knows further common ones by name.
    if others := [i for i in end_ids if i != vocabulary.special["eos"]]:
        vocabulary.special["eot"] = others[0]
    for name, affix in (("bos", vocabulary.prefix), ("eos", vocabulary.suffix)):
        token = vocabulary.tokens[vocabulary.special[name]] if name in vocabulary.special else None
        if affix == [token]:
            setattr(vocabulary, f"add_{name}", True)
        elif affix:
            side = "before" if name == "bos" else "after"
            vocabulary.notes.append(f"mlx-lm adds {''.join(affix)} {side} every text, llama.cpp does not")


def _valid_ids(value: Any, size: int) -> list[int]:
    """Return the ids in a config value (one or a list) that are ids of tokens."""
    return [
        i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int) and 0 <= i < size
    ]


def _token_text(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token
