"""Pre-tokenizers in GGUF: llama.cpp cuts text into the same words as the tokenizers package, or a note says how not."""

import json
import os
import unicodedata
from pathlib import Path

import pytest
from tokenizers import Tokenizer, normalizers

from nalora_mlx.core.errors import InputError
from nalora_mlx.export.gguf.vocabulary.pretokenizer_table import (
    BYTE_LEVEL,
    DIFFERENCES,
    PRE_TOKENIZERS,
    PreTokenizer,
)
from nalora_mlx.export.gguf.vocabulary.pretokenizers import identify_pretokenizer
from nalora_mlx.export.gguf.vocabulary.tokenizer import read_vocabulary
from nalora_mlx.export.gguf.vocabulary.tokenizer_check import compare_with_mlx_lm
from tests.interop import llama_cpp
from tests.interop.gguf_tokenizers import (
    CHAT,
    WordVocabulary,
    byte_level,
    pre_tokenizer,
    same_tokens,
    save,
    short_pieces,
    vocabulary_file,
    write,
)
from tests.interop.nasty_texts import AFFECTED, ASCII, SCRIPTS, UNCASED

llama_cpp.require()

ROWS = pytest.mark.parametrize("row", PRE_TOKENIZERS, ids=lambda row: f"{row.name}-{len(row.patterns[0])}")
PATTERNS = {row.name: row.patterns for row in PRE_TOKENIZERS}
REAL = Path(__file__).parents[3] / "shared/data/tokenizers"


def affected(differs):
    return {script for difference in differs for script in AFFECTED[difference]}


@pytest.fixture(scope="module")
def words():
    """Return short pieces of every script, and a vocabulary that shows the words that they are cut into."""
    pieces = {script: short_pieces([text]) for script, text in SCRIPTS.items()}
    return pieces, WordVocabulary([piece for found in pieces.values() for piece in found])


@ROWS
def test_llama_cpp_cuts_the_same_words(tmp_path, words, row):
    pieces, vocabulary = words
    splitter = pre_tokenizer(row.patterns)
    texts = [(script, piece) for script, found in pieces.items() for piece in found]
    names = [(row.name, row.differs), *([row.closer] if row.closer else [])]
    for name, differs in names:
        cut = vocabulary.words(tmp_path, name, [piece for _, piece in texts])
        different = {
            script
            for (script, piece), found in zip(texts, cut, strict=True)
            if found != [word for word, _ in splitter.pre_tokenize_str(piece)]
        }
        assert different <= affected(differs)
        for difference in differs:  # every note is true
            assert different & set(AFFECTED[difference]), difference


@ROWS
def test_tokens_are_the_same_in_all_scripts(tmp_path, row):
    tokenizer = byte_level(row.patterns, ignore_merges=row.ignore_merges)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    vocabulary, path = vocabulary_file(tmp_path, tokenizer.get_vocab_size())
    assert vocabulary.pretokenizer == row.name
    assert [note for note in vocabulary.notes if note in DIFFERENCES.values()] or not row.differs
    exempt = affected(row.differs)
    with llama_cpp.Llama(path, vocab_only=True) as llama:
        for script, text in SCRIPTS.items():
            if script not in exempt:
                chat = f"<|im_start|>{text}<tool> {text}<|im_end|>\n"
                assert llama.tokenize(chat) == tokenizer.encode(chat, add_special_tokens=False).ids, script


def test_rows_cut_the_texts_differently(words):
    pieces = [piece for found in words[0].values() for piece in found]
    cuts = {
        row.patterns: [pre_tokenizer(row.patterns).pre_tokenize_str(p) for p in pieces]
        for row in PRE_TOKENIZERS
    }
    same = [(a, b) for a in cuts for b in cuts if a != b and cuts[a] == cuts[b]]
    assert same == []


# Regular expressions of other tokenizers, and the name with which llama.cpp cuts the same words.
GPT4 = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|%s| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
UNSLASHED = PATTERNS["gpt-4o"][0].replace("[\\r\\n/]*", "[\\r\\n]*")
EQUIVALENT = {
    "cl100k": ([GPT4 % r"\p{N}{1,3}"], "dbrx"),
    "bailing": ([GPT4 % r"\p{N}"], "qwen2"),
    "digits first": ([r"\p{N}{1,3}", PATTERNS["dbrx"][0]], "minicpm5"),
    "one digit": ([PATTERNS["qwen2"][0].replace(r"\p{N}|", r"\p{N}{1}|")], "qwen2"),
    "two digits": ([GPT4 % r"\p{N}{1,2}"], None),
    "without contractions": ([PATTERNS["qwen2"][0].partition("|[")[2].join(["[", ""])], None),
    "no slash": ([UNSLASHED], None),
    "one more character": (["\u2e3a|" + PATTERNS["qwen2"][0]], None),
}


@pytest.mark.parametrize("case", EQUIVALENT)
def test_other_expressions_are_recognized_by_their_words(tmp_path, words, case):
    patterns, expected = EQUIVALENT[case]
    save(tmp_path, byte_level(patterns))
    if expected is None:
        with pytest.raises(InputError, match="unknown pre-tokenizer"):
            read_vocabulary(tmp_path, {}, 1600)
        return
    assert read_vocabulary(tmp_path, {}, 1600).pretokenizer == expected
    pieces = [piece for found in words[0].values() for piece in found]
    splitter = pre_tokenizer(patterns)
    expected_words = [[word for word, _ in splitter.pre_tokenize_str(piece)] for piece in pieces]
    assert words[1].words(tmp_path, expected, pieces) == expected_words


def test_ignore_merges_is_accepted_if_merges_reach_every_token(tmp_path):
    tokenizer = byte_level(PATTERNS["qwen2"], ignore_merges=True)
    assert same_tokens(tmp_path, tokenizer, CHAT).pretokenizer == "qwen2"


