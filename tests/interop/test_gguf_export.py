"""GGUF export: tensor types, quantized bases, memory, interruption, and rejected models."""

import json
import os
import signal
import subprocess
import sys

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from nalora_mlx.__main__ import main
from nalora_mlx.core.errors import InputError
from nalora_mlx.core.optional_dependencies import install_command
from nalora_mlx.export.lazy_model import LazyWeight
from tests.interop import llama_cpp
from tests.interop.configs_common import LONGROPE as SCALING
from tests.interop.gguf_models import PROMPT, VOCABULARY, build, logits, save
from tests.logit_comparison import relative_error

gguf = pytest.importorskip("gguf", reason="needs gguf: pip install 'nalora-mlx[export]'")
gguf_model = pytest.importorskip("nalora_mlx.export.gguf.model")
writing = pytest.importorskip("nalora_mlx.export.gguf.writing")
export_gguf = gguf_model.export_gguf


def tensors(path):
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def plain(tensor):
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1])


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory):
    """Return the directory of a model whose weights are exported unchanged, and its weights by GGUF name."""
    model, config = build("qwen2", tie_word_embeddings=False)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config["num_hidden_layers"])
    weights = {
        names.get_name(path, try_suffixes=(".weight", ".bias")): np.array(value)
        for path, value in tree_flatten(model.parameters())
    }
    return save(tmp_path_factory.mktemp("qwen2"), model, config, shards=3), weights


# --- types -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("type", [type for type in gguf_model.FILE_TYPES if "_k" not in type])
@pytest.mark.parametrize("chunk", [1000, 1 << 24])
def test_data_equals_gguf_pys_quantization(qwen2, tmp_path, monkeypatch, type, chunk):
    directory, weights = qwen2
    monkeypatch.setattr(gguf_model, "CHUNK", chunk)
    result = export_gguf(directory, tmp_path / "model.gguf", type)
    written = tensors(result.path)
    assert written.keys() == weights.keys()
    assert (result.tensors, result.bytes) == (len(weights), result.path.stat().st_size)
    for name, tensor in written.items():
        expected = gguf.GGMLQuantizationType[type.upper()]
        if weights[name].ndim == 1:
            expected = gguf.GGMLQuantizationType.F32
        elif name == "output.weight" and type[:2] in ("q4", "q5"):
            expected = gguf.GGMLQuantizationType.Q8_0
        assert tensor.tensor_type == expected, name
        assert tensor.data.tobytes() == gguf.quants.quantize(weights[name], expected).tobytes(), name


@pytest.mark.parametrize(
    ("type", "tolerance"),
    [("f16", 2e-3), ("bf16", 2e-2), *((type, 0.06) for type in ("q8_0", "q4_0", "q4_1", "q5_0", "q5_1"))],
)
def test_llama_cpp_runs_every_type(tmp_path, type, tolerance):
    llama_cpp.require()
    model, config = build("llama", num_hidden_layers=2)  # random layers amplify rounding errors
    result = export_gguf(save(tmp_path / "model", model, config), tmp_path / "model.gguf", type)
    if type.startswith("q"):  # llama.cpp rounds activations as well
        round_like(model, result)
    with llama_cpp.Llama(result.path) as llama:
        assert relative_error(llama.logits(PROMPT), logits(model)) < tolerance


def round_like(model, result):
    """Load the file's rounded weights into the model. Rows are rounded independently, so order does not matter."""
    rounded = []
    for path, value in tree_flatten(model.parameters()):
        if value.ndim == 2:
            kind = gguf.GGMLQuantizationType[result.type.upper()]
            kind = gguf.GGMLQuantizationType.Q8_0 if "embed" in path else kind
            values = gguf.quants.dequantize(gguf.quants.quantize(np.array(value), kind), kind)
            rounded.append((path, mx.array(values)))
    model.load_weights(rounded, strict=False)


def test_rows_that_do_not_fill_blocks_stay_f16(tmp_path):
    model, config = build("llama", intermediate_size=120)
    result = export_gguf(save(tmp_path / "model", model, config), tmp_path / "model.gguf", "q4_0")
    down = tensors(result.path)["blk.0.ffn_down.weight"]
    assert down.tensor_type == gguf.GGMLQuantizationType.F16
    assert any("F16 instead of Q4_0" in note for note in result.notes)


