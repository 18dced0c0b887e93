"""Special tokens in GGUF: every file that declares tokens is read, and llama.cpp ends where mlx-lm ends."""

import json

import pytest
from mlx_lm.tokenizer_utils import load
from mlx_lm.utils import load_config
from tokenizers import AddedToken

from nalora_mlx.core.errors import InputError
from nalora_mlx.export.gguf.vocabulary.ends import assign_ends, end_texts, ends_by_text
from nalora_mlx.export.gguf.vocabulary.pretokenizer_table import BYTE_LEVEL
from nalora_mlx.export.gguf.vocabulary.tokenizer import read_vocabulary
from nalora_mlx.export.gguf.vocabulary.tokenizer_check import compare_with_mlx_lm
from nalora_mlx.export.modelfile import write_modelfile
from tests.interop import llama_cpp
from tests.interop.gguf_tokenizers import byte_level, save, vocabulary_file, write

llama_cpp.require()

CONTROL, USER_DEFINED = 3, 4
SIZE = 1520  # 1500 tokens of the model, <tool> and padding
NEW = 1501  # the first id that tokenizer.json does not give


def write_json(path, content):
    path.write_text(json.dumps(content))


def chat_tokens(path, text):
    """Return llama.cpp's tokens of a text, with and without special tokens in it."""
    with llama_cpp.Llama(path, vocab_only=True) as llama:
        return llama.tokenize(text), llama.tokenize(text, special=False)


def end_ids(path, size=SIZE):
    with llama_cpp.Llama(path, vocab_only=True) as llama:
        return {i for i in range(size) if llama.llama.llama_vocab_is_eog(llama.vocab, i)}


@pytest.fixture
def directory(tmp_path):
    save(tmp_path, byte_level([BYTE_LEVEL]))
    return tmp_path


# --- declared tokens ---------------------------------------------------------------------------------


def test_added_tokens_decoder_declares_tokens(directory):
    extra = {str(NEW): {"content": "<|extra|>", "special": True}, str(NEW + 1): {"content": "<think>"}}
    save(directory, byte_level([BYTE_LEVEL]), added_tokens_decoder=extra)
    vocabulary, path = vocabulary_file(directory, SIZE)
    assert vocabulary.tokens[NEW : NEW + 2] == ["<|extra|>", "<think>"]
    assert vocabulary.types[NEW : NEW + 2] == [CONTROL, USER_DEFINED]
    text = "a<|extra|>b <think> c<tool>"
    assert chat_tokens(path, text)[0] == load(directory).encode(text)
    assert NEW + 1 in chat_tokens(path, "a<think>b")[1]  # not a control token
    assert compare_with_mlx_lm(directory, vocabulary) == []


def test_added_tokens_json_declares_tokens(directory):
    write_json(directory / "added_tokens.json", {"<think>": NEW, "<|extra|>": NEW + 1})
    save(directory, byte_level([BYTE_LEVEL]), additional_special_tokens=["<|extra|>"])
    vocabulary, path = vocabulary_file(directory, SIZE)
    assert vocabulary.types[NEW : NEW + 2] == [USER_DEFINED, CONTROL]
    text = "a<think>b <|extra|> c"
    assert chat_tokens(path, text)[0] == load(directory).encode(text)
    assert compare_with_mlx_lm(directory, vocabulary) == []


@pytest.mark.parametrize("form", [str, lambda text: {"content": text, "lstrip": False}])
def test_special_tokens_map_names_the_end(directory, form):
    write_json(directory / "special_tokens_map.json", {"eos_token": form("<|im_end|>")})
    vocabulary, path = vocabulary_file(directory, SIZE)
    assert vocabulary.special == {"eos": 2}
    assert load(directory).eos_token_ids == {2}
    assert end_ids(path) - {0} == {2}  # 0 is <|endoftext|>, which llama.cpp knows by name
    assert compare_with_mlx_lm(directory, vocabulary) == []


@pytest.mark.parametrize("decoder", [{}, {"0": {"content": "<|endoftext|>", "special": True}}])
def test_the_file_that_transformers_reads_names_the_end(directory, decoder):
    write_json(directory / "special_tokens_map.json", {"eos_token": "<|im_end|>"})
    save(directory, byte_level([BYTE_LEVEL]), eos_token="<|im_start|>", added_tokens_decoder=decoder)
    if not decoder:
        save(directory, byte_level([BYTE_LEVEL]), eos_token="<|im_start|>")
    vocabulary = read_vocabulary(directory, {}, SIZE)
    assert set(vocabulary.ends) == load(directory).eos_token_ids == {1 if decoder else 2}