def test_ignore_merges_is_rejected_if_it_has_an_effect(tmp_path):
    content = json.loads(byte_level(PATTERNS["qwen2"], ignore_merges=True).to_str())
    content["model"]["merges"] = content["model"]["merges"][:-50]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="unknown pre-tokenizer"):
        read_vocabulary(tmp_path, {}, 1600)


def test_gguf_tokenizer_pre_is_used_for_unknown_patterns(tmp_path):
    save(tmp_path, byte_level(["[a-z]+"]))
    with pytest.raises(InputError, match=r"supported are .*gpt-2.*llama-bpe.*SentencePiece"):
        read_vocabulary(tmp_path, {}, 1600)
    save(tmp_path, byte_level(["[a-z]+"]), gguf_tokenizer_pre="falcon")
    vocabulary, path = vocabulary_file(tmp_path, 1600)
    assert vocabulary.pretokenizer == "falcon"
    with llama_cpp.Llama(path, vocab_only=True) as llama:
        assert llama.tokenize("a")


def test_known_patterns_override_gguf_tokenizer_pre(tmp_path):
    save(tmp_path, byte_level([BYTE_LEVEL]), gguf_tokenizer_pre="smollm")
    vocabulary = same_tokens(tmp_path, byte_level([BYTE_LEVEL]), CHAT)
    assert vocabulary.pretokenizer == "gpt-2"


def test_joined_digits_are_noted_only_if_there_are_such_tokens():
    row = next(row for row in PRE_TOKENIZERS if row.name == "deepseek-llm")
    for vocab, noted in (({"1": 0, "a1": 1}, False), ({"1": 0, "12": 1}, True)):
        content = {"model": {"vocab": vocab}, "pre_tokenizer": row.as_json()}
        _, notes = identify_pretokenizer(Path("tokenizer.json"), content, None)
        assert (DIFFERENCES["digits"] in notes) == noted


def test_gguf_tokenizer_pre_may_ask_for_a_closer_name(tmp_path):
    tokenizer = byte_level(PATTERNS["gpt-4o"])
    save(tmp_path, tokenizer)
    vocabulary, path = vocabulary_file(tmp_path, tokenizer.get_vocab_size())
    remedy = next(note for note in vocabulary.notes if "combining marks" in note)
    assert '"gguf_tokenizer_pre": "granite-embed-multi-97m"' in remedy
    save(tmp_path, tokenizer, gguf_tokenizer_pre="granite-embed-multi-97m")
    vocabulary, path = vocabulary_file(tmp_path, tokenizer.get_vocab_size())
    assert not any("combining marks" in note for note in vocabulary.notes)
    text = SCRIPTS["Devanagari"] + SCRIPTS["Hebrew with vowels"]
    with llama_cpp.Llama(path, vocab_only=True) as llama:
        assert llama.tokenize(text) == tokenizer.encode(text).ids
    vocabulary.pretokenizer = "gpt-4o"
    with llama_cpp.Llama(write(tmp_path, vocabulary), vocab_only=True) as llama:
        assert llama.tokenize(text) != tokenizer.encode(text).ids


def test_normalizer_gives_a_note(tmp_path):
    tokenizer = byte_level([BYTE_LEVEL])
    tokenizer.normalizer = normalizers.NFC()
    vocabulary = same_tokens(tmp_path, tokenizer, ASCII + UNCASED)
    assert any("NFC" in note for note in vocabulary.notes)


@pytest.mark.parametrize("name", ["qwen3", "deepseek_v3", "mistral_nemo"])
def test_real_tokenizers_give_the_same_tokens_and_ends(tmp_path, name):
    directory = Path(os.environ.get("NALORA_TOKENIZERS", REAL)) / name
    if not directory.exists():
        pytest.skip("the tokenizers of real models are not here; set NALORA_TOKENIZERS to their directory")
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    vocabulary = read_vocabulary(directory, {}, tokenizer.get_vocab_size())
    row = next(row for row in PRE_TOKENIZERS if row.name == vocabulary.pretokenizer)
    exempt = affected(row.differs)
    assert compare_with_mlx_lm(directory, vocabulary) == []  # the ends are equal, too
    special = [t for t, kind in zip(vocabulary.tokens, vocabulary.types, strict=True) if kind == 3][:20]
    with llama_cpp.Llama(write(tmp_path, vocabulary), vocab_only=True) as llama:
        for script, text in SCRIPTS.items():
            if tokenizer.normalizer is not None:
                text = unicodedata.normalize("NFC", text)
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            assert (llama.tokenize(text) == ids) or script in exempt, script
        for token in special:
            chat = f"a{token}b {token} c"
            assert llama.tokenize(chat) == tokenizer.encode(chat, add_special_tokens=False).ids
        ends = {i for i in range(len(vocabulary.tokens)) if llama.llama.llama_vocab_is_eog(llama.vocab, i)}
    assert set(vocabulary.ends) <= ends
    named = {vocabulary.tokens[i] for i in ends - set(vocabulary.ends)}
    assert all(any(token in note for note in vocabulary.notes) for token in named)


def test_pretokenizer_as_json_is_the_one_in_the_tests():
    text = "".join(SCRIPTS.values())
    for row in (*PRE_TOKENIZERS, PreTokenizer("x", ("[a-c]+", BYTE_LEVEL))):
        content = {"model": {"type": "BPE", "vocab": {}, "merges": []}, "pre_tokenizer": row.as_json()}
        found = Tokenizer.from_str(json.dumps(content)).pre_tokenizer.pre_tokenize_str(text)
        assert found == pre_tokenizer(row.patterns).pre_tokenize_str(text)
