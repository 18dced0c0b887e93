"""`nalora fuse` of vision-language models: the result loads in unmodified mlx-vlm, and equals base + adapter."""

import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed (pip install '.[vlm]')")

import mlx_vlm
from mlx_lm.utils import load as load_text_model
from mlx_vlm.utils import load_model

from nalora_mlx.__main__ import main
from nalora_mlx.adapters import merge_quality
from nalora_mlx.adapters.attach import adapt
from nalora_mlx.adapters.comparison import load_tuned
from nalora_mlx.adapters.files import adapter_config, adapter_files
from nalora_mlx.adapters.merge import fuse_model
from nalora_mlx.adapters.vision import needs_vision
from nalora_mlx.core import storage
from nalora_mlx.core.config import NALoRAConfig
from nalora_mlx.models.loading import load_module
from nalora_mlx.models.vision.loading import open_processor, open_vision_model
from tests.conftest import random_adapters
from tests.vision.tiny_models import FAMILIES, picture, save_model

TOLERANCE = 1e-5
# As the models were published, which mlx-vlm renames when it loads them.
PUBLISHED = {
    "qwen2_5_vl": (
        ("language_model.model.", "model."),
        ("language_model.", ""),
        ("vision_tower.", "visual."),
    ),
    "smolvlm": (
        ("language_model.lm_head", "lm_head"),
        ("language_model.", "model.text_model."),
        ("", "model."),
    ),
}


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    """Compare models on a few tokens."""
    monkeypatch.setattr(merge_quality, "ANSWER_TOKENS", 2)
    monkeypatch.setattr(merge_quality, "PROMPTS", merge_quality.PROMPTS[:2])


def save_published(name, directory):
    """Save a tiny model whose tensors have the names under which it was published."""
    base = save_model(name, directory)
    arrays = mx.load(str(base / "model.safetensors"))
    renamed = {}
    for path, array in arrays.items():
        pairs = PUBLISHED[name]
        stored = next((new + path.removeprefix(old) for old, new in pairs if path.startswith(old)), path)
        renamed[stored] = mx.array(np.array(array))
    assert renamed.keys() != arrays.keys()
    mx.save_safetensors(str(base / "model.safetensors"), renamed, {"format": "pt"})
    (base / "chat_template.json").write_text(json.dumps({"chat_template": FAMILIES[name].template}))
    (base / "video_preprocessor_config.json").write_text("{}")
    return base


def save_quantized(directory, group_size=32, bits=4):
    """Save a tiny Qwen2.5-VL whose language model has 4 bits."""
    base = save_model("qwen2_5_vl", directory)
    model, _ = open_vision_model(str(base))

    def fits(path, module):
        return hasattr(module, "to_quantized") and module.weight.shape[-1] % group_size == 0

    nn.quantize(model.language_model, group_size, bits, class_predicate=fits)
    mx.save_safetensors(str(base / "model.safetensors"), dict(tree_flatten(model.parameters())))
    config = json.loads((base / "config.json").read_text())
    config["quantization"] = {"group_size": group_size, "bits": bits}
    (base / "config.json").write_text(json.dumps(config))
    return base


def train(base, directory, **settings):
    """Save an adapter with random values; return the adapted model and the adapter's directory."""
    model, _ = open_vision_model(str(base))
    adapt(model, NALoRAConfig(rank=2, num_layers=-1, **settings))
    random_adapters(model)
    storage.write_directory(directory, adapter_files(model, adapter_config(model)))
    return model, directory


def fuse(base, adapter, target, *flags):
    paths = ["--model", base, "--adapter-path", adapter, "--save-path", target]
    return main(["fuse", *map(str, (*paths, *flags))])


def given_to(base):
    """Return token ids, and what else the model's processor makes of a text with an image."""
    processor = open_processor(str(base), storage.read_json(base / "config.json"))
    given = processor.arrays(f"what is {processor.placeholder} this", [picture(20, 14)], "a row")
    rest = {key: value for key, value in given.items() if key not in ("input_ids", "attention_mask")}
    return mx.array(given["input_ids"]), {
        key: mx.array(value) if isinstance(value, np.ndarray) else value for key, value in rest.items()
    }


