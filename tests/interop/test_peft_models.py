"""PEFT adapters of models that transformers saved: mlx gives the same logits, and so does PEFT after the way back."""

import json
import re
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from nalora_mlx.adapters.files import load_any_adapter
from nalora_mlx.core.errors import InputError
from nalora_mlx.export.lazy_model import open_model
from nalora_mlx.export.mlx_adapter import export_mlx
from nalora_mlx.export.peft import export_peft
from nalora_mlx.export.peft_import import read_peft
from nalora_mlx.export.peft_names import our_path, their_path
from nalora_mlx.models.chat_templates import ChatSettings
from nalora_mlx.models.loading import open_module
from tests.interop.gguf_models import ZOO

torch = pytest.importorskip("torch", reason="needs PyTorch: see CONTRIBUTING.md")
peft = pytest.importorskip("peft", reason="needs PEFT: see CONTRIBUTING.md")

PROMPT = [int(token) for token in np.random.default_rng(1).integers(3, 90, 24)]
TIED = {"tie_word_embeddings": True}
NO_WINDOW = {"layer_types": None, "sliding_window": None}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LINEAR_ATTENTION = {"layer_types": ["linear_attention", "full_attention"], "full_attention_interval": 2}
SLIDING = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
# Model type -> changes of the miniature's config, for transformers.
TYPES = {
    "afmoe": {},
    "apertus": {},
    "cohere": TIED,
    "dbrx": {},
    "deepseek_v2": {"norm_topk_prob": False},
    "deepseek_v3": {"head_dim": 8},
    "dots1": {"mlp_bias": False},
    "exaone4": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window_pattern": "LG"},
    "exaone_moe": {},
    "falcon_h1": {"head_dim": 16},
    "glm": {"partial_rotary_factor": 1.0, "rope_parameters": ROPE | {"partial_rotary_factor": 1.0}},
    "glm4_moe": {"rope_scaling": None},
    "glm4_moe_lite": {},
    "granitemoe": {},
    "granitemoehybrid": {"mamba_d_head": 32},
    "helium": {},
    "internlm3": {"bias": False, "qkv_bias": False},
    "laguna": {},
    "lfm2": TIED,
    "lfm2_moe": TIED,
    "mellum": {},
    "ministral3": NO_WINDOW,
    "nemotron_h": {"time_step_min": 1e-30},
    "olmo3": {},
    "olmoe": {},
    "phi": {},
    "phimoe": {"attention_bias": True, "lm_head_bias": True},
    "qwen2_moe": {"mlp_only_layers": [], "norm_topk_prob": False},
    "qwen3_next": LINEAR_ATTENTION
    | {"mlp_only_layers": [], "rope_parameters": ROPE | {"partial_rotary_factor": 0.5}},
    "qwen3_5_text": LINEAR_ATTENTION,
    "qwen3_5_moe_text": LINEAR_ATTENTION,
    "gemma4_text": {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "enable_moe_block": False,
        "global_head_dim": 32,
        "tie_word_embeddings": True,
    },
    "seed_oss": {},
}
QUICK = ("gemma4_text", "lfm2_moe", "nemotron_h", "qwen3_5_text")
# Linear layers that PEFT does not adapt, or that mlx-lm has in another form.
LEFT_OUT = re.compile(r"lm_head|experts\.\d|(^|\.)(router|gate)(\.|$)|shared_expert_gate|kv_b_proj")
# PEFT refuses an adapter of a Mamba layer's output, because its kernel goes around it.
MAMBA = re.compile(r"mamba\.out_proj|mixer\.out_proj")


def miniature_config(model_type):
    config = ZOO[model_type if model_type in ZOO else model_type.removesuffix("_text")].config
    return config.get("text_config", config)


def build(model_type, directory):
    """Save a random model with transformers; every weight affects the logits."""
    from transformers import AutoConfig, AutoModelForCausalLM

    known = AutoConfig.for_model(model_type).to_dict().keys() - {"model_type"}
    miniature = {key: value for key, value in miniature_config(model_type).items() if key in known}
    tokens = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **miniature | TYPES[model_type] | tokens)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    randomize(model).save_pretrained(directory)
    if model_type == "qwen3_5_moe_text":
        stack_experts(directory / "model.safetensors")
    if model_type == "gemma4_text":  # transformers 5.24 saves it under another name
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"global_head_dim": 32}))
    return model