@pytest.mark.parametrize(("value", "type", "message"), [(1e5, "f16", "bf16"), (np.nan, "f32", "NaN")])
def test_nan_and_overflow_are_rejected(tmp_path, value, type, message):
    model, config = build("llama")
    model.model.layers[3].mlp.up_proj.weight[5, 6] = value
    with pytest.raises(InputError, match=rf"layers\.3\.mlp\.up_proj\.weight.*{message}"):
        export_gguf(save(tmp_path / "model", model, config), tmp_path / "out" / "model.gguf", type)
    assert list((tmp_path / "out").iterdir()) == []


# --- quantized bases ---------------------------------------------------------------------------------

MODES = [
    ("affine", 32, 4),
    ("affine", 64, 8),
    ("affine", 32, 3),
    ("mxfp4", 32, 4),
    ("mxfp8", 32, 8),
    ("nvfp4", 16, 4),
]


@pytest.mark.parametrize(("mode", "group_size", "bits"), MODES)
@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_quantized_base_is_dequantized(tmp_path, model_type, mode, group_size, bits):
    llama_cpp.require()
    model, config = build(model_type)
    special = "model.layers.1.self_attn.v_proj"
    other = {"group_size": 32, "bits": 6, "mode": "affine"}
    nn.quantize(model, group_size, bits, mode=mode, class_predicate=choose(special, other))
    config["quantization"] = {"group_size": group_size, "bits": bits, "mode": mode, special: other}
    result = export_gguf(save(tmp_path / "model", model, config), tmp_path / "model.gguf", "f32")
    written = tensors(result.path)
    down = "ffn_down" if model_type == "llama" else "ffn_down_exps"
    expected = {"blk.1.attn_v.weight": model.model.layers[1].self_attn.v_proj}
    expected["token_embd.weight"] = model.model.embed_tokens
    layer = model.model.layers[2]
    mlp = layer.mlp if model_type == "llama" else layer.block_sparse_moe.switch_mlp
    expected[f"blk.2.{down}.weight"] = mlp.down_proj
    for name, module in expected.items():
        np.testing.assert_array_equal(plain(written[name]), dequantized(module), name)
    with llama_cpp.Llama(result.path) as llama:
        assert relative_error(llama.logits(PROMPT), logits(model)) < 1e-5


def choose(special, other):
    def predicate(path, module):
        if path.endswith(".gate"):
            return False
        return other if path == special else hasattr(module, "to_quantized")

    return predicate


def dequantized(module):
    biases = module.get("biases")
    scales = module.scales if biases is None else module.scales.astype(mx.float32)
    how = {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}
    return np.array(mx.dequantize(module.weight, scales, biases, **how, dtype=mx.float32))


def test_half_precision_scales_do_not_round_weights():
    layer = nn.Linear(64, 8)
    layer.set_dtype(mx.bfloat16)
    layer = nn.QuantizedLinear.from_linear(layer, 32, 4)
    quantization = {"group_size": 32, "bits": 4, "mode": "affine"}
    source = LazyWeight(layer.weight, (8, 64), layer.scales, layer.biases, None, quantization)
    exact = mx.dequantize(
        layer.weight, layer.scales.astype(mx.float32), layer.biases.astype(mx.float32), 32, 4
    )
    np.testing.assert_array_equal(source.read((slice(0, 8),)), np.array(exact))
    assert (exact.astype(mx.bfloat16).astype(mx.float32) != exact).any()


def test_experts_have_separate_global_scales():
    experts = SwitchLinear(32, 8, 3, bias=False)
    experts.weight = experts.weight * mx.array([1.0, 10.0, 100.0])[:, None, None]
    packed = QuantizedSwitchLinear(
        32, 8, 3, bias=False, group_size=16, bits=4, mode="nvfp4", global_scale=True
    )
    packed._quantize(experts.weight, True)
    quantization = {"group_size": 16, "bits": 4, "mode": "nvfp4"}
    source = LazyWeight(packed.weight, (3, 8, 32), packed.scales, None, packed.global_scale, quantization)
    for expert in range(3):
        exact = np.array(experts.weight[expert])
        assert relative_error(source.read((expert, slice(0, 8))), exact) < 0.15


