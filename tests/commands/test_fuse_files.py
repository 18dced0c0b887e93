"""nalora fuse: which files of the base a merged model has, byte for byte, and what differs from them."""

import errno
import io
import json
import os
import shutil
from fnmatch import fnmatch

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm import convert
from mlx_lm.utils import load
from transformers import AutoConfig

from nalora_mlx.adapters import merge_quality
from nalora_mlx.adapters.attach import adapt
from nalora_mlx.adapters.merge_quality import MergeQuality
from nalora_mlx.adapters.merge_record import RECORD_KEY
from nalora_mlx.core import storage
from nalora_mlx.core.config import NALoRAConfig
from nalora_mlx.models import loading
from nalora_mlx.models.model_files import model_files
from nalora_mlx.models.tolerances import relative_error
from tests.commands.test_fuse import WIDE, fuse, main, save_adapter
from tests.conftest import CHAT_TEMPLATE, build_model, llama_args, random_adapters

COPIED = {
    "tokenizer.model": b"\x0a\x05proto",
    "special_tokens_map.json": b'{"eos_token": "<|im_end|>"}',
    "added_tokens.json": b'{\n "<x>":  63}',
    "vocab.txt": b"a\r\nb\r\n",
    "vocab.json": b'{"a": 0}',
    "merges.txt": b"#version: 0.2\n",
    "tekken.json": b"{}",
    "qwen.tiktoken": b"IQ== 0\n",
    "generation_config.json": b'{"temperature":0.30, "eos_token_id": [2]}',
    "preprocessor_config.json": b'{"size": 1}',
    "processor_config.json": b'{"a": 1}',
    "chat_template.json": b'{"chat_template": "x"}',
    "LICENSE": b"free",
    "NOTICE.txt": b"of someone",
    "chat_template.jinja": CHAT_TEMPLATE.encode(),
    "additional_chat_templates/rag.jinja": b"{{ documents }}",
}
LEFT_BEHIND = {
    "pytorch_model.bin": "weights in other files or formats",
    "consolidated.safetensors": "weights in other files or formats",
    "model.gguf": "weights in other files or formats",
    "trainer_state.json": "of the base's training",
    "hf_quant_config.json": "of the base's quantization",
    "modeling_x.py": "code that no config refers to",
    "original/params.json": "directories",
}


def tree(directory):
    """Return the bytes of all files by path."""
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def write(directory, files):
    for name, content in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)


def config_of(directory):
    """Return the content of a merged model's config.json without the record of its adapters."""
    content = json.loads((directory / "config.json").read_text())
    return {name: value for name, value in content.items() if name != RECORD_KEY}


def make_adapter(directory, model=None, size=0.05, chat=None):
    model = model or build_model()
    adapt(model, NALoRAConfig(num_layers=-1, rank=4, scale=4.0))
    random_adapters(model, size=size)
    save_adapter(model, directory)
    if chat:
        config = json.loads((directory / "adapter_config.json").read_text())
        (directory / "adapter_config.json").write_text(json.dumps(config | {"chat_template": chat}))
    return directory


@pytest.fixture(autouse=True)
def _short_comparison(monkeypatch):
    monkeypatch.setattr(merge_quality, "PROMPTS", merge_quality.PROMPTS[:1])
    monkeypatch.setattr(merge_quality, "ANSWER_TOKENS", 4)


@pytest.fixture
def base(model_directory, tmp_path):
    return shutil.copytree(model_directory, tmp_path / "base")


# --- what is copied ----------------------------------------------------------------------------------


