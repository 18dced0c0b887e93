"""Small tokenizers for the tests of GGUF's vocabularies, and their files in llama.cpp."""

import json
import random
from functools import cache
from itertools import combinations
from pathlib import Path

import pytest
from mlx_lm.tokenizer_utils import load
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from nalora_mlx.export.gguf.vocabulary.pretokenizer_table import BYTE_LEVEL, DIGITS
from nalora_mlx.export.gguf.vocabulary.tokenizer import Vocabulary, read_vocabulary
from nalora_mlx.export.gguf.vocabulary.tokenizer_check import compare_with_mlx_lm
from tests.interop import llama_cpp
from tests.interop.nasty_texts import TEXT, TRAINING

gguf = pytest.importorskip("gguf", reason="needs gguf: pip install 'nalora-mlx[export]'")

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT = f"<|im_start|>user\n{TEXT}<|im_end|>\n<|im_start|>assistant\n<tool> x <tool><|im_end|>"


def vocabulary_file(directory, size, **config):
    """Write a GGUF with only the tokenizer in `directory`; return its vocabulary and path."""
    vocabulary = read_vocabulary(directory, config, size)
    return vocabulary, write(directory, vocabulary)


def write(directory: Path, vocabulary: Vocabulary) -> Path:
    path = directory / "vocabulary.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    vocabulary.write(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return path


def save(directory, tokenizer, **settings):
    """Save tokenizer.json and tokenizer_config.json."""
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def same_tokens(directory, tokenizer, text, *, affixes=False):
    """Assert that llama.cpp tokenizes `text` like `tokenizer`, and so does mlx-lm unless a note says otherwise."""
    tokenizer.save(str(directory / "tokenizer.json"))
    if not (directory / "tokenizer_config.json").exists():
        (directory / "tokenizer_config.json").write_text("{}")
    vocabulary, path = vocabulary_file(directory, tokenizer.get_vocab_size())
    expected = tokenizer.encode(text, add_special_tokens=affixes)
    with llama_cpp.Llama(path, vocab_only=True) as llama:
        actual = llama.tokenize(text, affixes=affixes)
    if actual != expected.ids:
        differing = next(i for i, (a, b) in enumerate(zip(actual, expected.ids, strict=False)) if a != b)
        near = expected.offsets[differing][0]
        pytest.fail(f"differ at {text[max(0, near - 10) : near + 10]!r}")
    notes = compare_with_mlx_lm(directory, vocabulary)
    assert notes or load(directory).encode(text, add_special_tokens=affixes) == expected.ids
    vocabulary.notes += notes
    return vocabulary


def pre_tokenizer(patterns):
    steps = []
    for pattern in patterns:
        if pattern == BYTE_LEVEL:
            steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True))
        elif pattern == DIGITS:
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        else:
            steps.append(pre_tokenizers.Split(Regex(pattern), "isolated"))
    if BYTE_LEVEL not in patterns:
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    return pre_tokenizers.Sequence(steps)


@cache
def _trained(size):
    """Train a byte-level BPE without splits, so that its merges cross word boundaries and every split has an effect."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer(())
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TRAINING, trainer)
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    return tokenizer.to_str()


def byte_level(patterns, *, ignore_merges=False, size=1500):
    """Return a byte-level BPE with a pre-tokenizer that splits by regular expressions."""
    content = json.loads(_trained(size))
    content["model"]["ignore_merges"] = ignore_merges
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.pre_tokenizer = pre_tokenizer(patterns)
    return tokenizer


class WordVocabulary:
    """A vocabulary with every part of the given texts, so that a pre-tokenizer's words become one token each."""

    def __init__(self, texts):
        encode = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        ids = {character: i for i, character in enumerate(pre_tokenizers.ByteLevel.alphabet())}
        merges = {}
        for text in texts:
            (word, _), *_ = encode.pre_tokenize_str(text)
            for start, end in combinations(range(len(word) + 1), 2):
                ids.setdefault(word[start:end], len(ids))
                for middle in range(start + 1, end):
                    merges.setdefault(f"{word[start:middle]} {word[middle:end]}")
        self.tokens = list(ids)
        types = [1] * len(ids)
        self.vocabulary = Vocabulary(self.tokens, types, "gpt-2", list(merges), special={"bos": 0, "eos": 0})

    def words(self, directory, name, texts):
        """Return the words into which llama.cpp's pre-tokenizer cuts each text, in GPT-2's characters for bytes."""
        self.vocabulary.pretokenizer = name
        with llama_cpp.Llama(write(directory, self.vocabulary), vocab_only=True) as llama:
            return [[self.tokens[i] for i in llama.tokenize(text)] for text in texts]


def short_pieces(texts, size=14):
    """Cut texts at random into pieces of at most `size` bytes."""
    generator, pieces = random.Random(0), []
    for text in texts:
        piece = ""
        for character in text:
            if len((piece + character).encode()) > size or (len(piece) > 4 and generator.random() < 0.05):
                pieces.append(piece)
                piece = piece[-1]
            piece += character
        pieces.append(piece)
    return list(dict.fromkeys(pieces))
