"""Configs of tiny transformers with dense MLPs that can be exported to GGUF."""

from typing import Any

from tests.interop.configs_common import (
    BIASES,
    DYNAMIC,
    GEMMA,
    HEAD,
    LINEAR,
    LLAMA3,
    LONGROPE,
    SIZES,
    UNTIED,
    VOCABULARY,
    WINDOW,
    YARN,
)

FULL, SLIDING = "full_attention", "sliding_attention"
GEMMA3 = (
    GEMMA
    | WINDOW
    | {"model_type": "gemma3_text", "rope_local_base_freq": 1000.0, "sliding_window_pattern": 6}
)
MROPE = {"rope_scaling": {"type": "mrope", "mrope_section": [3, 3, 2]}}
GEMMA4_ROPE = {
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
    SLIDING: {"rope_type": "default", "rope_theta": 1000.0},
}
GEMMA4: dict[str, Any] = (
    SIZES
    | WINDOW
    | {
        "head_dim": 16,
        "global_head_dim": 32,
        "layer_types": [SLIDING, FULL, SLIDING, FULL, SLIDING, FULL],
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 32,
        "vocab_size_per_layer_input": VOCABULARY,
        "rope_parameters": GEMMA4_ROPE,
        "final_logit_softcapping": 7.0,
        "use_double_wide_mlp": True,
    }
)
GEMMA4_EXPERTS = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}
# As in the largest models: no embeddings per layer, keys that serve as values, experts.
GEMMA4_LARGE = GEMMA4_EXPERTS | {
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 0,
    "attention_k_eq_v": True,
    "num_global_key_value_heads": 1,
    "use_double_wide_mlp": False,
}

# llama.cpp computes with the sizes of the published models.
GEMMA3N: dict[str, Any] = (
    SIZES
    | WINDOW
    | {
        "model_type": "gemma3n_text",
        "head_dim": 16,
        "intermediate_size": [1024] * 30,
        "num_hidden_layers": 30,
        "num_kv_shared_layers": 10,
        "layer_types": [SLIDING if (i + 1) % 5 else FULL for i in range(30)],
        "activation_sparsity_pattern": [0.95] * 10 + [0.0] * 20,
        "rope_local_base_freq": 1000.0,
        "final_logit_softcapping": 30.0,
        "hidden_size_per_layer_input": 256,
        "vocab_size_per_layer_input": VOCABULARY,
        "altup_num_inputs": 4,
        "altup_coef_clip": 0.2,
        "altup_correct_scale": True,
        "altup_active_idx": 0,
        "laurel_rank": 64,
    }
)

TELECHAT3_YARN = {"type": "telechat3-yarn", "mscale": 1.0, "mscale_all_dim": 0.5}
MINISTRAL3_ROPE = {
    "type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 8,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.5,
}

LONGROPE_INSIDE = {
    "rope_scaling": LONGROPE["rope_scaling"] | {"original_max_position_embeddings": 128},
}