def test_all_other_files_are_the_bases_byte_for_byte(base, tmp_path, capsys):
    """The base is a snapshot of the Hub's cache, where files are links."""
    write(base, COPIED)
    write(base, {name: b"{}" for name in LEFT_BEHIND} | {".gitattributes": b"x", ".cache/y": b"y"})
    write(base, {"README.md": b"# Base\n"})
    mx.save_safetensors(str(base / "consolidated.safetensors"), {"x": mx.ones(2)})
    config = (base / "config.json").read_bytes()
    # Neither sorted nor indented.
    config = config.replace(b'{"model_type"', b'{ "torch_dtype": "float32",  "model_type"')
    (base / "config.json").write_bytes(config)
    blobs = base.rename(tmp_path / "blobs")
    for name in tree(blobs):
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).symlink_to(os.path.relpath(blobs / name, (base / name).parent))
    assert fuse(base, make_adapter(tmp_path / "adapter"), tmp_path / "fused") == 0
    before, after = tree(base), tree(tmp_path / "fused")
    assert not any(path.is_symlink() for path in (tmp_path / "fused").rglob("*"))
    new = {"README.md", "model.safetensors", "model.safetensors.index.json", "config.json"}
    assert {name for name in after if after[name] != before.get(name)} == new
    assert before.keys() - after.keys() == {*LEFT_BEHIND, ".gitattributes", ".cache/y"}
    assert after["config.json"].startswith(config.removesuffix(b"}"))
    assert set(json.loads(after["config.json"])) - set(json.loads(config)) == {RECORD_KEY}
    err = capsys.readouterr().err
    assert "only programs based on mlx-lm" not in err
    note = next(line for line in err.splitlines() if "note: not copied" in line)
    for name, reason in LEFT_BEHIND.items():
        group = next(group for group in note.split("; ") if reason in group)
        assert name.partition("/")[0] in group


def test_rope_parameters_are_kept_and_a_note_says_who_ignores_them(base, tmp_path, capsys):
    config = json.loads((base / "config.json").read_text())
    theta = config.pop("rope_theta", 10000.0)
    adapter = make_adapter(tmp_path / "adapter")
    for name, changes, noted in (("old", {"rope_theta": theta}, False), ("new", {}, True)):
        changes = changes or {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}
        (base / "config.json").write_text(json.dumps(config | changes))
        assert fuse(base, adapter, tmp_path / name) == 0
        assert config_of(tmp_path / name) == config | changes
        assert ("ignore rope_parameters" in capsys.readouterr().err) == noted


@pytest.mark.parametrize("online", [True, False])
def test_a_model_of_the_hub_brings_its_license(base, tmp_path, monkeypatch, online):
    """mlx-lm downloads neither license nor card."""
    import huggingface_hub
    import mlx_lm.utils

    def download(name, allow_patterns):
        assert name == "somebody/model"
        if not online:
            raise OSError("no network")
        files = {
            "LICENSE.txt": b"free",
            "README.md": b"---\nlicense: mit\n---\n",
            "spiece.model": b"x",
            "a.bin": b"x",
        }
        write(
            base, {f: c for f, c in files.items() if any(fnmatch(f, pattern) for pattern in allow_patterns)}
        )

    monkeypatch.setattr(mlx_lm.utils, "_download", lambda *_, **__: base)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert fuse("somebody/model", make_adapter(tmp_path / "adapter"), tmp_path / "fused") == 0
    files = tree(tmp_path / "fused")
    assert {"LICENSE.txt", "spiece.model"} <= files.keys() if online else "LICENSE.txt" not in files
    assert (b"license: mit" in files["README.md"]) == online


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("tokenizer_config.json", '{"auto_map": {"AutoTokenizer": ["tokenization_x.X", null]}}'),
        ("config.json", '{"model_file": "model.py"}'),
    ],
)
def test_code_is_copied_if_a_config_refers_to_it(tmp_path, name, entry):
    write(tmp_path, {"a.py": b"1", name: entry.encode()})
    assert "a.py" in model_files(tmp_path, set()).copied
    (tmp_path / name).write_text("{}")
    assert "a.py" not in model_files(tmp_path, set()).copied


def sentencepiece_model():
    sentencepiece = pytest.importorskip("sentencepiece")
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat is red and the dog is blue", "what colour is the bird"] * 20),
        model_writer=file,
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return file.getvalue()


