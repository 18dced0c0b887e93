"""Configs of tiny transformers with experts that can be exported to GGUF."""

from typing import Any

from tests.interop.configs_common import (
    BIASES,
    EXPERTS,
    LINEAR,
    LLAMA3,
    SIZES,
    UNTIED,
    VOCABULARY,
    WINDOW,
    YARN,
)

FEW_LAYERS = {"num_hidden_layers": 3}
SMALL_EXPERTS = EXPERTS | {"num_experts": 4, "moe_intermediate_size": 32}
# Under DeepSeek's names, with one dense layer first.
DEEPSEEK = (
    EXPERTS
    | FEW_LAYERS
    | {
        "n_routed_experts": 8,
        "moe_intermediate_size": 32,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.5,
        "n_group": 1,
        "topk_group": 1,
    }
)
EQUAL_HEADS = {"num_key_value_heads": 4}
PATTERN_OF_4 = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
}
GROUPS = {"n_group": 4, "topk_group": 2}
QWEN3_MOE = (
    SIZES
    | SMALL_EXPERTS
    | {
        "head_dim": 32,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
)
GLM4_MOE = (
    SIZES
    | DEEPSEEK
    | {
        "head_dim": 16,
        "use_qk_norm": True,
        "attention_bias": True,
        "partial_rotary_factor": 0.5,
        "rope_scaling": None,
    }
)
MINIMAX = (
    SIZES
    | EXPERTS
    | FEW_LAYERS
    | {
        "head_dim": 16,
        "num_local_experts": 4,
        "shared_intermediate_size": 0,
        "rotary_dim": 8,
    }
)

BAILING_1 = {
    "use_qk_norm": False,
    "score_function": "softmax",
    "moe_router_enable_expert_bias": False,
    "partial_rotary_factor": 1.0,
    "first_k_dense_replace": 0,
}
MINIMAX_M3 = (
    SIZES
    | EXPERTS
    | FEW_LAYERS
    | {
        "model_type": "minimax_m3",
        "head_dim": 16,
        "rotary_dim": 12,
        "intermediate_size": 32,
        "dense_intermediate_size": 128,
        "shared_intermediate_size": 64,
        "num_local_experts": 4,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "layer_types": ["full_attention", "sparse", "sparse"],
        "index_n_heads": 2,
        "index_head_dim": 64,
        "index_block_size": 4,
        "index_topk_blocks": 6,  # of 6: llama.cpp chooses only with flash attention, which is less exact
    }
)
# DeepSeek's latent attention.
LATENT = (
    SIZES
    | DEEPSEEK
    | {
        "num_key_value_heads": 4,
        "q_lora_rank": 32,
        "kv_lora_rank": 40,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 24,
        "rms_norm_eps": 1e-6,
    }
)
MSCALE = {"mscale": 0.7, "mscale_all_dim": 0.7}
YARN_WITH_MSCALE_OF_1 = {"rope_scaling": YARN["rope_scaling"] | {"mscale": 1.0, "mscale_all_dim": 1.0}}
SCALED_YARN = {"rope_scaling": YARN["rope_scaling"] | MSCALE}
INDEXER = {"index_head_dim": 64, "index_n_heads": 16, "index_topk": 8}

# Model type -> config.
CONFIGS: dict[str, dict[str, Any]] = {
    "mixtral": SIZES | EXPERTS | {"num_local_experts": 4},
    "qwen3_moe": QWEN3_MOE,
    "qwen2_moe": SIZES | SMALL_EXPERTS | FEW_LAYERS | {"shared_expert_intermediate_size": 96},
    "gpt_oss": SIZES
    | EXPERTS
    | WINDOW
    | YARN
    | {
        "head_dim": 16,
        "num_hidden_layers": 4,
        "num_local_experts": 4,
        "intermediate_size": 64,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "glm4_moe": GLM4_MOE,
    "solar_open": GLM4_MOE | {"attention_bias": False, "use_qk_norm": False},
    "olmoe": SIZES | EXPERTS | FEW_LAYERS | EQUAL_HEADS | {"num_experts": 4},
    "granitemoe": SIZES
    | EXPERTS
    | FEW_LAYERS
    | {
        "num_local_experts": 4,
        "attention_bias": False,
        "attention_multiplier": 0.3,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "logits_scaling": 2.0,
    },
    "ernie4_5_moe": SIZES
    | FEW_LAYERS
    | {
        "use_bias": False,
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_layer_start_index": 1,
        "moe_intermediate_size": 32,
        "moe_num_shared_experts": 2,
    },
    "minimax": MINIMAX,
    "minimax_m2": MINIMAX | {"tie_word_embeddings": True},
    "dots1": SIZES | DEEPSEEK | EQUAL_HEADS,
    "deepseek": SIZES | DEEPSEEK | {"norm_topk_prob": False, "routed_scaling_factor": 1.0},
    "bailing_moe": SIZES
    | DEEPSEEK
    | {
        "num_experts": 8,
        "num_shared_experts": 2,
        "use_qk_norm": True,
        "score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "partial_rotary_factor": 0.5,
    },
    "dbrx": {
        "d_model": 64,
        "n_layers": 3,
        "n_heads": 4,
        "vocab_size": VOCABULARY,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 0.5, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "llama4": {
        "text_config": SIZES
        | FEW_LAYERS
        | {
            "model_type": "llama4_text",
            "head_dim": 16,
            "num_hidden_layers": 4,
            "attention_bias": False,
            "attention_chunk_size": 8192,
            "interleave_moe_layer_step": 2,
            "intermediate_size": 64,
            "intermediate_size_mlp": 128,
            "num_experts_per_tok": 1,
            "num_local_experts": 4,
            "rms_norm_eps": 1e-6,
            "rope_scaling": None,
            "use_qk_norm": True,
        }
    },
    "qwen3_vl_moe": {"text_config": QWEN3_MOE | {"model_type": "qwen3_vl_moe_text"}},
    "afmoe": SIZES
    | SMALL_EXPERTS
    | WINDOW
    | PATTERN_OF_4
    | {
        "head_dim": 16,
        "num_shared_experts": 2,
        "num_dense_layers": 1,
    },
    "exaone_moe": SIZES
    | SMALL_EXPERTS
    | WINDOW
    | PATTERN_OF_4
    | {
        "head_dim": 16,
        "num_shared_experts": 2,
        "is_moe_layer": [False, True, True, True],
    },
    "laguna": SIZES
    | SMALL_EXPERTS
    | WINDOW
    | {
        "head_dim": 16,
        "num_hidden_layers": 4,
        "shared_expert_intermediate_size": 96,
        "moe_routed_scaling_factor": 1.5,
        "layer_types": ["full_attention"] + ["sliding_attention"] * 3,
        "num_attention_heads_per_layer": [4, 8, 8, 8],
        "rope_parameters": {
            "full_attention": YARN["rope_scaling"] | {"rope_theta": 5000.0, "partial_rotary_factor": 0.5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 1.0},
        },
    },
    "mellum": SIZES
    | SMALL_EXPERTS
    | WINDOW
    | PATTERN_OF_4
    | {
        "head_dim": 32,
        "norm_topk_prob": True,
        "rope_parameters": {
            "full_attention": YARN["rope_scaling"] | {"rope_theta": 5000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
        },
    },
    "mimo_v2_flash": SIZES
    | DEEPSEEK
    | {
        "n_shared_experts": None,
        "routed_scaling_factor": None,
        "hybrid_layer_pattern": [0, 1, 1],
        "moe_layer_freq": [0, 1, 1],
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "sliding_window_size": 8,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "layernorm_epsilon": 1e-5,
        "swa_rope_theta": 1000.0,
        "swa_num_attention_heads": 8,
        "swa_num_key_value_heads": 4,
        "head_dim": 24,
        "v_head_dim": 16,
        "swa_head_dim": 24,
        "swa_v_head_dim": 16,
        "partial_rotary_factor": 0.334,
        "attention_value_scale": 0.7,
    },
    "minimax_m3_vl": {"text_config": MINIMAX_M3},
    "muse_glimmer": SIZES
    | UNTIED
    | WINDOW
    | PATTERN_OF_4
    | {"head_dim": 16, "rms_norm_eps": 1e-5, "final_logit_softcapping": 5.0},
    "deepseek_v2": LATENT | SCALED_YARN | {"norm_topk_prob": False, "topk_method": "greedy"},
    "deepseek_v3": LATENT,
    "kimi_k2": LATENT,
    "joyai_llm_flash": LATENT,
    "kimi_k25": {"text_config": LATENT | {"model_type": "kimi_k2"}},
    "kimi_vl": {"text_config": LATENT | {"model_type": "deepseek_v3"}},
    "glm4_moe_lite": LATENT,
    "deepseek_v32": LATENT | INDEXER,
    "glm_moe_dsa": LATENT
    | INDEXER
    | {
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "moe_layer_freq": 1,
        "attention_bias": False,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    },
    "mistral4": LATENT
    | {
        "rope_parameters": YARN["rope_scaling"]
        | {
            "rope_theta": 10000.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.3,
            "original_max_position_embeddings": 8,
        }
    },
    "youtu_llm": LATENT
    | {"tie_word_embeddings": True, "norm_topk_prob": False, "routed_scaling_factor": 1.0},
    "step3p5": SIZES
    | EXPERTS
    | WINDOW
    | {
        "head_dim": 16,
        "num_hidden_layers": 4,
        "num_attention_groups": 2,
        "layer_types": ["full_attention"] + ["sliding_attention"] * 3,
        "rope_theta": [5000.0, 1000.0, 1000.0, 1000.0],
        "partial_rotary_factors": [0.5, 1.0, 1.0, 1.0],
        "attention_other_setting": {"num_attention_heads": 8, "num_attention_groups": 4},
        "moe_num_experts": 4,
        "moe_top_k": 2,
        "moe_intermediate_size": 32,
        "share_expert_dim": 96,
        "moe_layers_enum": "1,2,3",
        "moe_router_scaling_factor": 1.5,
        "swiglu_limits": [0, 0, 0.05, 0],
        "swiglu_limits_shared": [0.2, 0, 0, 0.1],
    },
}
# Variants of these configs: name -> (model type, changes).
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt_oss linear": ("gpt_oss", LINEAR),
    "glm4_moe groups, weights not normalized": ("glm4_moe", GROUPS | {"norm_topk_prob": False}),
    "glm4_moe one expert, no norms, tied": (
        "glm4_moe",
        {"num_experts_per_tok": 1, "use_qk_norm": False, "tie_word_embeddings": True},
    ),
    "olmoe tied yarn": ("olmoe", {"tie_word_embeddings": True} | YARN),
    "granitemoe untied yarn biases": ("granitemoe", YARN | BIASES | UNTIED),
    "ernie4_5_moe untied": ("ernie4_5_moe", UNTIED),
    "ernie4_5_moe no shared experts": ("ernie4_5_moe", {"moe_num_shared_experts": 0}),
    "minimax tied": ("minimax", {"tie_word_embeddings": True}),
    "minimax_m3_vl tied, norms without offset": (
        "minimax_m3_vl",
        {"text_config": MINIMAX_M3 | {"tie_word_embeddings": True, "use_gemma_norm": False}},
    ),
    "dots1 groups yarn": ("dots1", GROUPS | YARN),
    "bailing_moe without norms": ("bailing_moe", BAILING_1),
    "dots1 tied": ("dots1", {"tie_word_embeddings": True}),
    "ernie4_5_moe one size": ("ernie4_5_moe", {"moe_intermediate_size": 0}),
    "deepseek linear": ("deepseek", LINEAR),
    "bailing_moe groups softmax yarn tied": (
        "bailing_moe",
        GROUPS
        | YARN
        | {
            "score_function": "softmax",
            "tie_word_embeddings": True,
            "norm_topk_prob": False,
            "moe_shared_expert_intermediate_size": 96,
            "rotary_dim": 12,
        },
    ),
    "afmoe yarn tied, weights not normalized": (
        "afmoe",
        YARN | {"route_norm": False, "tie_word_embeddings": True},
    ),
    "deepseek_v2 queries without rank, no dense layer": (
        "deepseek_v2",
        {"q_lora_rank": None, "first_k_dense_replace": 0, "num_hidden_layers": 27},
    ),
    "deepseek_v3 groups yarn": ("deepseek_v3", GROUPS | SCALED_YARN | {"norm_topk_prob": False}),
    "deepseek_v3 yarn": ("deepseek_v3", YARN_WITH_MSCALE_OF_1),
    "deepseek_v3 queries without rank": ("deepseek_v3", {"q_lora_rank": None, "num_hidden_layers": 26}),
    "deepseek_v3 eps": ("deepseek_v3", {"rms_norm_eps": 1e-5}),
    "deepseek_v32 all keys yarn": ("deepseek_v32", {"index_topk": 64} | YARN_WITH_MSCALE_OF_1),
    "glm_moe_dsa long": ("glm_moe_dsa", {"max_position_embeddings": 1048576}),
    "mistral4 one expert, tied": (
        "mistral4",
        GROUPS | {"num_experts_per_tok": 1, "tie_word_embeddings": True},
    ),
    "muse_glimmer tied": ("muse_glimmer", {"tie_word_embeddings": True}),
    "exaone_moe groups yarn": ("exaone_moe", YARN | {"n_group": 2, "topk_group": 1}),
    "mellum tied": ("mellum", {"tie_word_embeddings": True}),
    "mellum no window": ("mellum", {"layer_types": ["full_attention"] * 4}),
    "laguna full attention only": (
        "laguna",
        {"layer_types": ["full_attention"] * 4, "num_attention_heads_per_layer": None},
    ),
    "mimo_v2_flash all sinks": (
        "mimo_v2_flash",
        {"add_full_attention_sink_bias": True, "attention_value_scale": None},
    ),
    "step3p5 llama3": (
        "step3p5",
        LLAMA3 | {"yarn_only_types": ["full_attention"], "norm_expert_weight": False},
    ),
}
# Cases that differ little from others, or have many layers.
SECONDARY = {
    "deepseek_v2 queries without rank, no dense layer",
    "deepseek_v3 queries without rank",
    "glm_moe_dsa long",
    "joyai_llm_flash",
    "kimi_k2",
    "kimi_vl",
    "minimax_m2",
    "qwen3_vl_moe",
    "solar_open",
}
_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_EXPERTS = tuple(
    f"mlp.{kind}.{name}_proj" for kind in ("switch_mlp", "shared_experts") for name in ("gate", "up", "down")
)
_LATENT = ("self_attn.o_proj", *_MLP, *_EXPERTS)
# Model type -> keys of the layers to adapt, where llama.cpp does not support adapters of all.
ADAPTED_LAYERS: dict[str, tuple[str, ...]] = {
    name: _LATENT
    for name in (
        *("deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "joyai_llm_flash"),
        *("kimi_k2", "kimi_k25", "kimi_vl", "mistral4"),
    )
} | {
    "youtu_llm": ("self_attn.o_proj", *_MLP),
    "dbrx": ("norm_attn_norm.attn.Wqkv", "norm_attn_norm.attn.out_proj"),
}
# Model type and field of its row without which llama.cpp aborts the process.
ABORTS = {("mistral4", "sizes")}
# Layers whose adapter llama.cpp would load without applying it.
IGNORED_LAYERS = [
    ("deepseek_v3", "self_attn.q_b_proj"),
    ("deepseek_v3", "lm_head"),
    ("deepseek_v32", "self_attn.indexer.wk"),
    ("mistral4", "self_attn.kv_a_proj_with_mqa"),
]
_FULL = {"layer_types": ["full_attention"] * 4}
_PLAIN_YARN = {"rope_scaling": YARN["rope_scaling"]}
_LAGUNA_ROPE = CONFIGS["laguna"]["rope_parameters"]
# Model type, changes of its config, and what the refusal must mention.
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob is false"),
    ("qwen3_moe", {"mlp_only_layers": [0]}, "mlp_only_layers"),
    ("qwen3_vl_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step"),
    ("gpt_oss", {"layer_types": ["full_attention", "sliding_attention"] * 2}, "layer_types"),
    ("minimax", {"use_qk_norm": False}, "use_qk_norm is false"),
    ("olmoe", {"norm_topk_prob": True}, "norm_topk_prob is true"),
    ("olmoe", {"num_key_value_heads": 2}, "num_key_value_heads differs"),
    ("olmoe", {"attention_bias": True, "mlp_bias": True}, "no place for tensor.*bias"),
    ("dots1", {"num_key_value_heads": 2}, "num_key_value_heads differs"),
    ("ernie4_5_moe", {"moe_gate_act": "sigmoid"}, "moe_gate_act is sigmoid"),
    ("ernie4_5_moe", {"moe_layer_interval": 2}, "moe_layer_interval is 2"),
    ("ernie4_5_moe", {"moe_layer_end_index": 1}, "moe_layer_end_index is 1"),
    ("ernie4_5_moe", {"moe_layer_start_index": [1, 1]}, "moe_layer_start_index is a list"),
    ("ernie4_5_moe", {"use_bias": True}, "no place for tensor.*bias"),
    ("bailing_moe", {"num_shared_experts": 0}, "no shared experts"),
    ("bailing_moe", BAILING_1 | {"score_function": "sigmoid"}, "score_function"),
    ("bailing_moe", BAILING_1 | {"first_k_dense_replace": 1}, "first_k_dense_replace is 1"),
    ("bailing_moe", BAILING_1 | {"rotary_dim": 8}, "rotary_dim"),
    ("bailing_moe", BAILING_1 | {"moe_shared_expert_intermediate_size": 96}, "moe_shared_expert"),
    ("deepseek", {"n_shared_experts": None}, "no shared experts"),
    ("deepseek", {"moe_layer_freq": 2}, "moe_layer_freq is 2"),
    ("llama4", {"attention_chunk_size": 16}, "attention_chunk_size is 16"),
    ("llama4", {"floor_scale": 4}, "floor_scale"),
    ("llama4", {"use_qk_norm": False}, "use_qk_norm is False"),
    ("afmoe", {"n_group": 2, "topk_group": 1}, "n_group is 2"),
    ("afmoe", {"mup_enabled": False}, "mup_enabled is false"),
    ("afmoe", {"score_func": "softmax"}, "score_func is softmax"),
    ("afmoe", {"layer_types": ["full_attention"] + ["sliding_attention"] * 3}, "layer_types"),
    ("exaone_moe", _FULL, "no sliding_attention"),
    ("exaone_moe", {"is_moe_layer": [True, False, True, True]}, "is_moe_layer"),
    ("laguna", {"gating": False}, "gating is false"),
    ("laguna", {"moe_router_logit_softcapping": 3.0}, "moe_router_logit_softcapping"),
    ("laguna", {"moe_router_score_func": "sqrtsoftplus"}, "moe_router_score_func is sqrtsoftplus"),
    ("laguna", {"mlp_layer_types": ["sparse", "dense"] * 2}, "mlp_layer_types"),
    ("laguna", {"layer_types": ["full_attention", "sliding_attention"] * 2}, "layer_types"),
    (
        "laguna",
        {"rope_parameters": _LAGUNA_ROPE | {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
        "type linear in sliding attention",
    ),
    ("mellum", {"norm_topk_prob": False}, "norm_topk_prob is false"),
    (
        "mellum",
        {
            "rope_parameters": CONFIGS["mellum"]["rope_parameters"]
            | {"sliding_attention": {"rope_theta": 100.0}}
        },
        "rope_theta differs",
    ),
    ("mimo_v2_flash", {"routed_scaling_factor": 2.0}, "routed_scaling_factor is 2"),
    ("mimo_v2_flash", {"norm_topk_prob": False}, "norm_topk_prob is false"),
    ("mimo_v2_flash", {"num_experts_per_tok": 1}, "num_experts_per_tok is 1"),
    ("mimo_v2_flash", {"n_shared_experts": 1}, "n_shared_experts"),
    ("mimo_v2_flash", {"swa_head_dim": 16}, "swa_head_dim"),
    ("step3p5", {"layer_types": None}, "layer_types"),
    ("step3p5", {"rope_theta": [1e4, 1e3, 1e3, 1e2]}, "rope_theta differs"),
    ("step3p5", {"partial_rotary_factors": [0.5, 1.0, 1.0, 0.5]}, "partial_rotary_factors differs"),
    ("step3p5", LINEAR, "rope_scaling of type linear"),
    ("step3p5", LLAMA3, "yarn_only_types"),
    ("minimax_m3_vl", {"mlp_layer_types": ["sparse", "dense", "sparse"]}, "mlp_layer_types"),
    ("minimax_m3_vl", {"layer_types": ["full_attention"] * 3}, "layer_types"),
    ("minimax_m3_vl", {"index_n_heads": 4}, "index_n_heads is 4"),
    ("minimax_m3_vl", {"shared_intermediate_size": 48}, "shared_intermediate_size"),
    ("minimax_m3_vl", {"swiglu_limit": 5.0}, "swiglu_limit"),
    ("minimax_m3_vl", {"use_qk_norm": False}, "use_qk_norm is false"),
    ("muse_glimmer", {"layer_rope_theta": [1e4] * 4}, "layer_rope_theta"),
    ("muse_glimmer", _FULL, "no sliding_attention"),
    ("muse_glimmer", {"post_norm_eps": 1e-5}, "post_norm_eps is 1e-05"),
    ("deepseek_v2", {"topk_method": "group_limited_greedy"} | GROUPS, "group_limited_greedy"),
    ("deepseek_v2", {"q_lora_rank": None}, "q_lora_rank is None with 3 layers"),
    ("deepseek_v2", {"attention_bias": True}, "no place for tensor.*bias"),
    ("deepseek_v3", _PLAIN_YARN, "mscale 1 and mscale_all_dim 0"),
    ("deepseek_v3", {"rope_scaling": LINEAR["rope_scaling"] | MSCALE}, "type linear"),
    ("deepseek_v3", {"n_shared_experts": None}, "no shared experts"),
    ("kimi_k25", {"moe_layer_freq": 2}, "moe_layer_freq is 2"),
    ("kimi_vl", {"num_hidden_layers": 27}, "q_lora_rank is 32 with 27 layers"),
    ("deepseek_v32", {"index_topk": 64} | SCALED_YARN, "mscale 0.7"),
    ("deepseek_v32", {"indexer_rope_interleave": True}, "indexer_rope_interleave is True"),
    ("glm_moe_dsa", {"indexer_rope_interleave": False}, "indexer_rope_interleave is False"),
    ("mistral4", {"rope_interleave": False}, "rope_interleave is false"),
    (
        "mistral4",
        {"rope_parameters": CONFIGS["mistral4"]["rope_parameters"] | MSCALE},
        "mscale 0.7",
    ),
    ("youtu_llm", {"rope_traditional": False}, "rope_traditional is false"),
]