def test_tokens_that_only_have_a_name_are_special(directory):
    save(directory, byte_level([BYTE_LEVEL]), eos_token="Hello", pad_token="<|pad|>")
    vocabulary, path = vocabulary_file(directory, SIZE)
    hello = vocabulary.tokens.index("Hello")
    assert vocabulary.types[hello] == CONTROL
    assert vocabulary.special == {"eos": hello, "pad": NEW}
    text = "HelloHello<|pad|>"
    assert chat_tokens(path, text)[0] == load(directory).encode(text) == [hello, hello, NEW]


def test_contradicting_files_are_rejected(directory):
    write_json(directory / "added_tokens.json", {"<tool>": 7})
    with pytest.raises(
        InputError, match=r"added_tokens.json gives token '<tool>' the id 7, another file 1500"
    ):
        read_vocabulary(directory, {}, SIZE)


def test_token_with_another_id_in_mlx_lm_is_rejected(directory):
    decoder = {str(NEW + 5): {"content": "<|extra|>", "special": True}}  # transformers takes the next free id
    save(directory, byte_level([BYTE_LEVEL]), added_tokens_decoder=decoder)
    assert load(directory).convert_tokens_to_ids("<|extra|>") == NEW
    vocabulary = read_vocabulary(directory, {}, SIZE)
    with pytest.raises(
        InputError, match=rf"'<\|extra\|>' is token {NEW + 5} in the files and {NEW} in mlx-lm"
    ):
        compare_with_mlx_lm(directory, vocabulary)


@pytest.mark.parametrize("special", [True, False, None])
def test_marker_in_a_text_gives_the_same_tokens_however_it_is_declared(tmp_path, special):
    content = json.loads(byte_level([BYTE_LEVEL]).to_str())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] != "<|im_start|>"]
    if special is not None:
        token = {"id": 1, "content": "<|im_start|>", "special": special}
        content["added_tokens"].append(
            token | dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
        )
    write_json(tmp_path / "tokenizer.json", content)
    write_json(tmp_path / "tokenizer_config.json", {})
    vocabulary, path = vocabulary_file(tmp_path, SIZE)
    text = "typed: <|im_start|>user"
    expected = load(tmp_path).encode(text)
    assert (1 in expected) == (special is not None)
    parsed, unparsed = chat_tokens(path, text)
    assert parsed == expected
    assert (unparsed == expected) == (special is not True)  # llama.cpp reads control tokens only where it may
    assert compare_with_mlx_lm(tmp_path, vocabulary) == []


def test_note_if_llama_cpp_knows_ordinary_text_as_a_special_token(tmp_path):
    content = json.loads(byte_level([BYTE_LEVEL]).to_str())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] != "<|im_end|>"]
    write_json(tmp_path / "tokenizer.json", content)
    write_json(tmp_path / "tokenizer_config.json", {"eos_token": "<|endoftext|>"})
    vocabulary, path = vocabulary_file(tmp_path, SIZE)
    assert 2 not in load(tmp_path).encode("<|im_end|>")
    assert chat_tokens(path, "<|im_end|>")[0] == [2]
    assert end_ids(path) == {0, 2}
    assert any("takes <|im_end|> for a special token" in note for note in vocabulary.notes)


# --- ends --------------------------------------------------------------------------------------------

GLM = ["<|user|>", "<|observation|>", "<|assistant|>", "<|system|>"]  # llama.cpp does not know them by name


def glm(directory, generation_eos, config_eos=None, **settings):
    """Save a tokenizer with ids 1501 to 1504 for the tokens of GLM; return its vocabulary and file."""
    tokenizer = byte_level([BYTE_LEVEL])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in GLM])
    save(directory, tokenizer, eos_token="<|endoftext|>", **settings)
    write_json(directory / "generation_config.json", {"eos_token_id": generation_eos})
    write_json(directory / "config.json", config := {"eos_token_id": config_eos})
    return vocabulary_file(directory, SIZE, **config)


@pytest.mark.parametrize("config_eos", [None, 1504, [1504]])
@pytest.mark.parametrize(
    "generation_eos", [None, 1501, [1501], [1501, 1502], [1502, 0, 1501], [0, 1503, 1502]]
)
def test_llama_cpp_ends_where_mlx_lm_ends(tmp_path, generation_eos, config_eos):
    vocabulary, path = glm(tmp_path, generation_eos, config_eos)
    theirs = load(tmp_path, eos_token_ids=load_config(tmp_path)["eos_token_id"]).eos_token_ids
    assert end_ids(path) - theirs <= {2}  # <|im_end|>
    assert theirs <= end_ids(path)
    assert set(vocabulary.ends) == theirs
    assert compare_with_mlx_lm(tmp_path, vocabulary) == []


