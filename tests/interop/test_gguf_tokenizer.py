"""Tokenizers in GGUF: llama.cpp gives the same tokens as the tokenizers and sentencepiece packages."""

import ast
import io
import json

import pytest
from mlx_lm.tokenizer_utils import load
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from nalora_mlx.core.errors import InputError
from nalora_mlx.export.gguf.pretokenizers import BYTE_LEVEL, DIGITS, PRE_TOKENIZERS
from nalora_mlx.export.gguf.tokenizer import compare_with_mlx_lm, read_vocabulary
from tests.interop import llama_cpp
from tests.interop.nasty_texts import ASCII, TEXT, TRAINING, UNCASED

gguf = pytest.importorskip("gguf", reason="needs gguf: pip install 'nalora-mlx[export]'")
llama_cpp.require()

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT = f"<|im_start|>user\n{TEXT}<|im_end|>\n<|im_start|>assistant\n<tool> x <tool><|im_end|>"


def vocabulary_file(tmp_path, size, **config):
    """Write a GGUF with only the tokenizer in tmp_path; return its vocabulary and path."""
    vocabulary = read_vocabulary(tmp_path, config, size)
    return vocabulary, write(tmp_path, vocabulary)


def write(tmp_path, vocabulary):
    path = tmp_path / "vocabulary.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    vocabulary.write(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return path


def same_tokens(tmp_path, tokenizer, text, *, affixes=False):
    """Assert that llama.cpp tokenizes `text` like `tokenizer`, and so does mlx-lm unless a note says otherwise."""
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    if not (tmp_path / "tokenizer_config.json").exists():
        (tmp_path / "tokenizer_config.json").write_text("{}")
    vocabulary, path = vocabulary_file(tmp_path, tokenizer.get_vocab_size())
    expected = tokenizer.encode(text, add_special_tokens=affixes)
    with llama_cpp.Llama(path, vocab_only=True) as llama:
        actual = llama.tokenize(text, affixes=affixes)
    if actual != expected.ids:
        differing = next(i for i, (a, b) in enumerate(zip(actual, expected.ids, strict=False)) if a != b)
        near = expected.offsets[differing][0]
        pytest.fail(f"differ at {text[max(0, near - 10) : near + 10]!r}")
    notes = compare_with_mlx_lm(tmp_path, vocabulary)
    assert notes or load(tmp_path).encode(text, add_special_tokens=affixes) == expected.ids
    vocabulary.notes += notes
    return vocabulary


# --- byte-level BPE ----------------------------------------------------------------------------------


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


