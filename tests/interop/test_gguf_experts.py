"""GGUF export of experts and latent attention: refused configs, merged adapters, and MXFP4 kept bit for bit."""

import dataclasses

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from nalora_mlx.core.errors import InputError
from nalora_mlx.export.gguf.architecture import Architecture
from nalora_mlx.export.gguf.architectures import ARCHITECTURES
from tests.interop import llama_cpp
from tests.interop.configs_experts import CONFIGS, REFUSED
from tests.interop.gguf_models import PROMPT, build, logits, save
from tests.interop.test_gguf_lora import export, prepare
from tests.logit_comparison import close, relative_error

gguf = pytest.importorskip("gguf", reason="needs gguf: pip install 'nalora-mlx[export]'")
llama_cpp.require()

from nalora_mlx.export.gguf.model import export_gguf  # noqa: E402 - needs gguf

Type = gguf.GGMLQuantizationType


def changed(model_type, changes):
    """Return changes of a config's top level that make these changes in the text model's config."""
    if "text_config" not in CONFIGS[model_type]:
        return changes
    return {"text_config": CONFIGS[model_type]["text_config"] | changes}


@pytest.mark.parametrize(("model_type", "changes", "message"), REFUSED)
def test_configs_that_llama_cpp_computes_differently_are_refused(tmp_path, model_type, changes, message):
    directory = save(tmp_path / "model", *build(model_type, **changed(model_type, changes)))
    with pytest.raises(InputError, match=message):
        export_gguf(directory, tmp_path / "model.gguf", "f32")


# Refused configs that llama.cpp would load.
LOADED = {"mscale", "n_group is 2", "group_limited_greedy", "norm_topk_prob", "indexer_rope_interleave"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "changes"),
    [(m, c) for m, c, message in REFUSED if any(word in message for word in LOADED)],
)
def test_refused_configs_would_give_other_logits(tmp_path, monkeypatch, model_type, changes):
    unchecked = dataclasses.replace(ARCHITECTURES[model_type], extra_checks=Architecture("any").extra_checks)
    monkeypatch.setitem(ARCHITECTURES, model_type, unchecked)
    model, config = build(model_type, **changed(model_type, changes))
    result = export_gguf(save(tmp_path / "model", model, config), tmp_path / "model.gguf", "f32")
    with llama_cpp.Llama(result.path) as llama:
        assert relative_error(llama.logits(PROMPT), logits(model)) > 1e-3


@pytest.mark.parametrize("model_type", ["bailing_moe", "dbrx", "deepseek_v2", "deepseek_v3", "gpt_oss"])
def test_merge_of_all_layers_is_exact(tmp_path, model_type):
    """Also of layers for which llama.cpp has no adapters, of split matrices and of stacked experts."""
    base, adapter, plain, tuned = prepare(tmp_path, model_type, {}, None)
    assert export("gguf", base, tmp_path / "whole.gguf", "--type", "f32", "--adapter-path", adapter) == 0
    with llama_cpp.Llama(tmp_path / "whole.gguf") as llama:
        close(llama.logits(PROMPT), tuned, plain, 1e-5)


def test_adapter_of_layers_without_support_is_rejected_and_names_them_once(tmp_path, capsys):
    base, adapter, *_ = prepare(tmp_path, "deepseek_v2", {}, None)
    assert export("gguf-lora", base, tmp_path / "lora.gguf", "--adapter-path", adapter) == 2
    error = capsys.readouterr().err
    names = [
        f"model.layers.*.self_attn.{name}"
        for name in ("kv_a_proj_with_mqa", "kv_b_proj", "q_a_proj", "q_b_proj")
    ]
    assert f"error: {', '.join(names)}: llama.cpp's deepseek2 cannot have an adapter here" in error
    assert "merge it: nalora export gguf --adapter-path" in error


def test_a_small_difference_is_a_note(tmp_path):
    model, config = build("deepseek_v3", rms_norm_eps=1e-5)
    result = export_gguf(save(tmp_path / "model", model, config), tmp_path / "model.gguf", "f32")
    assert any("epsilon 1e-05 in llama.cpp and 1e-06 in mlx-lm" in note for note in result.notes)
    with llama_cpp.Llama(result.path) as llama:
        assert relative_error(llama.logits(PROMPT), logits(model)) < 1e-4


# --- MXFP4 -------------------------------------------------------------------------------------------

EXPERTS = [f"mlp.experts.{name}_proj" for name in ("gate", "up", "down")]


def quantize_experts(model, config, mode="mxfp4", group_size=32):
    """Quantize the experts in place. Their codes and factors are random, so that no rounding would restore them."""
    nn.quantize(
        model,
        group_size,
        4,
        mode=mode,
        class_predicate=lambda path, _: path.split("layers.")[-1][2:] in EXPERTS,
    )
    if mode == "mxfp4":
        rng = np.random.default_rng(3)
        for layer in model.layers:
            for name in EXPERTS:
                module = getattr(layer.mlp.experts, name.split(".")[-1])
                words = rng.integers(0, 2**32, module.weight.shape, dtype=np.uint32)
                words[..., :1, :4] = 0  # a block of zeros whose factor is not that of zeros
                module.weight = mx.array(words)
                module.scales = mx.array(rng.integers(118, 125, module.scales.shape, dtype=np.uint8))
    return model, config | {"quantization": {"group_size": group_size, "bits": 4, "mode": mode}}


def experts_of(path):
    """Return the tensors of experts' weights in a GGUF file by name."""
    return {t.name: t for t in gguf.GGUFReader(path).tensors if t.name.endswith("_exps.weight")}


def module_of(model, name):
    """Return the module of mlx-lm's model for the tensor of a GGUF file."""
    _, layer, kind, _ = name.split(".")
    return getattr(model.layers[int(layer)].mlp.experts, kind.split("_")[1] + "_proj")