def randomize(model):
    """Give all weights of a model random values."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            # Convolutions before a normalization are large, or the libraries' epsilons would differ visibly.
            parameter.data = (1.0 if "conv" in name else 0.15) * torch.randn_like(parameter)
        elif "norm" in name or name.endswith("bias"):
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def stack_experts(path):
    """Stack the experts of a file as those of published models are."""
    weights = dict(mx.load(str(path)))
    stacked = {name: array for name, array in weights.items() if ".experts." not in name}
    for layer in {name.partition(".experts.")[0] for name in weights.keys() - stacked.keys()}:
        gate, up, down = (
            mx.stack([weights[f"{layer}.experts.{i}.{name}_proj.weight"] for i in range(4)])
            for name in ("gate", "up", "down")
        )
        stacked[f"{layer}.experts.gate_up_proj"] = mx.concatenate([gate, up], axis=1)
        stacked[f"{layer}.experts.down_proj"] = down
    mx.save_safetensors(str(path), stacked)


def torch_logits(model):
    with torch.no_grad():
        return model(torch.tensor([PROMPT])).logits[0].numpy()


def mlx_logits(base, adapter=None):
    model, _ = open_module(base)
    if adapter is not None:
        load_any_adapter(model, adapter)
    model.eval()
    return np.array(model(mx.array([PROMPT]))[0].astype(mx.float32))


def adapt(model, part=""):
    """Give every linear layer of a model, or of a part of it, a random LoRA."""
    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and part in name
        and not LEFT_OUT.search(name)
        and not MAMBA.search(name)
    ]
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(model, config)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn_like(parameter)
    return tuned.eval()


def by_speed(types):
    """Mark all types but a representative few as slow."""
    return [t if t in QUICK else pytest.param(t, marks=pytest.mark.slow) for t in types]


@pytest.mark.parametrize("model_type", by_speed(TYPES))
def test_adapters_of_all_linear_layers(tmp_path, monkeypatch, model_type):
    theirs = build(model_type, tmp_path / "base")
    plain = torch_logits(theirs)
    size = np.abs(plain).max()
    np.testing.assert_allclose(mlx_logits(tmp_path / "base"), plain, rtol=0, atol=1e-5 * size)
    with monkeypatch.context() as patch:
        # PEFT takes dense layers of a model with experts for experts. Older versions did not.
        patch.setattr("peft.utils.transformers_weight_conversion._convert_peft_config_moe", lambda *_: None)
        tuned = adapt(theirs)
    expected = torch_logits(tuned)
    assert np.abs(expected - plain).max() > 0.05 * size
    tuned.save_pretrained(tmp_path / "theirs")
    model = open_model(tmp_path / "base")
    updates = read_peft(tmp_path / "theirs", model)
    export_mlx(model, updates, tmp_path / "ours", ChatSettings())
    actual = mlx_logits(tmp_path / "base", tmp_path / "ours")
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5 * size)
    # The way back gives the same file, and PEFT loads it.
    refused = refused_by_name(model, updates)
    kept = {path: update for path, update in updates.by_path.items() if path not in refused}
    export_peft(model, replace(updates, by_path=kept), tmp_path / "back", None)
    written, read = (
        dict(mx.load(str(tmp_path / d / "adapter_model.safetensors"))) for d in ("back", "theirs")
    )
    assert len(written) == 2 * len(kept)
    assert all(mx.array_equal(array, read[name]) for name, array in written.items())
    again = peft.PeftModel.from_pretrained(tuned.unload(), tmp_path / "back")
    assert sum("lora_A" in name for name, _ in again.named_parameters()) == len(kept)
    if not refused:
        np.testing.assert_allclose(torch_logits(again), expected, rtol=0, atol=1e-6 * size)


def refused_by_name(model, updates):
    """Return the modules that PEFT would take for experts, after checking that each is refused."""
    if not any(weight.kind == "experts" for weight in model.weights.values()):
        return []
    names = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
    refused = [path for path in updates.by_path if path.endswith(names)]
    for path in refused:
        with pytest.raises(InputError, match=f"{path}: PEFT takes this name for experts"):
            their_path(path, model)
    return refused


# --- multimodal models -------------------------------------------------------------------------------

TEXT = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "patch_size": 14,
    "image_size": 28,
}
QWEN_VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": 64,
    "deepstack_visual_indexes": [0],
    "num_position_embeddings": 16,
}
PIXTRAL = VISION | {"model_type": "pixtral", "head_dim": 16}
WINDOWS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
GEMMA_VISION = VISION | {"model_type": "siglip_vision_model"}
# Name -> model type, config of the text model, config of the vision tower.
MULTIMODAL = {
    "gemma3": ("gemma3", WINDOWS | {"query_pre_attn_scalar": 16}, GEMMA_VISION),
    "gemma4": ("gemma4", WINDOWS | {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}, VISION),
    "mistral3 with mistral": ("mistral3", {"model_type": "mistral", "sliding_window": None}, PIXTRAL),
    "mistral3 with ministral3": ("mistral3", {"model_type": "ministral3", "sliding_window": None}, PIXTRAL),
    "qwen3_vl": ("qwen3_vl", {"rope_parameters": ROPE | {"mrope_section": [2, 3, 3]}}, QWEN_VISION),
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n != "gemma3")) for n in MULTIMODAL]
)
def test_text_model_of_a_multimodal_model(tmp_path, name):
    from transformers import AutoConfig, AutoModelForImageTextToText

    model_type, text, vision = MULTIMODAL[name]
    config = AutoConfig.for_model(
        model_type, text_config=TEXT | text, vision_config=vision, image_token_id=95, image_token_index=95
    )
    theirs = AutoModelForImageTextToText.from_config(config, dtype=torch.float32, attn_implementation="eager")
    randomize(theirs).save_pretrained(tmp_path / "base")
    plain = torch_logits(theirs)
    size = np.abs(plain).max()
    np.testing.assert_allclose(mlx_logits(tmp_path / "base"), plain, rtol=0, atol=1e-5 * size)
    tuned = adapt(theirs, "language_model")
    expected = torch_logits(tuned)
    assert np.abs(expected - plain).max() > 0.05 * size
    tuned.save_pretrained(tmp_path / "theirs")
    model = open_model(tmp_path / "base")
    updates = read_peft(tmp_path / "theirs", model)
    export_peft(model, updates, tmp_path / "back", None)
    written, read = (
        dict(mx.load(str(tmp_path / d / "adapter_model.safetensors"))) for d in ("back", "theirs")
    )
    assert written.keys() == read.keys()
    # Earlier versions of transformers had other names.
    for inner in ("model.language_model.", "language_model.model."):
        renamed = {name.replace("model.language_model.", inner): array for name, array in read.items()}
        mx.save_safetensors(str(tmp_path / "theirs" / "adapter_model.safetensors"), renamed)
        export_mlx(model, read_peft(tmp_path / "theirs", model), tmp_path / "ours", ChatSettings())
        actual = mlx_logits(tmp_path / "base", tmp_path / "ours")
        np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5 * size)


@pytest.mark.parametrize("inner", ["model.", "model.language_model.", "language_model.model."])
def test_multimodal_names_on_a_text_model(tmp_path, inner):
    build("gemma4_text", tmp_path / "base")
    model = open_model(tmp_path / "base")
    assert our_path(f"{inner}layers.1.mlp.up_proj", model) == "model.layers.1.mlp.up_proj"


def test_adapter_of_a_vision_tower_is_rejected(tmp_path):
    build("gemma4_text", tmp_path / "base")
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2}))
    name = "model.vision_tower.encoder.layers.0.self_attn.q_proj"
    arrays = {f"base_model.model.{name}.lora_{x}.weight": mx.ones((2, 2)) for x in "AB"}
    mx.save_safetensors(str(tmp_path / "peft" / "adapter_model.safetensors"), arrays)
    with pytest.raises(InputError, match=f"{name} is not a linear layer of the model"):
        read_peft(tmp_path / "peft", open_model(tmp_path / "base"))