def byte_level(patterns, *, ignore_merges=False, size=1500):
    """Train a byte-level BPE without splits, so that its merges cross word boundaries and every split has an effect."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizer(())
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TRAINING, trainer)
    tokenizer.pre_tokenizer = pre_tokenizer(patterns)
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    return tokenizer


@pytest.mark.parametrize("row", PRE_TOKENIZERS, ids=lambda row: f"{row.name}-{len(row.patterns[0])}")
def test_every_pretokenizer_gives_the_same_tokens(tmp_path, row):
    tokenizer = byte_level(row.patterns, ignore_merges=row.ignore_merges)
    text = ASCII + UNCASED if row.note else CHAT
    vocabulary = same_tokens(tmp_path, tokenizer, text)
    assert vocabulary.pretokenizer == row.name
    # The name of any other row gives different tokens, so the test text distinguishes them.
    same_splits = {"dbrx", "llama-bpe"}
    others = {other.name for other in PRE_TOKENIZERS} - (
        same_splits if row.name in same_splits else {row.name}
    )
    expected = tokenizer.encode(text, add_special_tokens=False).ids
    for other in others:
        vocabulary.pretokenizer = other
        with llama_cpp.Llama(write(tmp_path, vocabulary), vocab_only=True) as llama:
            assert llama.tokenize(text) != expected, other


def test_bos_and_eos_are_added_as_the_post_processor_says(tmp_path):
    tokenizer = byte_level([BYTE_LEVEL])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
    )
    bos = {"__type": "AddedToken", "content": "<|im_start|>"}
    settings = {"bos_token": bos, "eos_token": "<|im_end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    vocabulary = same_tokens(tmp_path, tokenizer, "Hello world", affixes=True)
    assert vocabulary.special == {"bos": 1, "eos": 2}


def test_special_tokens_come_from_the_tokenizer_before_the_config(tmp_path):
    tokenizer = byte_level([BYTE_LEVEL])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    vocabulary, path = vocabulary_file(tmp_path, 1600, bos_token_id=1, pad_token_id=0)
    assert vocabulary.special == {"bos": 1, "eos": 2, "pad": 0, "eot": 0}
    with llama_cpp.Llama(path, vocab_only=True) as llama:
        native, words = llama.llama, llama.vocab
        assert native.llama_vocab_n_tokens(words) == 1600
        assert (native.llama_vocab_bos(words), native.llama_vocab_eos(words)) == (1, 2)
        assert [i for i in range(1600) if native.llama_vocab_is_eog(words, i)] == [0, 2]
        assert not native.llama_vocab_get_add_bos(words)
        assert native.llama_model_chat_template(llama.model, None) == b"{{ messages }}"
        assert llama.tokenize("<|im_end|>", special=False) != [
            2
        ]  # user text is not parsed as a control token


def test_tokens_without_an_embedding_are_left_out(tmp_path):
    byte_level([BYTE_LEVEL], size=400).save(str(tmp_path / "tokenizer.json"))
    vocabulary, _ = vocabulary_file(tmp_path, 400)
    assert len(vocabulary.tokens) == 400
    assert "<tool>" in " ".join(vocabulary.notes)


def test_normalizer_gives_a_note(tmp_path):
    tokenizer = byte_level([BYTE_LEVEL])
    tokenizer.normalizer = normalizers.NFC()
    vocabulary = same_tokens(tmp_path, tokenizer, ASCII + UNCASED)
    assert any("NFC" in note for note in vocabulary.notes)


def test_ignore_merges_is_accepted_if_merges_reach_every_token(tmp_path):
    qwen2 = next(row for row in PRE_TOKENIZERS if row.name == "qwen2")
    assert same_tokens(tmp_path, byte_level(qwen2.patterns, ignore_merges=True), CHAT).pretokenizer == "qwen2"


def test_ignore_merges_is_rejected_if_it_has_an_effect(tmp_path):
    qwen2 = next(row for row in PRE_TOKENIZERS if row.name == "qwen2")
    content = json.loads(byte_level(qwen2.patterns, ignore_merges=True).to_str())
    content["model"]["merges"] = content["model"]["merges"][:-50]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="unknown pre-tokenizer"):
        read_vocabulary(tmp_path, {}, 1600)


def test_gguf_tokenizer_pre_is_used_for_unknown_patterns(tmp_path):
    tokenizer = byte_level(["[a-z]+"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match=r"supported are .*gpt-2.*llama-bpe.*SentencePiece"):
        read_vocabulary(tmp_path, {}, 1600)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"gguf_tokenizer_pre": "deepseek-llm"}))
    vocabulary, path = vocabulary_file(tmp_path, 1600)
    assert vocabulary.pretokenizer == "deepseek-llm"
    with llama_cpp.Llama(path, vocab_only=True) as llama:
        assert llama.tokenize("a")


def test_known_patterns_override_gguf_tokenizer_pre(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"gguf_tokenizer_pre": "smollm"}))
    vocabulary = same_tokens(tmp_path, byte_level([BYTE_LEVEL]), CHAT)
    assert vocabulary.pretokenizer == "gpt-2"
    assert any("smollm" in note for note in vocabulary.notes)


# --- tokenizer classes of mlx-lm ---------------------------------------------------------------------

PATTERNS = {row.name: row.patterns for row in PRE_TOKENIZERS}
# (kind of tokenizer.json, tokenizer_class in tokenizer_config.json, whether mlx-lm then gives the file's tokens)
CLASSES = [
    ("smollm", "PreTrainedTokenizerFast", True),
    ("smollm", "LlamaTokenizerFast", True),
    ("smollm", "GPT2Tokenizer", False),
    ("gpt-2", "GPT2Tokenizer", True),
    ("gpt-2", "CodeGenTokenizer", True),
    ("llama-bpe", "PreTrainedTokenizerFast", True),
    ("qwen2", "Qwen2Tokenizer", True),
    ("llama-bpe", "Qwen2Tokenizer", False),
    ("gemma", "GemmaTokenizer", True),
    ("gemma", "LlamaTokenizer", False),
    ("llama", "LlamaTokenizer", False),
    ("llama", "PreTrainedTokenizerFast", True),
]


@pytest.mark.parametrize(("made", "name", "same"), CLASSES)
def test_note_if_mlx_lm_tokenizes_differently(tmp_path, made, name, same):
    if made in PATTERNS:
        tokenizer = byte_level(PATTERNS[made], ignore_merges=made == "llama-bpe")
        if made == "qwen2":
            tokenizer.normalizer = normalizers.NFC()  # like the real one
    else:
        tokenizer = converted(sentencepiece_model(user_defined_symbols=["<tool>"])[1], made)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
    vocabulary = same_tokens(tmp_path, tokenizer, ASCII + UNCASED)
    notes = [n for n in vocabulary.notes if "tokenizes some texts differently from tokenizer.json" in n]
    assert [note.split()[1] for note in notes] == ([] if same else [name])
    mlx_lm_tokenizer = load(tmp_path)
    if not same:  # the example in the note is right
        text = ast.literal_eval(notes[0].partition("for example ")[2].rpartition("; the GGUF")[0])
        assert mlx_lm_tokenizer.encode(text) != tokenizer.encode(text).ids


def test_sentencepiece_file_is_compared_with_mlx_lm(tmp_path):
    data, processor = sentencepiece_model(prefix=False)
    (tmp_path / "tokenizer.model").write_bytes(data)
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    for more, same in (({}, False), ({"tokenizer_class": "PreTrainedTokenizerFast"}, True)):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | more))
        vocabulary, _ = vocabulary_file(tmp_path, processor.get_piece_size())
        assert bool(compare_with_mlx_lm(tmp_path, vocabulary)) != same


# --- SentencePiece -----------------------------------------------------------------------------------


def sentencepiece_model(*, prefix=True, **changes):
    sentencepiece = pytest.importorskip("sentencepiece")
    file = io.BytesIO()
    settings = {
        "vocab_size": 700,
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": prefix,
        "character_coverage": 0.98,
        "control_symbols": ["<|im_start|>", "<|im_end|>"],
        "user_defined_symbols": ["<tool>", "\u2581\u2581\u2581"],
        "minloglevel": 2,
    }
    lines = iter([line for text in TRAINING for line in text.splitlines()])
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=file, **(settings | changes)
    )
    return file.getvalue(), sentencepiece.SentencePieceProcessor(model_proto=file.getvalue())


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_gives_the_same_tokens(tmp_path, prefix):
    # With a prefix space, llama.cpp adds one after every user-defined token, so that case has none.
    own = {"user_defined_symbols": []} if prefix else {}
    data, processor = sentencepiece_model(prefix=prefix, **own)
    (tmp_path / "tokenizer.model").write_bytes(data)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    vocabulary, path = vocabulary_file(tmp_path, processor.get_piece_size())
    assert vocabulary.special["bos"] == processor.bos_id()
    with llama_cpp.Llama(path, vocab_only=True) as llama:
        for text in (TEXT, "a <tool> b", "x"):
            assert llama.tokenize(text) == processor.encode(text)
            assert llama.tokenize(text, affixes=True) == [processor.bos_id(), *processor.encode(text)]
        assert llama.tokenize("<|im_start|>") == [processor.piece_to_id("<|im_start|>")]


def converted(processor, style):
    """Convert a SentencePiece model to tokenizer.json: the merges are all pairs of pieces, best score first."""
    pieces = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
    ids = {piece: i for i, piece in enumerate(pieces)}
    own = {"<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<tool>"}
    merges = [
        (-processor.get_score(i), piece[:cut], piece[cut:])
        for i, piece in enumerate(pieces)
        for cut in range(1, len(piece))
        if piece not in own and {piece[:cut], piece[cut:]} <= ids.keys() - own
    ]
    merges = [(left, right) for _, left, right in sorted(merges, key=lambda merge: merge[0])]
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", "\u2581")
    if style == "llama":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), replace])
    elif style == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("\u2581", prepend_scheme="always", split=False)
    else:
        tokenizer.normalizer = replace
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in sorted(own - {"<tool>"})])
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False)])
    return tokenizer


@pytest.mark.parametrize("style", ["llama", "metaspace", "gemma"])
def test_sentencepiece_as_tokenizer_json_gives_the_same_tokens(tmp_path, style):
    _, processor = sentencepiece_model(user_defined_symbols=["<tool>"])
    vocabulary = same_tokens(tmp_path, converted(processor, style), TEXT)
    assert vocabulary.add_space_prefix == (style != "gemma")
    chat = (
        CHAT.replace("> x", ">x") if style == "metaspace" else CHAT
    )  # Metaspace joins two spaces after a token
    same_tokens(tmp_path, converted(processor, style), chat)


def test_bpe_not_made_by_sentencepiece_is_rejected(tmp_path):
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    tokenizer.train_from_iterator(TRAINING, trainers.BpeTrainer(vocab_size=500, show_progress=False))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match="not made by SentencePiece"):
        read_vocabulary(tmp_path, {}, 500)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"model_type": "unigram"}, "Unigram"), ({"byte_fallback": False}, "byte fallback")],
)
def test_other_sentencepiece_models_are_rejected(tmp_path, changes, message):
    data, processor = sentencepiece_model(**changes)
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(InputError, match=message):
        read_vocabulary(tmp_path, {}, processor.get_piece_size())


@pytest.mark.parametrize("data", [b"", b"\x0a\xff", b"not a model", bytes(range(256))])
def test_damaged_tokenizer_model_is_rejected(tmp_path, data):
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(InputError, match=r"tokenizer\.model"):
        read_vocabulary(tmp_path, {}, 100)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (models.WordLevel({"<unk>": 0}, unk_token="<unk>"), "WordLevel"),
        (models.Unigram([("<unk>", 0.0)], 0, False), "Unigram"),
        (models.BPE(), "without bytes"),
    ],
)
def test_other_tokenizers_are_rejected(tmp_path, model, message):
    Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match=message):
        read_vocabulary(tmp_path, {}, 100)


def test_missing_tokenizer_is_reported(tmp_path):
    with pytest.raises(InputError, match=r"no tokenizer\.json"):
        read_vocabulary(tmp_path, {}, 100)