GPT: dict[str, Any] = {
    "n_embd": 64,
    "n_inner": 128,
    "n_layer": 6,
    "n_head": 4,
    "n_ctx": 512,
    "n_positions": 512,
    "layer_norm_epsilon": 1e-5,
    "vocab_size": VOCABULARY,
}
NO_BIASES = {"attention_bias": False, "mlp_bias": False}
OPENELM: dict[str, Any] = {
    "model_dim": 64,
    "head_dim": 16,
    "num_transformer_layers": 4,
    "num_query_heads": [2, 4, 4, 6],
    "num_kv_heads": [1, 2, 4, 2],
    "ffn_multipliers": [1.0, 2.0, 3.0, 4.0],
    "ffn_dim_divisor": 32,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
}
MINICPM3: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "scale_depth": 1.4,
    "scale_emb": 12,
    "dim_model_base": 256,
    "rope_scaling": LONGROPE["rope_scaling"] | {"original_max_position_embeddings": 128},
}
SPARK_ROPE = {
    FULL: {"rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    SLIDING: {"rope_theta": 1000.0, "partial_rotary_factor": 1.0},
}
DECI_ATTENTION = {"n_heads_in_group": 2}
DECI_BLOCKS = [
    {"attention": DECI_ATTENTION, "ffn": {"ffn_mult": 2.0}},
    {"attention": {"no_op": True}, "ffn": {"ffn_mult": 6.5}},
    {"attention": {"replace_with_linear": True}, "ffn": {"ffn_mult": 2.0}},
    {"attention": {"no_op": True}, "ffn": {"no_op": True}},
    {"attention": {"n_heads_in_group": 1}, "ffn": {"ffn_mult": 2.0}},
    {"attention": DECI_ATTENTION, "ffn": {"ffn_mult": 2.0}},
]
LILLE: dict[str, Any] = {
    "n_embd": 64,
    "n_head": 4,
    "n_kv_heads": 2,
    "n_layer": 4,
    "block_size": 512,
    "layer_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "vocab_size": VOCABULARY,
}
STABLELM = {"use_qkv_bias": True, "partial_rotary_factor": 0.25, "layer_norm_eps": 1e-5}

# Model type -> config.
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "mistral": SIZES | UNTIED | HEAD,
    "qwen2": SIZES,
    "qwen3": SIZES | {"head_dim": 32},
    "gemma": GEMMA,
    "gemma2": GEMMA | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 7.0, "sliding_window": 64},
    "gemma3_text": GEMMA3,
    "gemma3n": {"text_config": GEMMA3N},
    "gemma4_text": GEMMA4,
    "gemma3": {"vocab_size": VOCABULARY, "text_config": GEMMA3},
    "gemma4": {"vocab_size": VOCABULARY, "text_config": GEMMA4},
    "gemma4_unified": {"vocab_size": VOCABULARY, "text_config": GEMMA4},
    "llava": {"text_config": SIZES | {"model_type": "llama"}},
    "mistral3": {"text_config": SIZES | UNTIED | {"model_type": "mistral"}},
    "pixtral": {"text_config": SIZES | UNTIED | HEAD | {"model_type": "mistral"}},
    "qwen2_vl": SIZES | MROPE,
    "qwen2_5_vl": {"text_config": SIZES | MROPE | {"model_type": "qwen2_5_vl_text"}},
    "qwen3_vl": {"text_config": SIZES | HEAD | MROPE | {"model_type": "qwen3_vl_text"}},
    "phi3": SIZES | UNTIED,
    "smollm3": SIZES,
    "olmo2": SIZES | UNTIED,
    "glm4": SIZES | HEAD | {"attention_bias": True, "partial_rotary_factor": 0.5},
    "internlm2": SIZES | UNTIED | {"bias": False},
    "internlm3": SIZES | UNTIED,
    "xverse": SIZES | UNTIED,
    "iquestcoder": SIZES | UNTIED,
    "telechat3": SIZES | UNTIED,
    "helium": SIZES | {"head_dim": 32} | UNTIED | {"attention_bias": False, "mlp_bias": False},
    "ministral3": SIZES | HEAD | {"rope_parameters": MINISTRAL3_ROPE},
    "qwen": SIZES | UNTIED | {"kv_channels": 16, "layer_norm_epsilon": 1e-5, "num_key_value_heads": 4},
    "mimo": SIZES | UNTIED,
    "olmo3": SIZES | UNTIED | WINDOW,
    "glm": SIZES | HEAD | {"attention_bias": True},
    "minicpm": SIZES | UNTIED | {"dim_model_base": 32, "scale_depth": 1.4, "scale_emb": 12},
    "exaone": SIZES | {"num_layers": 6, "layer_norm_epsilon": 1e-5},
    "exaone4": SIZES | HEAD | {"rope_scaling": None, "sliding_window": None, "sliding_window_pattern": None},
    "hunyuan_v1_dense": SIZES | {"rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0}},
    "seed_oss": SIZES | {"head_dim": 32, "attention_bias": True},
    "ernie4_5": SIZES | HEAD | {"use_bias": False},
    "plamo": SIZES | UNTIED | {"n_shared_head": 2},
    "granite": SIZES
    | {
        "attention_bias": False,
        "mlp_bias": False,
        "attention_multiplier": 0.3,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "logits_scaling": 2.0,
    },
    "cohere2": SIZES | HEAD | WINDOW | {"logit_scale": 0.25, "sliding_window_pattern": 4},
    "starcoder2": SIZES | {"norm_epsilon": 1e-5},
    "cohere": SIZES | {"logit_scale": 0.25},
    "gpt2": GPT,
    "gpt_bigcode": GPT,
    "gpt_neox": SIZES | {"rotary_emb_base": 10000, "rotary_pct": 0.25, "layer_norm_eps": 1e-5},
    "nemotron": SIZES | UNTIED | {"norm_eps": 1e-5, "hidden_act": "relu2"},
    "apertus": SIZES | UNTIED | {"post_norm": False, "qk_norm": True} | NO_BIASES,
    "openelm": OPENELM,
    "minicpm3": SIZES | UNTIED | MINICPM3,
    "plamo3": SIZES | HEAD | {"window_size": 8, "sliding_window_pattern": 3, "rope_local_theta": 1000.0},
    "nanbeige": SIZES | UNTIED | {"num_loops": 2},
    "spark2_5": SIZES | HEAD | WINDOW | {"num_hidden_layers": 4, "rope_parameters": SPARK_ROPE},
    "nemotron-nas": SIZES | UNTIED | {"block_configs": DECI_BLOCKS},
    "lille-130m": LILLE,
    "phi": SIZES | UNTIED | {"num_key_value_heads": 4, "layer_norm_eps": 1e-5},
    "stablelm": SIZES | UNTIED | STABLELM,
}
# Variants of these configs: name -> (model type, changes).
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama untied": ("llama", UNTIED),
    "llama head_dim": ("llama", {"head_dim": 32}),
    "llama biases": ("llama", BIASES),
    "llama pairs": ("llama", {"rope_traditional": True}),
    "llama llama3": ("llama", LLAMA3),
    "llama linear": ("llama", LINEAR),
    "llama yarn": ("llama", YARN),
    "llama dynamic": ("llama", DYNAMIC),
    "qwen2 yarn untied": ("qwen2", YARN | UNTIED),
    "qwen3 yarn": ("qwen3", YARN),
    "gemma3 untied": ("gemma3_text", UNTIED),
    "gemma3 linear": ("gemma3_text", LINEAR),
    "gemma3 pattern": ("gemma3_text", {"sliding_window_pattern": 3}),
    "gemma4 large": ("gemma4_text", GEMMA4_LARGE),
    "gemma4 k_eq_v": ("gemma4_text", {"attention_k_eq_v": True}),
    "gemma4 untied": ("gemma4_text", UNTIED | {"final_logit_softcapping": None}),
    "gemma4 default": ("gemma4_text", {"rope_parameters": {FULL: {"rope_theta": 100.0}, SLIDING: {}}}),
    "telechat3 biases": ("telechat3", BIASES | YARN | {"head_dim": 32}),
    "helium tied biases": ("helium", BIASES | {"tie_word_embeddings": True}),
    "ministral3 default": ("ministral3", {"rope_parameters": MINISTRAL3_ROPE | {"type": "default"}}),
    "ministral3 mscale": ("ministral3", {"rope_parameters": MINISTRAL3_ROPE | {"mscale": 0.7}}),
    "telechat3 mscale": ("telechat3", {"rope_scaling": YARN["rope_scaling"] | TELECHAT3_YARN}),
    "ministral3 in mistral3": (
        "mistral3",
        {"text_config": SIZES | HEAD | {"model_type": "ministral3", "rope_parameters": MINISTRAL3_ROPE}},
    ),
    "ministral3 untied": ("ministral3", UNTIED | {"head_dim": 32}),
    "olmo3 yarn": ("olmo3", YARN),
    "olmo3 tied": ("olmo3", {"tie_word_embeddings": True}),
    "olmo3 layers": ("olmo3", {"layer_types": [FULL, SLIDING, SLIDING, FULL, SLIDING, FULL]}),
    "glm no biases": ("glm", {"attention_bias": False} | UNTIED),
    "minicpm longrope": ("minicpm", LONGROPE_INSIDE),
    "exaone llama3": ("exaone", LLAMA3 | UNTIED),
    "exaone4 llama3": ("exaone4", LLAMA3 | UNTIED),
    "exaone4 64": (
        "exaone4",
        LLAMA3 | {"num_hidden_layers": 64, "sliding_window": 8, "sliding_window_pattern": "LLLG"},
    ),
    "hunyuan untied": ("hunyuan_v1_dense", UNTIED | {"head_dim": 32, "rope_scaling": None}),
    "seed_oss yarn": ("seed_oss", YARN | UNTIED | {"attention_bias": False}),
    "ernie4_5 untied": ("ernie4_5", UNTIED | {"head_dim": 32}),
    "mimo tied yarn": ("mimo", YARN | {"tie_word_embeddings": True}),
    "phi3 tied": ("phi3", {"tie_word_embeddings": True}),
    "phi3 partial": ("phi3", {"partial_rotary_factor": 0.5}),
    "phi3 longrope": ("phi3", LONGROPE),
    "phi3 linear": ("phi3", {"rope_scaling": LINEAR["rope_scaling"] | {"long_factor": []}}),
    "smollm3 yarn untied": ("smollm3", YARN | UNTIED),
    "olmo2 tied": ("olmo2", {"tie_word_embeddings": True}),
    "olmo2 yarn": ("olmo2", YARN),
    "glm4 no biases": ("glm4", {"attention_bias": False}),
    "internlm2 tied": ("internlm2", {"tie_word_embeddings": True}),
    "internlm2 pairs": ("internlm2", {"rope_traditional": True}),
    "internlm2 linear": ("internlm2", LINEAR),
    "internlm3 biases": ("internlm3", {"bias": True, "qkv_bias": True}),
    "internlm3 dynamic": ("internlm3", DYNAMIC),
    "granite llama3 biases": ("granite", LLAMA3 | BIASES),
    "granite untied": ("granite", UNTIED),
    "cohere2 pattern": ("cohere2", {"sliding_window_pattern": 3}),
    "cohere 64": ("cohere", {"num_hidden_layers": 64, "use_qk_norm": True}),
    "gpt_bigcode many": ("gpt_bigcode", {"multi_query": False}),
    "gpt_neox serial": ("gpt_neox", {"use_parallel_residual": False}),
    "nemotron linear": ("nemotron", LINEAR | BIASES),
    "stablelm parallel": ("stablelm", {"use_parallel_residual": True, "use_qkv_bias": False}),
    "stablelm norms": ("stablelm", {"qk_layernorm": True}),
    "starcoder2 untied": ("starcoder2", UNTIED),
}
