"""K-quants: each tensor has the type that llama.cpp's quantizer chooses, and its values are close.

k_quants.json has the types that llama_model_quantize of llama.cpp v0.5.0 chose for the F32 files of these models.
"""

import json
import re
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from nalora_mlx.core.errors import InputError
from nalora_mlx.core.optional_dependencies import install_command
from tests.interop import llama_cpp
from tests.interop.gguf_models import PROMPT, build, logits, save
from tests.logit_comparison import relative_error

gguf = pytest.importorskip("gguf", reason="needs gguf: pip install 'nalora-mlx[export]'")
pytest.importorskip("xllamacpp", reason="needs xllamacpp (llama.cpp)")
gguf_types = pytest.importorskip("nalora_mlx.export.gguf.tensor_types")

TYPES = ("q4_k_m", "q5_k_m", "q6_k")
WIDE = {"hidden_size": 256, "intermediate_size": 256}
NARROW = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 80}
CASES = {
    "llama, 12 layers": ("llama", {"hidden_size": 256, "intermediate_size": 320, "num_hidden_layers": 12}),
    "row length not a multiple of 256": (
        "llama",
        {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 9},
    ),
    "row length not a multiple of 32": (
        "llama",
        {"hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 3, "num_key_value_heads": 3},
    ),
    "untied head": ("llama", WIDE | {"num_hidden_layers": 9, "tie_word_embeddings": False}),
    "llama, 80 layers, grouped-query attention": ("llama", NARROW),
    "llama, 80 layers, multi-head attention": ("llama", NARROW | {"num_key_value_heads": 4}),
    "qwen2, 80 layers": ("qwen2", NARROW),
    "eight experts": ("mixtral", WIDE | {"num_local_experts": 8, "num_hidden_layers": 5}),
    "four experts": ("mixtral", WIDE | {"num_local_experts": 4, "num_hidden_layers": 5}),
    "fused q, k and v": ("phi3", WIDE | {"num_hidden_layers": 9}),
    "tied, with output.weight in GGUF": (
        "olmo2",
        WIDE | {"num_hidden_layers": 5, "tie_word_embeddings": True},
    ),
}
# Variants of other cases.
SLOW_CASES = ("llama, 80 layers, multi-head attention", "qwen2, 80 layers", "four experts")


def summary(path):
    """Return the types of a file's matrices: {stem: {type: layers}}; no layers for tensors outside them."""
    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        if len(tensor.shape) > 1:
            parts = re.fullmatch(r"blk\.(\d+)\.(.*)", tensor.name)
            stem, layer = (parts[2], [int(parts[1])]) if parts else (tensor.name, [])
            found.setdefault(stem, {}).setdefault(tensor.tensor_type.name, []).extend(layer)
    return {stem: {name: sorted(layers) for name, layers in kinds.items()} for stem, kinds in found.items()}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] * (case in SLOW_CASES)) for case in CASES]
)
def test_tensor_types_are_those_of_llama_cpp(tmp_path, case):
    from nalora_mlx.export.gguf.model import export_gguf

    recorded = json.loads(Path(__file__).with_name("k_quants.json").read_text())
    model_type, changes = CASES[case]
    directory = save(tmp_path / "model", *build(model_type, **changes))
    for type in TYPES:
        result = export_gguf(directory, tmp_path / f"{type}.gguf", type)
        assert summary(result.path) == recorded[case][type], type


# Largest relative root-mean-square error of each type on normal values, dequantized by gguf-py.
ERRORS = {"Q4_K": 0.09, "Q5_K": 0.045, "Q6_K": 0.025, "Q5_0": 0.06, "Q5_1": 0.05, "Q8_0": 0.01}


@pytest.mark.parametrize("name", ERRORS)
def test_quantized_values_are_close(name):
    type = gguf.GGMLQuantizationType[name]
    gguf_types.check_type("q4_k_m")
    values = np.random.default_rng(0).normal(size=(37, 512)).astype(np.float32)
    data = gguf_types.quantize(values, type, use_llama_cpp=True)
    assert data.size == gguf_types.byte_size(values.shape, type)
    back = gguf.quants.dequantize(data.reshape(37, -1), type)
    error = relative_error(back, values)
    assert 0 < error < ERRORS[name]
    # Rows are quantized independently, so threads do not change them.
    one = gguf_types.quantize(values[5:6], type, use_llama_cpp=True)
    np.testing.assert_array_equal(data.reshape(37, -1)[5], one)


@pytest.mark.parametrize("type", TYPES)
def test_llama_cpp_runs_k_quants(tmp_path, type):
    """llama.cpp gives mlx's logits for the rounded weights, except that it also rounds activations."""
    from nalora_mlx.export.gguf.model import export_gguf

    llama_cpp.require()
    model, config = build("qwen2", **WIDE, num_hidden_layers=1)
    result = export_gguf(save(tmp_path / "model", model, config), tmp_path / "model.gguf", type)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, 1)
    paths = {
        names.get_name(path, try_suffixes=(".weight", ".bias")): path
        for path, _ in tree_flatten(model.parameters())
    }
    rounded = [
        (paths[t.name], mx.array(gguf.quants.dequantize(t.data, t.tensor_type).reshape(t.shape[::-1])))
        for t in gguf.GGUFReader(result.path).tensors
    ]
    before = logits(model)
    model.load_weights(rounded)
    with llama_cpp.Llama(result.path) as llama:
        assert relative_error(llama.logits(PROMPT), logits(model)) < 0.08
    assert not np.array_equal(before, logits(model))


def test_missing_xllamacpp_is_reported(monkeypatch):
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    gguf_types._load_llama_cpp.cache_clear()
    with pytest.raises(InputError, match=f"K-quants need .* {re.escape(install_command('export'))}"):
        gguf_types.check_type("q4_k_m")
    gguf_types.check_type("q4_0")