def logits(model, ids, rest):
    given = model.get_input_embeddings(ids, mask=mx.ones_like(ids), **rest).to_dict()
    arguments = {key: value for key, value in given.items() if value is not None}
    return np.array(model.language_model(ids, **arguments).logits)


def answer(model, processor, base):
    text = f"what is {open_processor(str(base), storage.read_json(base / 'config.json')).placeholder}"
    image = picture(20, 14)
    return mlx_vlm.generate(
        model, processor, text, [image], max_tokens=12, temperature=0.0, verbose=False
    ).text


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_fused_model_is_base_and_adapter_in_mlx_vlm(name, tmp_path, capsys):
    base = save_published(name, tmp_path / "base")
    model, adapter = train(base, tmp_path / "adapter", vision=True)
    assert fuse(base, adapter, tmp_path / "fused", "--force") == 0
    assert "same first choice" in capsys.readouterr().out
    ids, rest = given_to(base)
    expected = logits(model, ids, rest)
    plain, processor = mlx_vlm.load(str(base))
    fused, own_processor = mlx_vlm.load(str(tmp_path / "fused"))
    assert np.abs(logits(plain, ids, rest) - expected).max() > 0.1
    np.testing.assert_allclose(logits(fused, ids, rest), expected, rtol=0, atol=TOLERANCE)
    tuned, _ = mlx_vlm.load(str(base), adapter_path=str(adapter))
    assert answer(fused, own_processor, base) == answer(tuned, processor, base)

    before, after = (mx.load(str(path / "model.safetensors")) for path in (base, tmp_path / "fused"))
    assert before.keys() == after.keys()
    changed = {key for key in before if not np.array_equal(np.array(before[key]), np.array(after[key]))}
    assert len(changed) == sum("lora_a" in module for _, module in model.named_modules())
    for path in base.iterdir():
        if path.name not in ("model.safetensors", "config.json"):
            assert path.read_bytes() == (tmp_path / "fused" / path.name).read_bytes(), path.name
    card = (tmp_path / "fused" / "README.md").read_text()
    assert "mlx_vlm.generate --model fused --image" in card
    assert "image-text-to-text" in card
    assert fuse(tmp_path / "fused", adapter, tmp_path / "twice") == 2
    assert "already contains" in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - PUBLISHED.keys()))
def test_merged_towers_of_every_family_load_in_mlx_vlm(name, tmp_path):
    base = save_model(name, tmp_path / "base")
    model, adapter = train(base, tmp_path / "adapter", vision=True)
    assert fuse(base, adapter, tmp_path / "fused", "--force") == 0
    ids, rest = given_to(base)
    expected = logits(model, ids, rest)
    plain, fused = (load_model(path) for path in (base, tmp_path / "fused"))
    assert np.abs(logits(plain, ids, rest) - expected).max() > 0.1
    scale = max(1, np.abs(expected).max())
    np.testing.assert_allclose(logits(fused, ids, rest), expected, rtol=0, atol=TOLERANCE * scale)


@pytest.mark.parametrize("flags", [(), ("--bits", "same"), ("--dequantize",)])
def test_only_adapted_layers_of_a_quantized_model_change_their_bits(flags, tmp_path):
    base = save_quantized(tmp_path / "base")
    model, adapter = train(
        base, tmp_path / "adapter", keys=("self_attn.q_proj", "mlp.gate_proj"), vision=True
    )
    assert fuse(base, adapter, tmp_path / "fused", "--force", *flags) == 0
    fused, _ = mlx_vlm.load(str(tmp_path / "fused"))
    config = json.loads((tmp_path / "fused" / "config.json").read_text())
    bits = {path: module.bits for path, module in fused.named_modules() if "scales" in module}
    assert not any(path.startswith("vision_tower") for path in bits)
    if flags == ("--dequantize",):
        assert not bits
        assert "quantization" not in config
    else:
        adapted = {p for p, m in model.named_modules() if "lora_a" in m and p.startswith("language_model")}
        expected = 4 if flags else 8
        assert len(adapted) == 4
        assert all(found == (expected if path in adapted else 4) for path, found in bits.items())
    fuse_model(model, *{(): (8,), ("--bits", "same"): (None,), ("--dequantize",): (8, True)}[flags])
    ids, rest = given_to(base)
    # Dequantizing the layers without an adapter rounds nothing in float32.
    np.testing.assert_allclose(logits(fused, ids, rest), logits(model, ids, rest), rtol=0, atol=TOLERANCE)


