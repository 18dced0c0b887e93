"""Tokenizers in GGUF: byte-level BPE or SentencePiece BPE, special tokens and chat template.

tokenizer.json takes precedence over other files, as in mlx-lm.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nalora_mlx.core import storage
from nalora_mlx.core.errors import InputError
from nalora_mlx.core.notices import Note
from nalora_mlx.export.gguf.vocabulary.declared_tokens import (
    AddedToken,
    DeclaredTokens,
    read_declared_tokens,
    read_optional_json,
)
from nalora_mlx.export.gguf.vocabulary.ends import assign_ends, configured_ends
from nalora_mlx.export.gguf.vocabulary.pieces import (
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
from nalora_mlx.export.gguf.vocabulary.pretokenizers import (
    flatten_steps,
    identify_pretokenizer,
    unsupported_tokenizer,
)
from nalora_mlx.export.gguf.vocabulary.rank_files import read_tekken, read_tiktoken
from nalora_mlx.models.model_files import TEMPLATE_FILE

NO_CHAT_TEMPLATE = "the model has no chat template: programs will guess one"


@dataclass
class Vocabulary:
    """Everything that llama.cpp needs to tokenize, and notes for the user. Lists are indexed by token id."""

    tokens: list[str]
    types: list[int]
    pretokenizer: str = "default"
    merges: list[str] | None = None  # of a BPE that is not in SentencePiece's form
    scores: list[float] | None = None  # of a SentencePiece BPE
    raw: bool = False  # whether a BPE with merges works on text, with spaces as ▁, instead of bytes
    add_space_prefix: bool = False
    prefix: list[str] = field(default_factory=list)  # special tokens that mlx-lm adds before every text
    suffix: list[str] = field(default_factory=list)  # and after it
    special: dict[str, int] = field(default_factory=dict)  # bos, eos, unk, pad, eot, eom -> id
    ends: list[int] = field(default_factory=list)  # tokens that end an answer
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
        writer.add_tokenizer_model("llama" if self.merges is None else "gemma4" if self.raw else "gpt2")
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
        if len(self.ends) > 1:
            writer.add_array("tokenizer.ggml.eos_token_ids", self.ends)  # Ollama reads this
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
    path, content = read_vocabulary_file(model_dir)
    declared = read_declared_tokens(model_dir, (content or {}).get("added_tokens") or [])
    vocabulary = _from_proto(path, declared) if content is None else _from_json(path, content, declared)
    _fit_to_embedding(vocabulary, size)
    generation = read_optional_json(model_dir / "generation_config.json")
    _set_special_tokens(vocabulary, declared.names, config, generation)
    jinja = model_dir / TEMPLATE_FILE
    template = declared.settings.get("chat_template")
    if isinstance(template, dict):  # of named templates; gguf-py takes them as a list
        template = [{"name": name, "template": text} for name, text in template.items()]
    vocabulary.chat_template = jinja.read_text("utf-8") if jinja.exists() else template
    if not vocabulary.chat_template:
        vocabulary.notes.append(NO_CHAT_TEMPLATE)
    token, count = Counter(vocabulary.tokens).most_common(1)[0]
    if count > 1:
        raise InputError(f"{path}: token {token!r} occurs {count} times; llama.cpp cannot load that")
    return vocabulary


def read_vocabulary_file(model_dir: Path) -> tuple[Path, dict[str, Any] | None]:
    """Return the file that holds a model's vocabulary, and its content as in a tokenizer.json unless it is a proto."""
    readers = {
        "tokenizer.json": storage.read_json,
        "tekken.json": read_tekken,
        "tiktoken.model": read_tiktoken,
    }
    for name, read in readers.items():
        if (path := model_dir / name).exists():
            return path, read(path)
    if (path := model_dir / "tokenizer.model").exists():
        return path, None
    names = ", ".join(readers)
    raise InputError(f"{model_dir}: has no {names} or tokenizer.model; copy it from the base model")


def _from_json(path: Path, tokenizer: dict[str, Any], declared: DeclaredTokens) -> Vocabulary:
    model = tokenizer.get("model") or {}
    steps = flatten_steps(tokenizer.get("pre_tokenizer"), "pretokenizers")
    if model.get("type") != "BPE":
        raise unsupported_tokenizer(path, f"is a {model.get('type')} tokenizer")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise unsupported_tokenizer(path, "marks subwords or word ends")
    if any(step["type"] == "ByteLevel" for step in steps):
        pretokenizer, notes = identify_pretokenizer(
            path, tokenizer, declared.settings.get("gguf_tokenizer_pre")
        )
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
    _add_tokens(vocabulary, declared.added)
    for step in flatten_steps(tokenizer.get("post_processor"), "processors"):
        if step["type"] == "TemplateProcessing":
            _read_prefix_and_suffix(vocabulary, step["single"])
        elif step["type"] != "ByteLevel":
            raise unsupported_tokenizer(path, f"has a post-processor {step['type']}, which llama.cpp lacks")
    return vocabulary