def tokenizer_files(kind):
    """Return tokenizer files that transformers 5 does not write as it reads them."""
    if kind == "gpt2":  # transformers reads the file through a class that has a pre-tokenizer of its own
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers

        tokenizer = Tokenizer(
            models.BPE({c: i for i, c in enumerate("abcdefghijklmnopqrstuvwxyzĠ0123456789")}, [])
        )
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        tokenizer.decoder = decoders.ByteLevel()
        config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "z", "unk_token": "z", "bos_token": "z"}
        return {
            "tokenizer.json": tokenizer.to_str().encode(),
            "tokenizer_config.json": json.dumps(config).encode(),
        }
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": True, "bos_token": "<s>", "eos_token": "</s>"}
    config |= {"unk_token": "<unk>", "chat_template": CHAT_TEMPLATE}
    return {"tokenizer.model": sentencepiece_model(), "tokenizer_config.json": json.dumps(config).encode()}


def save_llama(directory, **changes):
    args = llama_args(**changes)
    model = build_model(args=args)
    mx.save_safetensors(str(directory / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (directory / "config.json").write_text(json.dumps(args))
    return model


@pytest.mark.parametrize("kind", ["gpt2", "sentencepiece"])
def test_a_tokenizer_gives_the_same_tokens_after_fusing(base, tmp_path, kind):
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (base / name).unlink()
    files = tokenizer_files(kind)
    write(base, files)
    model = save_llama(base, vocab_size=320)
    assert fuse(base, make_adapter(tmp_path / "adapter", model), tmp_path / "fused") == 0
    after = tree(tmp_path / "fused")
    assert {name for name in after if "token" in name} == files.keys()
    assert {name: after[name] for name in files} == files
    text = "the cat 2024 <s>  is\n red</s>"
    ids = [load(str(path))[1].encode(text) for path in (base, tmp_path / "fused")]
    assert ids[0] == ids[1]


def test_gguf_of_a_base_with_a_sentencepiece_file_only(base, tmp_path):
    pytest.importorskip("gguf")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (base / name).unlink()
    write(base, tokenizer_files("sentencepiece"))
    model = save_llama(base, vocab_size=320, model_type="mistral", eos_token_id=2, max_position_embeddings=64)
    assert fuse(base, make_adapter(tmp_path / "adapter", model), tmp_path / "fused", "--export-gguf") == 0
    assert (tmp_path / "fused" / "ggml-model-f16.gguf").exists()


# --- the chat template -------------------------------------------------------------------------------

OTHER = "{% for m in messages %}[{{ m['content'] }}]{% endfor %} é\n"


def test_only_the_chat_template_changes_if_the_adapter_has_its_own(base, tmp_path, capsys):
    entry = '{"eos_token":   "<|im_end|>", "chat_template": ' + json.dumps(CHAT_TEMPLATE) + ',"z": 1}'
    write(
        base, {name: content for name, content in COPIED.items() if "map" not in name and "added" not in name}
    )
    write(base, {"tokenizer_config.json": entry.encode()})
    adapter = make_adapter(tmp_path / "adapter", chat={"template": OTHER})
    assert fuse(base, adapter, tmp_path / "fused") == 0
    before, after = tree(base), tree(tmp_path / "fused")
    assert after["chat_template.jinja"] == OTHER.encode()
    assert (
        after["tokenizer_config.json"] == entry.replace(json.dumps(CHAT_TEMPLATE), json.dumps(OTHER)).encode()
    )
    changed = {name for name in before if after.get(name, before[name]) != before[name]}
    assert changed == {"chat_template.jinja", "tokenizer_config.json", "model.safetensors", "config.json"}
    # Other templates would be preferred to it in some programs.
    assert before.keys() - after.keys() == {"chat_template.json", "additional_chat_templates/rag.jinja"}
    err = capsys.readouterr().err
    assert "chat template is the one that the adapter was trained with" in err
    assert "chat_template.json (chat templates that the adapter's replaces)" in err
    messages = [{"role": "user", "content": "cat"}]
    assert load(str(tmp_path / "fused"))[1].apply_chat_template(messages, tokenize=False) == "[cat] é"
    # The base's own template, named by the adapter, changes nothing.
    adapter = make_adapter(tmp_path / "same", chat={"template": CHAT_TEMPLATE})
    assert fuse(base, adapter, tmp_path / "own") == 0
    assert tree(tmp_path / "own").keys() >= before.keys()


@pytest.mark.parametrize(
    ("entry", "wanted"),
    [
        ('{"a": 1}', None),  # unchanged
        (
            '{"chat_template": [{"name": "default", "template": "x"}], "a": "é"}',
            {"chat_template": OTHER, "a": "é"},
        ),
        ('{"chat_template": "\\u0078", "a": 1}', {"chat_template": OTHER, "a": 1}),
        (
            '{"chat_template": "x", "b": {"chat_template": "x"}}',
            {"chat_template": OTHER, "b": {"chat_template": "x"}},
        ),
        ('{"chat_template_type": "deepseek_v32", "a": 1}', {"a": 1, "chat_template": OTHER}),
    ],
)
def test_the_entry_of_the_tokenizers_config(tmp_path, entry, wanted):
    write(tmp_path, {"tokenizer_config.json": entry.encode()})
    files = model_files(tmp_path, set(), OTHER)
    (tmp_path / "to").mkdir()
    files.write(tmp_path / "to")
    written = (tmp_path / "to" / "tokenizer_config.json").read_text()
    if wanted is None:
        assert written == entry
    else:
        assert json.loads(written) == wanted
    assert (tmp_path / "to" / "chat_template.jinja").read_text() == OTHER


# --- config of quantized models ----------------------------------------------------------------------


def quantized_base(tmp_path, tokenizer_directory, entry):
    model = build_model(args=WIDE, gain=1.0)
    nn.quantize(model, 64, 4)
    base = shutil.copytree(tokenizer_directory, tmp_path / "base")
    mx.save_safetensors(str(base / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (base / "config.json").write_text(json.dumps(entry | WIDE, indent=1))
    return base, make_adapter(tmp_path / "adapter", model, size=0.3)


def test_the_config_of_a_quantized_model_changes_in_the_bits_only(tokenizer_directory, tmp_path):
    four = {"group_size": 64, "bits": 4}
    entry = {"quantization_config": four, "torch_dtype": "float32", "quantization": four}
    base, adapter = quantized_base(tmp_path, tokenizer_directory, entry)
    for name, flags in (("eight", ()), ("same", ("--bits", "same", "--force")), ("dense", ("--dequantize",))):
        assert fuse(base, adapter, tmp_path / name, *flags) == 0
    before = json.loads((base / "config.json").read_text())
    after = config_of(tmp_path / "eight")
    assert list(after) == list(before)
    assert after["quantization"] == after["quantization_config"]
    bits = after["quantization"]
    eight = {"group_size": 64, "bits": 8, "mode": "affine"}
    layers = [path for path in bits if path.startswith("model.")]
    assert len(layers) == 3 * 7
    assert bits == four | dict.fromkeys(layers, eight)
    for key in before.keys() - {"quantization", "quantization_config"}:
        assert after[key] == before[key]
    unchanged = (base / "config.json").read_bytes().removesuffix(b"\n}")
    assert (tmp_path / "same" / "config.json").read_bytes().startswith(unchanged)
    dense = config_of(tmp_path / "dense")
    assert list(dense.items()) == [item for item in before.items() if "quantization" not in item[0]]


def test_the_config_of_another_programs_quantization(tokenizer_directory, tmp_path):
    """mlx-lm converts such weights when it loads them; with --keep-all they keep their form."""
    model = build_model(args=WIDE, gain=1.0)
    nn.quantize(model, 32, 4, mode="mxfp4", class_predicate=lambda path, _: "mlp" in path and "proj" in path)
    base = shutil.copytree(tokenizer_directory, tmp_path / "base")
    mx.save_safetensors(str(base / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (base / "config.json").write_text(json.dumps(WIDE | {"quantization_config": {"quant_method": "mxfp4"}}))
    adapt(model, NALoRAConfig(num_layers=-1, rank=4, scale=4.0, keys=("self_attn.q_proj",)))
    random_adapters(model, size=0.3)
    adapter = save_adapter(model, tmp_path / "adapter")
    tokens = mx.array([[1, 5, 11, 14]])
    for name, flags in (("fused", ()), ("kept", ("--keep-all",))):
        assert fuse(base, adapter, tmp_path / name, *flags) == 0
        found = load(str(tmp_path / name))[0](tokens)
        np.testing.assert_allclose(np.array(found), np.array(model(tokens)), rtol=0, atol=1e-5)
    assert config_of(tmp_path / "kept") == json.loads((base / "config.json").read_text())
    bits = {"group_size": 32, "bits": 4, "mode": "mxfp4"}
    assert config_of(tmp_path / "fused") == WIDE | {
        "quantization": bits,
        "quantization_config": bits,
    }


# --- numbers that are not finite ---------------------------------------------------------------------


def one_error(capsys):
    error = capsys.readouterr().err
    error = error.removeprefix("merging, and comparing answers before and after; this may take a minute\n")
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_adapters_and_bases_that_are_not_finite_are_refused_by_name(base, tmp_path, capsys, value):
    adapter = make_adapter(tmp_path / "adapter")
    for path, name in (
        (adapter / "adapters.safetensors", "model.layers.1.mlp.up_proj.lora_b"),
        (base / "model.safetensors", "model.layers.2.input_layernorm.weight"),
    ):
        arrays = dict(mx.load(str(path)))
        good = dict(arrays)
        changed = np.array(arrays[name])
        changed.flat[3] = value
        mx.save_safetensors(str(path), arrays | {name: mx.array(changed)})
        assert fuse(base, adapter, tmp_path / "fused", "--force") == 2
        assert name in one_error(capsys)
        assert not (tmp_path / "fused").exists()
        mx.save_safetensors(str(path), good)


def test_a_merge_that_overflows_is_refused_by_name(base, tmp_path, capsys):
    """In float16, 60000 plus an update. Its input is zero, so that the model computes finite numbers before."""
    model = build_model()
    attention = model.model.layers[1].self_attn
    attention.v_proj.weight = mx.zeros_like(attention.v_proj.weight)
    attention.o_proj.weight = mx.full(attention.o_proj.weight.shape, 6e4)
    model.set_dtype(mx.float16)
    mx.save_safetensors(str(base / "model.safetensors"), dict(tree_flatten(model.parameters())))
    adapter = make_adapter(tmp_path / "adapter", model)
    arrays = dict(mx.load(str(adapter / "adapters.safetensors")))
    path = "model.layers.1.self_attn"
    arrays[f"{path}.v_proj.lora_b"] = mx.zeros_like(arrays[f"{path}.v_proj.lora_b"])
    arrays[f"{path}.o_proj.lora_a"] = mx.full(arrays[f"{path}.o_proj.lora_a"].shape, 20.0)
    arrays[f"{path}.o_proj.lora_b"] = mx.full(arrays[f"{path}.o_proj.lora_b"].shape, 20.0)
    mx.save_safetensors(str(adapter / "adapters.safetensors"), arrays)
    assert fuse(base, adapter, tmp_path / "fused", "--force") == 2
    error = one_error(capsys)
    assert "merged weights are NaN or infinite, which happens if they exceed float16's 65504" in error
    assert f"{path}.o_proj.weight" in error
    assert "v_proj" not in error
    assert not (tmp_path / "fused").exists()


@pytest.mark.parametrize("loss", [np.nan, np.inf])
@pytest.mark.parametrize("effect", [1.0, np.nan, np.inf])
def test_no_comparison_passes_nan(loss, effect):
    assert MergeQuality(loss, 1.0, effect, 1.0, 10).mostly_lost


def test_logits_of_nan_equal_nothing():
    wrong, right = mx.array([1.0, np.nan, 2.0]), mx.array([1.0, -np.inf, 2.0])
    for pair in ((wrong, wrong), (wrong, mx.ones(3)), (mx.ones(3), wrong)):
        assert not relative_error(*pair) < 1
    assert relative_error(right, right) == 0


# --- a model that contains the adapter ---------------------------------------------------------------


TWICE = "so it is applied twice; use the base model that it was trained on, or no adapter"


def make_run(directory, **settings):
    """Make a run: its latest adapter, its best one and a checkpoint, all different."""
    make_adapter(directory, **settings)
    make_adapter(directory / "best", size=0.06)
    make_adapter(directory / "checkpoints" / "step-0000001", size=0.07)
    return directory


@pytest.fixture
def merged(base, tmp_path):
    """A model into which two adapters were merged, the second one in a second merge: (model, first run, second)."""
    run, other = make_run(tmp_path / "run"), make_adapter(tmp_path / "other", size=0.04)
    assert fuse(base, run, tmp_path / "once") == 0
    assert fuse(tmp_path / "once", other, tmp_path / "merged") == 0
    return tmp_path / "merged", run, other


def ask(model, adapter):
    flags = ["--model", str(model), "--adapter-path", str(adapter)]
    assert main(["generate", *flags, "--prompt", "cat", "--max-tokens", "1"]) == 0


def test_an_adapter_that_a_model_contains_is_noticed_wherever_it_is(merged, tmp_path, capsys):
    model, run, other = merged
    assert "already contains" not in capsys.readouterr().err
    assert str(tmp_path) not in (model / "config.json").read_text()
    copy = shutil.copytree(run, tmp_path / "copy")
    # The arrays count, not their file.
    arrays = dict(mx.load(str(copy / "adapters.safetensors")))
    mx.save_safetensors(str(copy / "adapters.safetensors"), dict(reversed(arrays.items())), {"a": "b"})
    for adapter in (run, other, copy):
        ask(model, adapter)
        assert f"note: {model} already contains {adapter}, {TWICE}" in capsys.readouterr().err
    ask(model, run / "best")
    error = capsys.readouterr().err
    assert f"already contains another adapter of the run that wrote {run / 'best'}, {TWICE}" in error
    # From a checkpoint, the run is known too.
    assert fuse(tmp_path / "base", run / "checkpoints" / "step-0000001", tmp_path / "early") == 0
    capsys.readouterr()
    for adapter in (run, run / "best"):
        ask(tmp_path / "early", adapter)
        assert "already contains another adapter of the run" in capsys.readouterr().err
    ask(tmp_path / "early", other)
    assert "already contains" not in capsys.readouterr().err


def test_a_converted_copy_of_a_merged_model_keeps_the_record(merged, tmp_path, capsys):
    """mlx-lm writes its own config.json, tokenizer files and card, and nothing else."""
    model, run, _ = merged
    copies = {"dense": {"dtype": "float16"}, "four": {"quantize": True, "q_group_size": 32, "q_bits": 4}}
    for name, settings in copies.items():
        convert(str(model), str(tmp_path / name), **settings)
        capsys.readouterr()
        ask(tmp_path / name, run)
        assert f"{tmp_path / name} already contains {run}" in capsys.readouterr().err
    # Nobody else minds the entry.
    kept = AutoConfig.from_pretrained(str(model))
    kept.save_pretrained(tmp_path / "transformers")
    assert RECORD_KEY in json.loads((tmp_path / "transformers" / "config.json").read_text())


def test_commands_that_would_apply_an_adapter_twice(merged, data_directory, tmp_path, capsys, monkeypatch):
    """fuse and export refuse, before anything slow; the others print a note."""
    model, run, other = merged
    before = sorted(tmp_path.rglob("*"))
    flags = ["--model", str(model), "--adapter-path"]
    outputs = {
        name: ["export", name, "--output", str(tmp_path / name)]
        for name in ("mlx", "peft", "gguf", "gguf-lora")
    }
    refusing = {"fuse": ["fuse", "--save-path", str(tmp_path / "thrice")], **outputs}
    remedies = {"fuse": ", or use this model as it is", "gguf": ", or leave --adapter-path out"}
    with monkeypatch.context() as patch:
        patch.setattr(loading, "load_model", None)
        for name, command in refusing.items():
            assert main([*command, *flags, str(other)]) == 2
            message = "which would be applied twice; give the base model that it was trained on"
            expected = f"error: --model {model} already contains {other}, {message}{remedies.get(name, '')}\n"
            assert capsys.readouterr().err.endswith(expected), name
            assert main([*command, *flags, str(run / "best")]) == 2
            assert "already contains another adapter of the run" in one_error(capsys)
    assert sorted(tmp_path.rglob("*")) == before
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    data = ["--data", str(data_directory), "--iters", "1", "--batch-size", "1", "--max-seq-length", "32"]
    start = [
        "--resume-adapter-file",
        str(other / "adapters.safetensors"),
        "--rank",
        "4",
        "--num-layers",
        "-1",
    ]
    new = ["--model", str(model), "--adapter-path", str(tmp_path / "new")]
    for command in (
        ["chat", *flags, str(other)],
        ["lora", "--train", *new, *data, *start, "--scale", "4.0", "--steps-per-report", "1"],
    ):
        assert main(command) == 0, capsys.readouterr().err
        done = capsys.readouterr()
        assert f"already contains {other}" in " ".join((done.out + done.err).split()), command


# --- targets that cannot be written ------------------------------------------------------------------


def test_targets_that_cannot_be_written_are_one_line(base, tmp_path, capsys, monkeypatch):
    adapter = make_adapter(tmp_path / "adapter")
    (tmp_path / "file").write_text("x")
    assert fuse(base, adapter, tmp_path / "file" / "fused") == 2
    error = one_error(capsys)
    assert f"--save-path {tmp_path / 'file' / 'fused'}: " in error
    assert "is a file" in error

    def refuse(**_):
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patched:
        patched.setattr(storage.tempfile, "TemporaryFile", refuse)
        assert fuse(base, adapter, tmp_path / "fused") == 2
        assert "is not writable (Read-only file system)" in one_error(capsys)
    with monkeypatch.context() as patched:
        patched.setattr(storage, "free_space", lambda _: 1000)
        assert fuse(base, adapter, tmp_path / "fused") == 1
        assert "1 kB free, but the model takes" in one_error(capsys)
    assert fuse(base, adapter, tmp_path / "fused") == 0
    before = tree(tmp_path / "fused")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device", "x")

    capsys.readouterr()
    with monkeypatch.context() as patched:
        patched.setattr(storage, "arrays_writer", lambda _: full)
        assert fuse(base, adapter, tmp_path / "fused", "--overwrite") == 1
        error = one_error(capsys)
        assert (
            f"--save-path {tmp_path / 'fused'}: the model could not be written (No space left on device)"
            in error
        )
    assert tree(tmp_path / "fused") == before  # the old model is whole, and nothing else is left
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base", "file", "fused"]


def test_a_model_with_named_templates_can_be_overwritten(base, tmp_path):
    write(base, {"additional_chat_templates/rag.jinja": b"{{ documents }}"})
    adapter = make_adapter(tmp_path / "adapter")
    assert fuse(base, adapter, tmp_path / "fused") == 0
    assert fuse(base, adapter, tmp_path / "fused", "--overwrite") == 0
    (tmp_path / "fused" / "mine").mkdir()
    assert fuse(base, adapter, tmp_path / "fused", "--overwrite") == 2
