"""A tokenizer as GGUF keeps it: byte-level BPE or SentencePiece BPE, special tokens and chat template.

tokenizer.json comes before tokenizer.model, because mlx-lm takes it first too.
"""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nalora_mlx.core.errors import InputError
from nalora_mlx.export.gguf_pretokenizer import flat, name_cuts, refuse
from nalora_mlx.export.gguf_sentencepiece import (
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

# Texts on which tokenizers disagree: spaces, digits, case, marks of code, letters that are one or two characters.
PROBES = (
    *("a", " a", "a  b\t\tc\n\n  d \r\n e ", "2024 10.5 1,000", "I'LL don't WE'RE", "f(x)=[1]; //!?... a_b"),
    "Stra\u00dfe \u00c5 e\u0301",
    "\u65e5\u672c\u8a9e\u3002 \ud55c \u0e44\u0e17\u0e22",
    "\U0001f642\u200d\u00a0",
)


@dataclass
class Vocabulary:
    """Everything llama.cpp needs to tokenize; lists are by token id."""

    tokens: list[str]
    types: list[int]
    pre: str = "default"
    merges: list[str] | None = None  # of a byte-level BPE
    scores: list[float] | None = None  # of a SentencePiece BPE
    add_space_prefix: bool = False
    before: list[str] = field(default_factory=list)  # special tokens that mlx-lm puts around every text
    after: list[str] = field(default_factory=list)
    special: dict[str, int] = field(default_factory=dict)  # bos, eos, unk, pad, eot -> id
    add_bos: bool = False
    add_eos: bool = False
    strips_right: bool = False  # some added token takes the spaces after it
    chat_template: Any = None
    notes: list[str] = field(default_factory=list)

    def write(self, writer: Any) -> None:
        """Write it all as metadata of a GGUFWriter."""
        writer.add_tokenizer_model("llama" if self.merges is None else "gpt2")
        writer.add_tokenizer_pre(self.pre)
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
    """Read the tokenizer in `model_dir` for a model of `size` embeddings.

    Raises InputError where llama.cpp has no such tokenizer, or none that is recognized.
    """
    settings = _json(model_dir / "tokenizer_config.json")
    path = model_dir / "tokenizer.json"
    if path.exists():
        vocabulary = _from_json(path, _json(path), settings)
    elif (path := model_dir / "tokenizer.model").exists():
        vocabulary = _from_proto(path, settings)
    else:
        raise InputError(
            f"{model_dir}: has no tokenizer.json and no tokenizer.model; copy them from the base model"
        )
    _fit(vocabulary, size)
    _set_special(vocabulary, settings, config, _json(model_dir / "generation_config.json"))
    jinja = model_dir / "chat_template.jinja"
    vocabulary.chat_template = jinja.read_text("utf-8") if jinja.exists() else settings.get("chat_template")
    if not vocabulary.chat_template:
        vocabulary.notes.append("the model has no chat template: programs will guess one")
    token, count = Counter(vocabulary.tokens).most_common(1)[0]
    if count > 1:
        raise InputError(f"{path}: token {token!r} is there {count} times; llama.cpp does not load that")
    return vocabulary


def compare_with_mlx_lm(model_dir: Path, vocabulary: Vocabulary) -> list[str]:
    """Say where mlx-lm gives a text other tokens than the file that was read here does; empty if nowhere.

    mlx-lm's tokenizer is made by the class that tokenizer_config.json names, and some of these take only vocabulary
    and merges from tokenizer.json.
    """
    from mlx_lm.tokenizer_utils import load

    path = model_dir / "tokenizer.json"
    special = [t for t, kind in zip(vocabulary.tokens, vocabulary.types, strict=True) if kind == CONTROL]
    try:
        theirs = load(model_dir)
        if path.exists():
            from tokenizers import Tokenizer

            texts = [*PROBES, *(f"{token}a {token} a" for token in special[:8])]
            wanted = [encoding.ids for encoding in Tokenizer.from_file(str(path)).encode_batch(texts)]
            given = [list(theirs.encode(text)) for text in texts]
        else:
            from sentencepiece import SentencePieceProcessor

            path, texts = model_dir / "tokenizer.model", list(PROBES)
            wanted = SentencePieceProcessor(str(path)).encode(texts)
            given = [list(theirs.encode(text, add_special_tokens=False)) for text in texts]
    except (
        Exception
    ):  # code that the model brings along, or a package that is missing: nothing to compare with
        return []
    return [
        f"mlx-lm's {type(theirs._tokenizer).__name__} gives some texts other tokens than {path.name}, {text!r} for "
        f"one; the GGUF follows {path.name}"
        for text, a, b in zip(texts, given, wanted, strict=True)
        if a != b
    ][:1]


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: cannot be read: expected a JSON object")
    return value


def _from_json(path: Path, tokenizer: dict[str, Any], settings: dict[str, Any]) -> Vocabulary:
    model = tokenizer.get("model") or {}
    steps = flat(tokenizer.get("pre_tokenizer"), "pretokenizers")
    if model.get("type") != "BPE":
        raise refuse(path, f"is a {model.get('type')} tokenizer")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise refuse(path, "marks the inside or the end of words")
    if any(step["type"] == "ByteLevel" for step in steps):
        pre, notes = name_cuts(path, tokenizer, settings.get("gguf_tokenizer_pre"))
        tokens = [""] * (1 + max(model["vocab"].values()))
        for token, i in model["vocab"].items():
            tokens[i] = token
        types = [NORMAL if token else UNUSED for token in tokens]
        merges = [f"{left} {right}" for left, right in merge_pairs(model)]
        vocabulary = Vocabulary(tokens, types, pre, merges, notes=notes)
    elif model.get("byte_fallback"):
        vocabulary = _of_pieces(pieces_from_json(path, tokenizer))
    else:
        raise refuse(path, "is a BPE without bytes (no ByteLevel pre-tokenizer, no byte_fallback)")
    _add_tokens(vocabulary, tokenizer.get("added_tokens") or [])
    for step in flat(tokenizer.get("post_processor"), "processors"):
        if step["type"] == "TemplateProcessing":
            _read_template(vocabulary, step["single"])
        elif step["type"] != "ByteLevel":
            raise refuse(path, f"has a post-processor {step['type']}, which llama.cpp has not")
    return vocabulary


def _from_proto(path: Path, settings: dict[str, Any]) -> Vocabulary:
    vocabulary = _of_pieces(pieces_from_proto(path))
    added = _json(path.with_name("added_tokens.json"))
    tokens = [{"id": i, "content": content, "special": True} for content, i in added.items()]
    tokens += [{"id": int(i), **token} for i, token in settings.get("added_tokens_decoder", {}).items()]
    _add_tokens(vocabulary, tokens)
    for name, affix, default in (("bos", vocabulary.before, True), ("eos", vocabulary.after, False)):
        token = _content(settings.get(f"{name}_token"))
        if token and settings.get(f"add_{name}_token", default):
            affix.append(token)
    return vocabulary


def _of_pieces(pieces: Pieces) -> Vocabulary:
    return Vocabulary(
        pieces.tokens,
        pieces.types,
        scores=pieces.scores,
        add_space_prefix=pieces.add_space_prefix,
        notes=pieces.notes,
    )


def _add_tokens(vocabulary: Vocabulary, added: list[dict[str, Any]]) -> None:
    """Give every added token its place and type."""
    strips = False
    for token in added:
        i, content = token["id"], token["content"]
        _grow(vocabulary, i + 1)
        vocabulary.strips_right |= bool(token.get("rstrip"))
        strips |= bool(token.get("lstrip") or token.get("single_word"))
        if vocabulary.scores is not None and "▁" in content and not token.get("special"):
            if not token.get("normalized"):
                continue  # found in text that already says ▁: a piece like any other for text with spaces
            content = content.replace("▁", " ")  # llama.cpp looks for it before it has marked the spaces
        vocabulary.tokens[i] = content
        if vocabulary.types[i] not in (UNKNOWN, BYTE):
            vocabulary.types[i] = CONTROL if token.get("special") else USER_DEFINED
    if strips:
        vocabulary.notes.append(
            "some special tokens take the spaces before them in mlx-lm, none do in llama.cpp"
        )


def _grow(vocabulary: Vocabulary, size: int) -> None:
    missing = max(0, size - len(vocabulary.tokens))
    vocabulary.tokens += [""] * missing
    vocabulary.types += [UNUSED] * missing
    if vocabulary.scores is not None:
        vocabulary.scores += [0.0] * missing


def _fit(vocabulary: Vocabulary, size: int) -> None:
    """Make the vocabulary as long as the embedding, as llama.cpp wants it, and name the ids without a token."""
    extra = [token for token in vocabulary.tokens[size:] if token]
    if extra:
        vocabulary.notes.append(
            f"left out {len(extra)} tokens that have no embedding: {', '.join(extra[:5])}"
        )
    _grow(vocabulary, size)
    del vocabulary.tokens[size:], vocabulary.types[size:]
    if vocabulary.scores is not None:
        del vocabulary.scores[size:]
    vocabulary.tokens[:] = [token or f"[PAD{i}]" for i, token in enumerate(vocabulary.tokens)]


def _read_template(vocabulary: Vocabulary, single: list[dict[str, Any]]) -> None:
    affix = vocabulary.before
    for part in single:
        if "Sequence" in part:
            affix = vocabulary.after
        else:
            affix.append(part["SpecialToken"]["id"])


def _listed(source: dict[str, Any], key: str, size: int) -> list[int]:
    """Return the ids under `key` (one or a list) that are tokens."""
    value = source.get(key)
    return [
        i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int) and 0 <= i < size
    ]