def _from_proto(path: Path, declared: DeclaredTokens) -> Vocabulary:
    vocabulary = _from_pieces(pieces_from_proto(path))
    _add_tokens(vocabulary, declared.added)
    for name, affix, default in (("bos", vocabulary.prefix, True), ("eos", vocabulary.suffix, False)):
        token_text = declared.names.get(name)
        if token_text and declared.settings.get(f"add_{name}_token", default):
            affix.append(token_text)
    return vocabulary


def _from_pieces(pieces: Pieces) -> Vocabulary:
    merges = None if pieces.merges is None else [f"{left} {right}" for left, right in pieces.merges]
    return Vocabulary(
        pieces.tokens,
        pieces.types,
        pretokenizer="default" if merges is None else "gemma4",
        merges=merges,
        scores=pieces.scores,
        raw=merges is not None,
        add_space_prefix=pieces.add_space_prefix,
        notes=pieces.notes,
    )


def _add_tokens(vocabulary: Vocabulary, added: Sequence[AddedToken]) -> None:
    """Set the text and type of every added token; one with the id of another token renames that.

    llama.cpp matches control tokens only where text may contain them (chat templates), user-defined ones everywhere.
    """
    ids = {token: i for i, token in enumerate(vocabulary.tokens)}
    for token in added:
        content = token.content
        i = ids.get(content, len(vocabulary.tokens)) if token.id is None else token.id
        _extend(vocabulary, i + 1)
        vocabulary.strips_right |= "rstrip" in token.flags
        spm = vocabulary.scores is not None or vocabulary.raw
        if spm and "▁" in content and not token.special:
            if "normalized" not in token.flags:
                vocabulary.tokens[i] = content
                continue  # matches only text that contains ▁ itself: for text with spaces, an ordinary piece
            content = content.replace("▁", " ")  # llama.cpp matches it before spaces become ▁
        vocabulary.tokens[i] = content
        if vocabulary.types[i] not in (UNKNOWN, BYTE):
            vocabulary.types[i] = CONTROL if token.special else USER_DEFINED
    if any({"lstrip", "single_word"} & token.flags for token in added):
        vocabulary.notes.append(
            Note("mlx-lm strips the spaces before some special tokens of this model, llama.cpp does not")
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
        text = f"left out {len(extra)} tokens without an embedding: {', '.join(extra[:5])}"
        vocabulary.notes.append(Note(text))
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
    vocabulary: Vocabulary, names: dict[str, str], config: dict[str, Any], generation: dict[str, Any]
) -> None:
    """Set the ids of special tokens, from the tokenizer's config or else the model's, and which are added to texts."""
    ids = {token: i for i, token in enumerate(vocabulary.tokens)}
    for name in ("bos", "unk", "pad"):
        key = f"{name}_token_id"
        config_ids = _valid_ids(config.get(key), len(ids)) + _valid_ids(generation.get(key), len(ids))
        if names.get(name) in ids:
            vocabulary.special[name] = ids[names[name]]
        elif config_ids:
            vocabulary.special[name] = config_ids[0]
    eos = ids.get(names.get("eos", ""))
    configured = configured_ends(config, generation)
    vocabulary.ends, keys, notes = assign_ends(vocabulary.tokens, vocabulary.types, eos, configured)
    vocabulary.special |= keys
    vocabulary.notes += notes
    for name, affix in (("bos", vocabulary.prefix), ("eos", vocabulary.suffix)):
        token = vocabulary.tokens[vocabulary.special[name]] if name in vocabulary.special else None
        if affix == [token]:
            setattr(vocabulary, f"add_{name}", True)
        elif affix:
            side = "before" if name == "bos" else "after"
            vocabulary.notes.append(f"mlx-lm adds {''.join(affix)} {side} every text, llama.cpp does not")
    if vocabulary.raw and not vocabulary.add_bos:
        vocabulary.notes.append(
            "llama.cpp adds the beginning-of-sequence token to every text, mlx-lm does not"
        )


def _valid_ids(value: Any, size: int) -> list[int]:
    """Return the ids in a config value (one or a list) that are ids of tokens."""
    return [
        i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int) and 0 <= i < size
    ]