# --- interruption ------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("disk")])
@pytest.mark.parametrize("at", [0.0, 0.5, 1.0])
def test_interrupted_export_leaves_nothing(qwen2, tmp_path, error, at):
    def stop(done, size):
        if done >= at * size:
            raise error

    with pytest.raises(BaseException, match="disk" if isinstance(error, OSError) else None):
        export_gguf(qwen2[0], tmp_path / "model.gguf", "f16", progress=stop)
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
from nalora_mlx.export.gguf.model import export_gguf

def kill(done, size):
    if done > size / 2:
        os.kill(os.getpid(), signal.SIGKILL)

export_gguf(sys.argv[1], sys.argv[2], "f16", progress=kill)
"""


def test_next_export_removes_the_temporary_file_of_a_killed_one(qwen2, tmp_path):
    target = tmp_path / "model.gguf"
    done = subprocess.run([sys.executable, "-c", KILLED, str(qwen2[0]), str(target)], capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert [path.name[:12] for path in tmp_path.iterdir()] == [".model.gguf."]
    running = tmp_path / f".model.gguf.{os.getppid()}.part"
    running.touch()
    assert export_gguf(qwen2[0], target, "f16").path.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"model.gguf", running.name}


@pytest.mark.parametrize(
    "name", ["write_header_to_file", "write_kv_data_to_file", "write_tensor_data", "flush"]
)
def test_write_error_leaves_nothing(qwen2, tmp_path, monkeypatch, name):
    def fail(*_):
        raise OSError("full")

    monkeypatch.setattr(gguf.GGUFWriter, name, fail)
    with pytest.raises(OSError, match="full"):
        export_gguf(qwen2[0], tmp_path / "model.gguf", "f16")
    assert list(tmp_path.iterdir()) == []


def test_failed_rename_keeps_the_old_file(qwen2, tmp_path, monkeypatch):
    target = tmp_path / "model.gguf"
    target.write_text("old")

    def fail(source, destination):
        raise OSError("no rename")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no rename"):
        export_gguf(qwen2[0], target, "f16", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
    assert target.read_text() == "old"


def test_existing_file_needs_overwrite(qwen2, tmp_path):
    target = tmp_path / "model.gguf"
    target.write_text("old")
    with pytest.raises(InputError, match="exists"):
        export_gguf(qwen2[0], target, "f16")
    assert target.read_text() == "old"
    assert export_gguf(qwen2[0], target, "f16", overwrite=True).path.stat().st_size > 1000


def test_progress_ends_at_the_total(qwen2, tmp_path):
    calls = []
    export_gguf(
        qwen2[0], tmp_path / "model.gguf", "q8_0", progress=lambda done, size: calls.append((done, size))
    )
    assert calls == sorted(calls)
    assert calls[-1][0] == calls[-1][1]


def test_full_disk_is_reported_before_writing(qwen2, tmp_path, monkeypatch):
    usage = writing.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(InputError, match="GB are free"):
        export_gguf(qwen2[0], tmp_path / "model.gguf", "f16")
    assert list(tmp_path.iterdir()) == []


MEMORY = """
import re, sys
from pathlib import Path
from nalora_mlx.__main__ import main
from nalora_mlx.export import modelfile, updates
from nalora_mlx.export.gguf import model as gguf_model
import mlx_lm.utils, mlx_lm.models.llama, mlx_lm.tokenizer_utils

def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

