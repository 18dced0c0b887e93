"""Vocabularies stored as ranks: llama.cpp gives the tokens of the tokenizer from which they were written."""

import base64
import json

import pytest
from mlx_lm.tokenizer_utils import load
from tokenizers import Tokenizer

from nalora_mlx.core.errors import InputError
from nalora_mlx.export.gguf.vocabulary.pretokenizer_table import KIMI, TEKKEN
from nalora_mlx.export.gguf.vocabulary.tokenizer import read_vocabulary
from nalora_mlx.export.gguf.vocabulary.tokenizer_check import compare_with_mlx_lm
from tests.interop import llama_cpp
from tests.interop.gguf_tokenizers import byte_level, vocabulary_file
from tests.interop.nasty_texts import ASCII, SCRIPTS, UNCASED

llama_cpp.require()

TEXT = ASCII + UNCASED + SCRIPTS["Cyrillic"] + SCRIPTS["Han"] + SCRIPTS["Greek"]
SPECIALS = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
FIRST = 10  # id of the first ranked token in tekken.json


def ranked_tokens(pattern):
    """Return a tokenizer, and the bytes of its tokens in the order of their ids, without special tokens."""
    tokenizer = byte_level([pattern], ignore_merges=True)
    content = json.loads(tokenizer.to_str())
    vocab = sorted(content["model"]["vocab"].items(), key=lambda item: item[1])
    special = {token["content"] for token in content["added_tokens"]}
    names = [token for token, _ in vocab if token not in special]
    content["added_tokens"] = []
    content["model"]["vocab"] = {token: i for i, token in enumerate(names)}
    tokenizer = Tokenizer.from_str(json.dumps(content))
    return tokenizer, [to_bytes(name) for name in names]


def to_bytes(token):
    """Undo GPT-2's representation of bytes as characters."""
    shifted = [b for b in range(256) if not (0x21 <= b <= 0x7E or 0xA1 <= b <= 0xAC or 0xAE <= b <= 0xFF)]
    return bytes(ord(c) if ord(c) < 256 else shifted[ord(c) - 256] for c in token)


def write_tekken(directory, tokens, **changes):
    count = FIRST + len(tokens)
    config = {
        "pattern": TEKKEN,
        "default_vocab_size": count,
        "default_num_special_tokens": FIRST,
        "version": "v11",
    }
    vocab = [
        {"rank": i, "token_bytes": base64.b64encode(t).decode()} for i, t in enumerate([*tokens, b"left out"])
    ]
    special = [{"rank": i, "token_str": t, "is_control": True} for i, t in enumerate(SPECIALS)]
    content = {"config": config, "vocab": vocab, "special_tokens": special} | changes
    (directory / "tekken.json").write_text(json.dumps(content))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return count


def test_tekken_json_gives_the_same_tokens(tmp_path):
    tokenizer, tokens = ranked_tokens(TEKKEN)
    vocabulary, path = vocabulary_file(tmp_path, write_tekken(tmp_path, tokens))
    assert vocabulary.pretokenizer == "tekken"
    assert vocabulary.special == {"bos": 1, "eos": 2}
    assert not any("left out" in note for note in vocabulary.notes)
    with llama_cpp.Llama(path, vocab_only=True) as llama:
        assert llama.tokenize(TEXT) == [FIRST + i for i in tokenizer.encode(TEXT).ids]
        assert llama.tokenize("[INST]a</s>") == load(tmp_path).encode("[INST]a</s>")
    assert load(tmp_path).encode(TEXT) == [FIRST + i for i in tokenizer.encode(TEXT).ids]
    assert compare_with_mlx_lm(tmp_path, vocabulary) == []


def test_tiktoken_model_of_kimi_gives_the_same_tokens(tmp_path):
    tokenizer, tokens = ranked_tokens(KIMI)
    lines = [f"{base64.b64encode(token).decode()} {i}" for i, token in enumerate(tokens)]
    (tmp_path / "tiktoken.model").write_text("\n".join(lines) + "\n")
    end = str(len(tokens) + 2)
    decoder = {end: {"content": "<|im_end|>", "special": True}}
    settings = {
        "tokenizer_class": "TikTokenTokenizer",
        "added_tokens_decoder": decoder,
        "eos_token": "<|im_end|>",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    vocabulary, path = vocabulary_file(tmp_path, len(tokens) + 16)
    assert vocabulary.pretokenizer == "kimi-k2"
    assert vocabulary.special == {"eos": int(end)}
    text = TEXT.replace("CamelCase", "").replace("xXx", "")
    with llama_cpp.Llama(path, vocab_only=True) as llama:
        assert llama.tokenize(f"{text}<|im_end|>") == [*tokenizer.encode(text).ids, int(end)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tekken.json", '{"config": {}}'),
        ("tekken.json", '{"config": {"default_num_special_tokens": 1}, "special_tokens": [], "vocab": [{}]}'),
        ("tiktoken.model", "not ranks"),
        ("tiktoken.model", "YQ== 0\nYg== 2\n"),
    ],
)
def test_damaged_files_are_rejected(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=rf"{name}: is not a"):
        read_vocabulary(tmp_path, {}, 100)


def test_tiktoken_of_another_model_is_rejected(tmp_path):
    (tmp_path / "tiktoken.model").write_text("YQ== 0\n")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "Other"}')
    with pytest.raises(InputError, match="Other"):
        read_vocabulary(tmp_path, {}, 100)
