"""Tokenizers in GGUF: llama.cpp gives the same tokens as the tokenizers and sentencepiece packages."""

import ast
import io
import json

import pytest
from mlx_lm.tokenizer_utils import load
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from nalora_mlx.core.errors import InputError
from nalora_mlx.export.gguf.vocabulary.pretokenizer_table import BYTE_LEVEL, PRE_TOKENIZERS
from nalora_mlx.export.gguf.vocabulary.tokenizer import read_vocabulary
from nalora_mlx.export.gguf.vocabulary.tokenizer_check import compare_with_mlx_lm
from tests.interop import llama_cpp
from tests.interop.gguf_tokenizers import CHAT, byte_level, same_tokens, vocabulary_file
from tests.interop.nasty_texts import ASCII, SCRIPTS, TEXT, TRAINING, UNCASED

llama_cpp.require()

# --- byte-level BPE ----------------------------------------------------------------------------------


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
        # A user's text is not parsed as a control token.
        assert llama.tokenize("<|im_end|>", special=False) != [2]


def test_tokens_without_an_embedding_are_left_out(tmp_path):
    byte_level([BYTE_LEVEL], size=400).save(str(tmp_path / "tokenizer.json"))
    vocabulary, _ = vocabulary_file(tmp_path, 400)
    assert len(vocabulary.tokens) == 400
    assert "<tool>" in " ".join(vocabulary.notes)


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
    # Metaspace joins two spaces after a token.
    chat = CHAT.replace("> x", ">x") if style == "metaspace" else CHAT
    same_tokens(tmp_path, converted(processor, style), chat)


def with_gemmas_runs(tokenizer, longest=9):
    """Add runs of line ends, tabs and spaces as Gemma has them: their merges come first, in an order of their own."""
    content = json.loads(tokenizer.to_str())
    model, characters = content["model"], "\n\u2581\t"
    runs = {c * n for c in characters for n in range(1, longest + 1)}
    merges = [merge for merge in model["merges"] if "".join(merge) not in runs]
    sizes = [(left, right) for left in range(longest, 0, -1) for right in range(longest - left, 0, -1)]
    model["merges"] = [[c * left, c * right] for left, right in sizes for c in characters] + merges
    for run in sorted(runs):
        model["vocab"].setdefault(run, len(model["vocab"]))
    no_flags = dict.fromkeys(("special", "lstrip", "rstrip", "single_word", "normalized"), False)
    content["added_tokens"] += [
        {"id": model["vocab"][run], "content": run} | no_flags for run in sorted(runs) if len(run) > 1
    ]
    return Tokenizer.from_str(json.dumps(content))


RUNS = "".join(c * n + "x" for c in " \n\t" for n in range(1, 24)) + " \n \n\n  x\t\t y"


def test_gemma_as_tokenizer_json_gives_the_same_tokens(tmp_path):
    _, processor = sentencepiece_model(user_defined_symbols=["<tool>"])
    tokenizer = with_gemmas_runs(converted(processor, "gemma"))
    vocabulary = same_tokens(tmp_path, tokenizer, TEXT + RUNS + "".join(SCRIPTS.values()))
    assert vocabulary.scores is not None  # the form that every version of llama.cpp reads
    content = json.loads(tokenizer.to_str())
    content["model"]["merges"].reverse()  # runs rank by length no more
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert read_vocabulary(tmp_path, {}, tokenizer.get_vocab_size()).scores is None


def raw_bpe():
    """Train a BPE of text with bytes for the rest, whose merges are not SentencePiece's, as Gemma 4 has."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    names = ["<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=1500, special_tokens=names, show_progress=False, limit_alphabet=150
    )
    tokenizer.train_from_iterator([text[:4000] for text in TRAINING], trainer)
    content = json.loads(tokenizer.to_str())
    content["model"]["vocab"] |= {"\n\n": 1500, "\n\n\n": 1501}
    content["model"]["merges"] += [["\n", "\n"], ["\n\n", "\n"]]
    content["added_tokens"] = [
        token for token in content["added_tokens"] if not token["content"].startswith("<0x")
    ]
    spaces = {"id": content["model"]["vocab"]["\u2581\u2581"], "content": "\u2581\u2581"}
    content["added_tokens"].append({**content["added_tokens"][0], "special": False, **spaces})
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


def test_gemma4_gives_the_same_tokens(tmp_path):
    settings = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    text = f"<|turn>user\n{TEXT}{''.join(SCRIPTS.values())}\n\n\n\nx\n\n<turn|>"
    vocabulary = same_tokens(tmp_path, raw_bpe(), text, affixes=True)
    assert (vocabulary.raw, vocabulary.scores, vocabulary.add_bos) == (True, None, True)
    spaces = vocabulary.tokens.index("\u2581\u2581")
    assert vocabulary.types[spaces] == 1  # an ordinary token, or llama.cpp would print \u2581 for spaces
    assert any("tokenizer model gemma4" in note for note in vocabulary.notes)
    same_tokens(tmp_path, raw_bpe(), text)


def test_raw_bpe_whose_merges_cross_line_ends_is_rejected(tmp_path):
    content = json.loads(raw_bpe().to_str())
    content["model"]["vocab"]["\nx"] = len(content["model"]["vocab"])
    content["model"]["merges"].append(["\n", "x"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="not made by SentencePiece"):
        read_vocabulary(tmp_path, {}, 1503)


def test_raw_bpe_that_adds_a_space_is_rejected(tmp_path):
    tokenizer = raw_bpe()
    tokenizer.normalizer, tokenizer.pre_tokenizer = None, pre_tokenizers.Metaspace(split=False)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match="not made by SentencePiece"):
        read_vocabulary(tmp_path, {}, tokenizer.get_vocab_size())


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
