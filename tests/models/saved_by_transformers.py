"""Tiny random models, built and saved by transformers, and their logits."""

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch")
transformers = pytest.importorskip("transformers")

PROMPT = [5, 9, 3, 20, 31, 44, 7, 8, 60, 12, 13, 90]
# Settings of all types that have them. The window is shorter than the prompt.
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "sliding_window": 8,
    "attention_window_size": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "float32",
    # older names
    "n_embd": 64,
    "n_layer": 4,
    "n_head": 4,
    "n_positions": 128,
    "n_ctx": 128,
    "rotary_dim": 8,
    # experts
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 64,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    # latent attention
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "index_head_dim": 16,
    "index_n_heads": 4,
    "index_topk": 64,
    # recurrent layers
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_d_ssm": 128,
    "mamba_n_groups": 1,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "ssm_state_size": 16,
    "n_groups": 1,
    "state_size": 16,
    "time_step_rank": 4,
    "lru_width": 64,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    # Gemma 4
    "vocab_size_per_layer_input": 96,
    "hidden_size_per_layer_input": 16,
    "num_kv_shared_layers": 0,
    "global_head_dim": 32,
    "num_global_key_value_heads": 1,
    "intermediate_size_mlp": 128,
    "attention_chunk_size": 64,
}
LATENT = {"num_key_value_heads": 4, "head_dim": 8}
YARN = {
    "rope_type": "yarn",
    "type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
LATENT_TYPES = (
    *("deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "longcat_flash"),
    "minicpm3",
)
SPECIAL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(LATENT_TYPES, LATENT),
    "gemma3_text": {"num_hidden_layers": 6},
    "gpt_bigcode": {"n_inner": 256},
    "gpt_neox": {"intermediate_size": 256},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1},
    "mistral4": LATENT
    | {"rope_parameters": YARN | {"llama_4_scaling_beta": 0.1, "max_position_embeddings": 128}},
    "nemotron_h": {"sliding_window": None},
    "recurrent_gemma": {"num_key_value_heads": 1},
}
SPECIAL_TEXT: dict[str, dict[str, Any]] = {
    "gemma3": {"num_hidden_layers": 6},
    "kimi_k25": LATENT,
    "minimax_m3_vl": {"rotary_dim": 16},
    **{
        name: {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}}
        for name in ("qwen2_vl", "qwen2_5_vl")
    },
}
VISION = {
    "depth": 1,
    "embed_dim": 64,
    "num_heads": 4,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}


def tiny_config(model_type: str, **changes: Any) -> Any:
    """Return a small config of a model type; `changes` go to the language model's part."""
    cls = transformers.CONFIG_MAPPING[model_type]
    base = cls()
    settings = _sizes(base) | SPECIAL.get(model_type, {})
    if (text := getattr(base, "text_config", None)) is None:
        return cls(**settings | changes)
    settings["text_config"] = {
        "model_type": text.model_type,
        **_sizes(text),
        **SPECIAL_TEXT.get(model_type, {}),
        **changes,
    }
    if (vision := getattr(base, "vision_config", None)) is not None:
        known = vision.to_dict()
        settings["vision_config"] = {key: value for key, value in VISION.items() if key in known}
    return cls(**settings)


def _sizes(config: Any) -> dict[str, Any]:
    known = config.to_dict().keys() | inspect.signature(type(config).__init__).parameters.keys()
    return {key: value for key, value in SIZES.items() if key in known}


def save(directory: Path, config: Any) -> np.ndarray:
    """Save a random model with a config; return its float32 logits of PROMPT: [tokens, vocabulary]."""
    torch.manual_seed(0)
    if hasattr(config, "text_config"):
        model = transformers.AutoModelForImageTextToText.from_config(config)
    else:
        model = transformers.AutoModelForCausalLM.from_config(config)
    model = model.float().eval()
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.08)
        else:
            parameter.data += 0.1 * torch.randn_like(parameter)
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT]), use_cache=False).logits[0].numpy()
    model.save_pretrained(directory)
    return logits