def test_weights_in_another_form_are_written_under_the_names_of_mlx_vlm(tmp_path, capsys):
    """Mistral 3 is published in 8-bit floats with a scale, which mlx-vlm multiplies as it loads them."""
    base = save_model("mistral3", tmp_path / "base")
    arrays = {path: mx.array(np.array(a)) for path, a in mx.load(str(base / "model.safetensors")).items()}
    name = "language_model.model.layers.0.self_attn.q_proj.weight"
    arrays[name], arrays[f"{name}_scale_inv"] = mx.to_fp8(arrays[name]), mx.array(1.0)
    mx.save_safetensors(str(base / "model.safetensors"), arrays)
    model, adapter = train(base, tmp_path / "adapter")
    assert fuse(base, adapter, tmp_path / "fused", "--keep-all") == 2
    assert f"cannot be written back: {name}" in capsys.readouterr().err
    assert fuse(base, adapter, tmp_path / "fused", "--force") == 0
    assert "tensors have the names and forms of mlx-vlm" in capsys.readouterr().err
    fused, _ = mlx_vlm.load(str(tmp_path / "fused"))
    assert f"{name}_scale_inv" not in mx.load(str(tmp_path / "fused" / "model.safetensors"))
    ids, rest = given_to(base)
    fuse_model(model)
    np.testing.assert_allclose(logits(fused, ids, rest), logits(model, ids, rest), rtol=0, atol=TOLERANCE)


def test_an_adapter_says_whether_its_model_saw_images(tmp_path):
    base = save_model("qwen2_5_vl", tmp_path / "base")
    config = storage.read_json(base / "config.json")
    _, adapter = train(base, tmp_path / "seeing")
    assert needs_vision(config, adapter)
    text, _ = load_module(str(base))
    adapt(text, NALoRAConfig(rank=2))
    storage.write_directory(tmp_path / "text", adapter_files(text, adapter_config(text)))
    assert not needs_vision(config, tmp_path / "text")
    assert not needs_vision(config, None)
    assert needs_vision(storage.read_json(save_model("smolvlm", tmp_path / "smol") / "config.json"), None)


def test_an_adapter_trained_on_images_works_for_text_in_mlx_lm(tmp_path):
    base = save_model("qwen2_5_vl", tmp_path / "base")
    model, adapter = train(base, tmp_path / "adapter")
    tokens = mx.array([[60, 61, 62, 63, 64]])
    tuned, _ = load_text_model(str(base), adapter_path=str(adapter))
    plain, _ = load_text_model(str(base))
    expected = np.array(model(tokens))
    assert np.abs(np.array(plain(tokens)) - expected).max() > 0.1
    np.testing.assert_allclose(np.array(tuned(tokens)), expected, rtol=0, atol=TOLERANCE)


def test_base_and_tuned_model_share_weights(tmp_path):
    base = save_model("smolvlm", tmp_path / "base")
    model, adapter = train(base, tmp_path / "adapter", vision=True)
    plain, _ = open_vision_model(str(base))
    tuned = load_tuned(plain, str(base), adapter)
    ids, rest = given_to(base)
    np.testing.assert_allclose(logits(tuned, ids, rest), logits(model, ids, rest), rtol=0, atol=TOLERANCE)
    weight = plain.language_model.layers[0].mlp.gate_proj.weight
    assert tuned.language_model.layers[0].mlp.gate_proj.linear.weight is weight


def test_gguf_of_a_merged_tower_is_refused_before_the_merge(tmp_path, capsys):
    base = save_model("qwen2_5_vl", tmp_path / "base")
    _, adapter = train(base, tmp_path / "adapter", projector=True)
    assert fuse(base, adapter, tmp_path / "fused", "--export-gguf") == 2
    assert "adapts vision_tower.merger" in capsys.readouterr().err
    assert not (tmp_path / "fused").exists()