before = peak()
assert main(sys.argv[1:]) == 0
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize("adapted", [pytest.param(False, marks=pytest.mark.slow), True])
def test_memory_stays_below_the_model_size(tmp_path, adapted):
    """Merging an adapter does not copy the model either."""
    sizes = {"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 24}
    model, config = build("llama")
    config |= sizes
    model = type(model)(model.args.from_dict(config))
    model.update(tree_map(lambda array: mx.full(array.shape, 0.01, mx.float16), model.parameters()))
    directory = save(tmp_path / "model", model, config)
    output = tmp_path / "model.gguf"
    flags = ["export", "gguf", "--model", str(directory), "--output", str(output), "--type", "f16"]
    if adapted:
        flags += ["--adapter-path", str(save_adapter(model, tmp_path / "adapter"))]
    command = [sys.executable, "-c", MEMORY, *flags]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    size = output.stat().st_size
    assert size > 300e6
    assert int(done.stdout.splitlines()[-1]) < size / 3


def save_adapter(model, directory):
    """Write an adapter of rank 2 on every MLP."""
    arrays = {}
    for path, value in tree_flatten(model.parameters()):
        if ".mlp." in path:
            stem = path.removesuffix(".weight")
            arrays |= {
                f"{stem}.lora_a": mx.ones((value.shape[1], 2)),
                f"{stem}.lora_b": mx.ones((2, value.shape[0])),
            }
    directory.mkdir()
    mx.save_safetensors(str(directory / "adapters.safetensors"), arrays)
    parameters = {
        "rank": 2,
        "scale": 0.1,
        "dropout": 0.0,
        "keys": ["mlp.up_proj", "mlp.gate_proj", "mlp.down_proj"],
    }
    config = {"fine_tune_type": "lora", "num_layers": 24, "lora_parameters": parameters}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


# --- rejected models ---------------------------------------------------------------------------------

LONGROPE = {"rope_scaling": SCALING["rope_scaling"] | {"original_max_position_embeddings": 128}}
REJECTED = [
    ("llama", {"model_type": "nanochat"}, "nanochat.*llama.cpp has no such architecture"),
    ("llama", {"max_position_embeddings": None}, "max_position_embeddings"),
    ("llama", {"layer_types": ["sliding_attention"] * 5 + ["full_attention"]}, "sliding_attention"),
    ("llama", LONGROPE, "longrope"),
    ("cohere2", {"rope_theta": 1e4, "max_position_embeddings": 0}, "max_position_embeddings"),
    ("qwen2", {"rope_traditional": True}, "rope_traditional"),
    ("smollm3", {"no_rope_layers": [1] * 6}, "no_rope_layers"),
    ("gemma2", {"query_pre_attn_scalar": 144.0}, "query_pre_attn_scalar is 144.*32"),
    ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob"),
    ("qwen3_moe", {"mlp_only_layers": [1]}, "mlp_only_layers"),
    ("glm4", {"rope_traditional": False}, "partial_rotary_factor"),
    ("internlm2", {"bias": True}, "no place for tensor model.layers.0.attention.wqkv.bias"),
]


@pytest.mark.parametrize(("model_type", "changes", "message"), REJECTED)
def test_unsupported_configs_are_rejected(tmp_path, model_type, changes, message):
    config_only = {
        key: changes[key]
        for key in changes
        if key in ("model_type", "max_position_embeddings", "rope_scaling")
    }
    model, config = build(
        model_type, **{key: value for key, value in changes.items() if key not in config_only}
    )
    directory = save(tmp_path / "model", model, config | config_only)
    with pytest.raises(InputError, match=message) as raised:
        export_gguf(directory, tmp_path / "out" / "model.gguf", "f16")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_all_tensor_problems_are_listed(tmp_path):
    model, config = build("llama")
    directory = save(tmp_path / "model", model, config)
    weights = dict(tree_flatten(model.parameters()))
    del weights["model.norm.weight"]
    weights["model.layers.1.mlp.up_proj.weight"] = mx.zeros((3, 4))
    weights["model.layers.2.extra.weight"] = mx.zeros((3,))
    mx.save_safetensors(str(directory / "model.safetensors"), weights)
    with pytest.raises(InputError) as raised:
        export_gguf(directory, tmp_path / "model.gguf", "f16")
    for part in (
        "model.norm.weight is missing",
        "up_proj.weight has shape (3, 4), expected (128, 64)",
        "extra.weight is unexpected",
    ):
        assert part in str(raised.value)
    assert not (tmp_path / "model.gguf").exists()


def test_unknown_config_keys_are_named_once(tmp_path, capsys):
    model, config = build("llama")
    directory = save(tmp_path / "model", model, config | {"strange_key": 1})
    argv = [
        "export",
        "gguf",
        "--model",
        str(directory),
        "--output",
        str(tmp_path / "model.gguf"),
        "--dry-run",
    ]
    assert main(argv) == 0
    assert capsys.readouterr().err.count("strange_key") == 1


def test_missing_config_keys_are_named(tmp_path):
    model, config = build("llama")
    del config["vocab_size"], config["hidden_size"]
    with pytest.raises(InputError, match=r"config\.json: has no hidden_size, vocab_size"):
        export_gguf(save(tmp_path / "model", model, config), tmp_path / "model.gguf", "f16")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", None, "not found"),
        ("config.json", "{", "cannot be read"),
        ("config.json", "[]", "JSON object"),
        ("config.json", "{}", "no model_type"),
        ("model.safetensors", None, "No safetensors"),
        ("model.safetensors", "broken", "not a valid safetensors file"),
        ("tokenizer.json", None, "no tokenizer.json"),
        ("tokenizer.json", "{", "tokenizer.json.*cannot be read"),
        ("tokenizer.json", "{}", "None tokenizer"),
    ],
)
def test_missing_and_damaged_files_are_named(tmp_path, file, content, message):
    directory = save(tmp_path / "model", *build("llama"))
    (directory / file).unlink()
    if content is not None:
        (directory / file).write_text(content)
    with pytest.raises(InputError, match=message):
        export_gguf(directory, tmp_path / "model.gguf", "f16")
    assert not (tmp_path / "model.gguf").exists()