def blocks(words, factors):
    """Return GGUF's blocks of one row, block by block and value by value, after the specification."""
    values = [int(words[i // 8]) >> 4 * (i % 8) & 15 for i in range(32 * len(factors))]
    data = []
    for number, factor in enumerate(factors):
        block = values[32 * number : 32 * number + 32]
        data += [int(factor), *(block[j] | block[j + 16] << 4 for j in range(16))]
    return data


@pytest.mark.parametrize("type", ["f16", "q8_0", "q4_k_m"])
def test_mxfp4_experts_are_copied(tmp_path, type):
    model, config = quantize_experts(*build("gpt_oss"))
    result = export_gguf(save(tmp_path / "model", model, config), tmp_path / "model.gguf", type)
    tensors = experts_of(result.path)
    assert len(tensors) == 3 * len(model.layers)
    assert any(note.startswith("12 of 79 tensors keep the MXFP4 values") for note in result.notes)
    for name, tensor in tensors.items():
        assert tensor.tensor_type == Type.MXFP4
        module = module_of(model, name)
        expected = mx.dequantize(module.weight, module.scales, None, 32, 4, mode="mxfp4", dtype=mx.float32)
        np.testing.assert_array_equal(
            gguf.quants.dequantize(tensor.data, Type.MXFP4).reshape(expected.shape), np.array(expected)
        )
        for expert, row in ((0, 0), (3, 5)):  # the bytes, which say more than the values
            words, factors = np.array(module.weight[expert, row]), np.array(module.scales[expert, row])
            assert tensor.data[expert, row].tolist() == blocks(words, factors)
    with llama_cpp.Llama(result.path) as llama:  # it rounds activations to eight bits
        assert relative_error(llama.logits(PROMPT), logits(model)) < (0.1 if type == "f16" else 1.0)


@pytest.mark.parametrize(
    ("keys", "changed_layers"), [(("self_attn.q_proj",), 0), (("mlp.experts.up_proj",), 4)]
)
def test_merging_an_adapter_keeps_the_blocks_of_other_experts(tmp_path, keys, changed_layers):
    model, config = quantize_experts(*build("gpt_oss"))
    base, adapter = prepare_quantized(tmp_path, model, config, keys)
    for file, flags in {"base.gguf": (), "whole.gguf": ("--adapter-path", adapter)}.items():
        assert export("gguf", base, tmp_path / file, "--type", "q8_0", *flags) == 0
    before, after = experts_of(tmp_path / "base.gguf"), experts_of(tmp_path / "whole.gguf")
    other = [name for name in before if after[name].tensor_type != Type.MXFP4]
    assert len(other) == changed_layers
    for name in before:
        if name in other:
            assert "ffn_up_exps" in name
            assert after[name].tensor_type == Type.Q8_0
        else:
            np.testing.assert_array_equal(after[name].data, before[name].data)


def prepare_quantized(tmp_path, model, config, keys):
    """Save a quantized model and a random adapter of it; return their directories."""
    from nalora_mlx.adapters.attach import adapt
    from nalora_mlx.adapters.files import adapter_config, adapter_weights
    from nalora_mlx.core import storage
    from nalora_mlx.core.config import NALoRAConfig
    from tests.conftest import random_adapters

    base = save(tmp_path / "base", model, config)
    adapt(model, NALoRAConfig(num_layers=-1, rank=4, scale=3.0, keys=keys))
    random_adapters(model, seed=7, size=0.1)
    files = {
        "adapters.safetensors": storage.arrays_writer(adapter_weights(model)),
        "adapter_config.json": storage.json_writer(adapter_config(model)),
    }
    storage.write_directory(tmp_path / "adapter", files)
    return base, tmp_path / "adapter"


@pytest.mark.parametrize(("mode", "group_size"), [("affine", 32), ("mxfp4", 32)])
def test_other_quantized_weights_get_the_requested_type(tmp_path, mode, group_size):
    """Experts in another format, and MXFP4 in layers that are no experts."""
    model, config = build("gpt_oss")
    if mode == "affine":
        model, config = quantize_experts(model, config, mode, group_size)
    else:
        nn.quantize(model, 32, 4, mode=mode, class_predicate=lambda path, _: path.endswith("o_proj"))
        config |= {"quantization": {"group_size": 32, "bits": 4, "mode": mode}}
    result = export_gguf(save(tmp_path / "model", model, config), tmp_path / "model.gguf", "q8_0")
    types = {t.name: t.tensor_type for t in gguf.GGUFReader(result.path).tensors}
    assert types["blk.0.ffn_up_exps.weight"] == types["blk.0.attn_output.weight"] == Type.Q8_0
    assert not any("MXFP4" in note for note in result.notes)


def test_a_factor_of_nan_is_rejected(tmp_path):
    model, config = quantize_experts(*build("gpt_oss"))
    module = model.layers[1].mlp.experts.up_proj
    module.scales[2, 3, 0] = 255
    with pytest.raises(InputError, match=r"layers.1.mlp.experts.up_proj.weight: has NaN.*damaged"):
        export_gguf(save(tmp_path / "model", model, config), tmp_path / "model.gguf", "f16")
    assert not (tmp_path / "model.gguf").exists()


def test_routers_and_biases_stay_in_full_precision(tmp_path):
    for model_type in ("gpt_oss", "deepseek_v3"):
        model, config = build(model_type)
        result = export_gguf(
            save(tmp_path / model_type, model, config), tmp_path / "model.gguf", "q4_0", overwrite=True
        )
        for tensor in gguf.GGUFReader(result.path).tensors:
            if ".ffn_gate_inp." in tensor.name or tensor.name.endswith(".bias"):
                assert tensor.tensor_type == Type.F32