def test_more_than_three_ends_give_a_note_and_stop_words(tmp_path):
    vocabulary, path = glm(tmp_path, [0, 1501, 1502, 1503, 1504])
    assert end_ids(path) == {0, 2, 1501, 1502}
    assert any("<|assistant|>, <|system|>" in note for note in vocabulary.notes)
    tokenizer = load(tmp_path, eos_token_ids=[0, 1501, 1502, 1503, 1504])
    assert end_texts(tokenizer) == ["<|endoftext|>", *GLM]
    lines = write_modelfile(tmp_path / "model.gguf", tokenizer)[0].read_text().splitlines()
    assert [line for line in lines if line.startswith("PARAMETER")] == [
        f'PARAMETER stop "{text}"' for text in ["<|endoftext|>", *GLM]
    ]


def test_ends_that_llama_cpp_knows_by_name_leave_the_keys_to_others():
    tokens = ["<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<a>", "<b>"]
    _, keys, notes = assign_ends(tokens, [3] * 5, 0, [1, 2, 3, 4])
    assert keys == {"eos": 0, "eot": 3, "eom": 4}
    assert notes == []


TALK = [
    "<|eot_id|>",
    "<|im_end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
]
TALK += [
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
    "<turn|>",
    "[e~[",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
]
NAMED = [
    [*TALK, "</s>", "<|end|>", "<|return|>", "<|fim_pad|>", "<|fim_repo|>", "<|file_sep|>"],
    ["<|end|>", "<|return|>", "<|call|>", "<fim-pad>", "<|repo_name|>"],
    ["<|end|>", "<|call|>", "</s>", "<fim_pad>", "<fim-repo>"],
    ["<|end|>", "<|flush|>", "<|calls|>", "<PAD>", "<REPO>"],
    ["</s>", "<|tool_response>", "[PAD]", "<reponame>", "<|flush|>"],
]


@pytest.mark.parametrize("names", NAMED, ids=lambda names: names[-1])
def test_names_that_llama_cpp_knows(tmp_path, names):
    tokenizer = byte_level([BYTE_LEVEL])
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in [*names, "end"]])
    save(tmp_path, tokenizer, eos_token="end")
    vocabulary, path = vocabulary_file(tmp_path, tokenizer.get_vocab_size())
    end = vocabulary.tokens.index("end")
    assert end_ids(path, len(vocabulary.tokens)) == {end, *ends_by_text(vocabulary.tokens)}


def test_all_ends_are_written_for_ollama(tmp_path):
    import gguf

    _, path = glm(tmp_path, [1501, 1502])
    field = gguf.GGUFReader(path).get_field("tokenizer.ggml.eos_token_ids")
    assert field.contents() == [0, 1501, 1502]


@pytest.mark.parametrize("size", [1501, SIZE])
def test_model_without_an_end(directory, size):
    vocabulary, path = vocabulary_file(directory, size)
    assert load(directory).eos_token_ids == set()
    assert vocabulary.ends == []
    assert any("names no end-of-sequence token" in note for note in vocabulary.notes)
    ends = end_ids(path, size) - {0, 2}  # those that llama.cpp knows by name
    assert ends == ({11} if size == 1501 else {size - 1})  # its default, unless padding is there to take


def test_end_that_only_mlx_lm_knows_gives_a_note(directory):
    vocabulary = read_vocabulary(directory, {}, SIZE)
    write_json(directory / "config.json", {"eos_token_id": 1500})
    (note,) = compare_with_mlx_lm(directory, vocabulary)
    assert "mlx-lm ends an answer at '<tool>' too" in note


def test_end_that_only_the_files_know_gives_a_note(directory):
    vocabulary = read_vocabulary(directory, {"eos_token_id": 1500}, SIZE)
    (note,) = compare_with_mlx_lm(directory, vocabulary)
    assert "llama.cpp ends an answer at '<tool>', as the tokenizer's files say" in note


def test_tokenizer_that_mlx_lm_cannot_load_gives_a_note(directory):
    vocabulary = read_vocabulary(directory, {}, SIZE)
    (directory / "tokenizer.json").write_text("{}")
    (note,) = compare_with_mlx_lm(directory, vocabulary)
    assert "not compared with mlx-lm" in note
    assert write(directory, vocabulary).exists()