def _content(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def _set_special(
    vocabulary: Vocabulary, settings: dict[str, Any], config: dict[str, Any], generation: dict[str, Any]
) -> None:
    """Fill in special ids (the tokenizer's before the config's) and what is put around every text."""
    ids = {token: i for i, token in enumerate(vocabulary.tokens)}
    ends: list[int] = []
    for name in ("bos", "eos", "unk", "pad"):
        listed = _listed(config, f"{name}_token_id", len(ids)) + _listed(
            generation, f"{name}_token_id", len(ids)
        )
        token = _content(settings.get(f"{name}_token"))
        if token in ids:
            vocabulary.special[name] = ids[token]
        elif listed:
            vocabulary.special[name] = listed[0]
        if name == "eos":
            ends = listed
    # Chat models may stop at more than one token; GGUF has a second place, and llama.cpp knows the common names.
    if others := [i for i in ends if i != vocabulary.special["eos"]]:
        vocabulary.special["eot"] = others[0]
    for name, affix in (("bos", vocabulary.before), ("eos", vocabulary.after)):
        own = vocabulary.tokens[vocabulary.special[name]] if name in vocabulary.special else None
        if affix == [own]:
            setattr(vocabulary, f"add_{name}", True)
        elif affix:
            side = "before" if name == "bos" else "after"
            vocabulary.notes.append(f"mlx-lm puts {''.join(affix)} {side} every text, llama.cpp does not")
