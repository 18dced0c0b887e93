"""Configs of tiny recurrent and hybrid models that can be exported to GGUF."""

from typing import Any

from tests.interop.configs_common import EXPERTS, SIZES, UNTIED, YARN

DELTA_NET = SIZES | {
    "num_hidden_layers": 3,
    "full_attention_interval": 2,
    "head_dim": 32,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
}
DELTA_EXPERTS = EXPERTS | {
    "num_experts": 4,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 64,
    "norm_topk_prob": True,
}
LFM2 = SIZES | {
    "num_hidden_layers": 3,
    "norm_eps": 1e-5,
    "conv_bias": False,
    "conv_L_cache": 3,
    "block_dim": 64,
    "block_ff_dim": 128,
    "block_multiple_of": 16,
    "block_ffn_dim_multiplier": 1.2,
    "block_auto_adjust_ff_dim": True,
    "full_attn_idxs": [1],
}
MAMBA = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "state_size": 16,
    "num_hidden_layers": 2,
    "conv_kernel": 4,
    "use_bias": False,
    "use_conv_bias": True,
    "vocab_size": SIZES["vocab_size"],
    "time_step_rank": 4,
    "tie_word_embeddings": True,
}
MAMBA2 = MAMBA | {
    "num_heads": 8,
    "head_dim": 16,
    "n_groups": 1,
    "layer_norm_epsilon": 1e-5,
    "time_step_limit": [0.0, 1e30],
}
HYBRID = SIZES | {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_ssm": 128,
    "mamba_d_state": 16,
    "mamba_d_conv": 4,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_proj_bias": False,
    "mamba_conv_bias": True,
    "num_hidden_layers": 3,
}
NEMOTRON_H = SIZES | {
    "hybrid_override_pattern": "M-*",
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "mamba_proj_bias": False,
    "ssm_state_size": 16,
    "conv_kernel": 4,
    "n_groups": 2,
    "attention_bias": False,
    "mlp_bias": False,
    "use_bias": False,
    "use_conv_bias": True,
    "layer_norm_epsilon": 1e-5,
    "head_dim": 32,
    "tie_word_embeddings": False,
}
NEMOTRON_EXPERTS = {
    "hybrid_override_pattern": "ME*",
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 64,
    "n_group": 1,
    "topk_group": 1,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
}
LATENT = SIZES | {
    "num_hidden_layers": 3,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
    "head_dim": 16,
    "num_experts": 4,
    "moe_intermediate_size": 32,
    "num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
    "tie_word_embeddings": False,
}
# Model type -> config.
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3_5": DELTA_NET,
    "qwen3_5_moe": DELTA_NET | DELTA_EXPERTS,
    "qwen3_next": DELTA_NET
    | DELTA_EXPERTS
    | {"decoder_sparse_step": 1, "mlp_only_layers": [], "partial_rotary_factor": 0.5},
    "lfm2": LFM2,
    "lfm2-vl": {"text_config": LFM2 | {"model_type": "lfm2"}},
    "lfm2_moe": LFM2
    | {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
        "use_expert_bias": True,
        "num_dense_layers": 1,
    },
    "mamba": MAMBA,
    "falcon_mamba": MAMBA | {"mixer_rms_eps": 1e-5},
    "mamba2": MAMBA2,
    "nemotron_h": NEMOTRON_H,
    "jamba": HYBRID
    | {
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        "num_experts": 1,
        "num_experts_per_tok": 1,
    },
    "falcon_h1": HYBRID | {"head_dim": 32},
    "granitemoehybrid": HYBRID
    | {
        "attention_bias": False,
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.5,
        "logits_scaling": 4.0,
        "residual_multiplier": 0.4,
        "layer_types": ["mamba", "attention", "mamba"],
        "position_embedding_type": "nope",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 32,
    },
    "kimi_linear": LATENT
    | {
        "num_experts_per_token": 2,
        "model_max_length": 512,
        "linear_attn_config": {
            "kda_layers": [1, 3],
            "full_attn_layers": [2],
            "num_heads": 4,
            "head_dim": 16,
            "short_conv_kernel_size": 4,
        },
    },
    "bailing_moe_v3": LATENT
    | {
        "num_hidden_layers": 4,
        "layer_group_size": 2,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 4,
        "topk_group": 2,
        "moe_shared_expert_intermediate_size": 32,
        "q_lora_rank": 48,
    },
    "rwkv7": {
        "vocab_size": SIZES["vocab_size"],
        "hidden_size": 64,
        "intermediate_size": 128,
        "norm_eps": 1e-5,
        "head_dim": 32,
        "num_hidden_layers": 2,
        "a_low_rank_dim": 8,
        "v_low_rank_dim": 12,
        "gate_low_rank_dim": 20,
        "decay_low_rank_dim": 16,
    },
}
# Variants of these configs: name -> (model type, changes).
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "nemotron_h with experts": ("nemotron_h", NEMOTRON_EXPERTS),
    "nemotron_h with latent experts": ("nemotron_h", NEMOTRON_EXPERTS | {"moe_latent_size": 32}),
    "nemotron_h with biases": ("nemotron_h", {"attention_bias": True, "mlp_bias": True}),
    "granitemoehybrid dense with RoPE": (
        "granitemoehybrid",
        {"position_embedding_type": "rope", "num_local_experts": 0},
    ),
    "granitemoehybrid without Mamba": (
        "granitemoehybrid",
        {"layer_types": ["attention"] * 3, "position_embedding_type": "rope"},
    ),
    "granitemoehybrid without Mamba and experts": (
        "granitemoehybrid",
        {"layer_types": ["attention"] * 3, "num_local_experts": 0, "position_embedding_type": "rope"},
    ),
    "falcon_h1 with a norm, untied": ("falcon_h1", UNTIED | {"mamba_rms_norm": True}),
    "mamba without a bias, untied": ("mamba", UNTIED | {"use_conv_bias": False}),
    "qwen3_5 as published": (
        "qwen3_5",
        {"text_config": DELTA_NET | {"model_type": "qwen3_5_text"}, "vision_config": {"depth": 2}},
    ),
    "qwen3_5 with experts": ("qwen3_5", DELTA_EXPERTS),
    "kimi_linear tied": ("kimi_linear", {"tie_word_embeddings": True}),
    "rwkv7 tied": ("rwkv7", {"tie_word_embeddings": True}),
    "lfm2_moe without a bias": ("lfm2_moe", {"use_expert_bias": False}),
    "mamba2 without a bias": ("mamba2", {"use_conv_bias": False}),
    "nemotron_h without a bias": ("nemotron_h", {"use_conv_bias": False}),
    "jamba without a bias": ("jamba", {"mamba_conv_bias": False}),
    "falcon_mamba without a bias": ("falcon_mamba", {"use_conv_bias": False}),
    "falcon_h1 without a bias": ("falcon_h1", {"mamba_conv_bias": False}),
    "granitemoehybrid without a bias": ("granitemoehybrid", {"mamba_conv_bias": False}),
    "qwen3_5 with YaRN": (
        "qwen3_5",
        {"rope_parameters": YARN["rope_scaling"] | {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
    ),
}
# Cases that differ little from others.
SECONDARY = {
    *("lfm2-vl", "falcon_mamba", "qwen3_5 with YaRN", "nemotron_h with biases"),
    *("falcon_h1 with a norm, untied", "granitemoehybrid without Mamba", "kimi_linear tied", "rwkv7 tied"),
    *(name for name in VARIANTS if "without a bias" in name),
}
_MLP = tuple(
    f"mlp.{kind}{name}_proj"
    for kind in ("", "switch_mlp.", "shared_experts.")
    for name in ("gate", "up", "down")
)
# Model type -> keys of the layers to adapt, where llama.cpp does not support adapters of all.
ADAPTED_LAYERS: dict[str, tuple[str, ...]] = {
    "kimi_linear": _MLP,
    "bailing_moe_v3": _MLP,
    "rwkv7": (*(f"attn.{name}_proj" for name in "rkvo"), "ffn.key", "ffn.value", "lm_head"),
}
# Layers whose adapter llama.cpp would load without applying it: case, key.
IGNORED_LAYERS = [
    ("kimi_linear", "self_attn.q_proj"),
    ("bailing_moe_v3", "lm_head"),
    ("rwkv7", "attn.w_lora.lora.0"),
    ("nemotron_h with latent experts", "mixer.fc1_latent_proj"),
]