def test_command_has_every_type():
    from nalora_mlx.export.arguments import TYPES

    assert tuple(gguf_model.FILE_TYPES) == TYPES


def test_unknown_types_and_directories_are_rejected(qwen2, tmp_path):
    with pytest.raises(InputError, match=r"q3_k_m.*choose one of f32"):
        export_gguf(qwen2[0], tmp_path / "model.gguf", "q3_k_m")
    with pytest.raises(InputError, match="is a directory"):
        export_gguf(qwen2[0], tmp_path, "f16")


def test_missing_gguf_is_reported():
    code = "import sys; sys.modules['gguf'] = None; import nalora_mlx.export.gguf.model"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert f"InputError: export gguf needs the package gguf: {install_command('export')}" in run.stderr


# --- metadata ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "written"), [("my-tune", "my-tune"), ("Phi-3-mini", "Phi 3-mini")])
def test_name_does_not_make_llama_cpp_expect_phi3_tokens(tmp_path, name, written):
    llama_cpp.require()
    directory = save(tmp_path / "model", *build("phi3"))
    result = export_gguf(directory, tmp_path / "model.gguf", "f16", name=name)
    assert gguf.GGUFReader(result.path).fields["general.name"].contents() == written
    with llama_cpp.Llama(result.path) as llama:
        assert llama.logits(PROMPT).shape == (len(PROMPT), VOCABULARY)


def test_phi3_special_tokens_strip_the_spaces_after_them(tmp_path):
    llama_cpp.require()
    from tokenizers import AddedToken, Tokenizer

    directory = save(tmp_path / "model", *build("phi3"))
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(t, rstrip=t == "</s>") for t in ("<unk>", "<s>", "</s>")])
    tokenizer.add_special_tokens(["<|endoftext|>", AddedToken("<|end|>", rstrip=True, normalized=False)])
    model, config = build("phi3", vocab_size=tokenizer.get_vocab_size())
    save(directory, model, config)
    tokenizer.save(str(directory / "tokenizer.json"))
    result = export_gguf(directory, tmp_path / "model.gguf", "f16", name="tune")
    text = "a<|end|>  \n b <|endoftext|> c</s> d"
    with llama_cpp.Llama(result.path) as llama:
        assert llama.tokenize(text) == tokenizer.encode(text).ids


def test_file_contains_no_local_path(qwen2, tmp_path):
    result = export_gguf(qwen2[0], tmp_path / "model.gguf", "f16")
    assert str(qwen2[0].parent).encode() not in result.path.read_bytes()
    assert json.loads((qwen2[0] / "config.json").read_text())["vocab_size"] == VOCABULARY
