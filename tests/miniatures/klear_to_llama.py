"""Miniatures of mlx-lm's models, from Klear to llama."""

from dataclasses import replace
from typing import Any

from . import Gated, Miniature

# from_dict ignores keys that a model does not know, so all models share these sizes.
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 128,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}
# One dense layer, then two with experts, under all names that models use for these settings.
EXPERTS: dict[str, Any] = SIZES | {
    "num_hidden_layers": 3,
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
}
LATENT: dict[str, Any] = EXPERTS | {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 8,
    "v_head_dim": 32,
}
GPT: dict[str, Any] = {
    "vocab_size": 96,
    "n_embd": 64,
    "n_inner": 128,
    "n_layer": 2,
    "n_head": 4,
    "n_ctx": 64,
    "n_positions": 64,
    "rotary_dim": 8,
    "layer_norm_epsilon": 1e-5,
}
MAMBA: dict[str, Any] = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_ssm": 64,
    "mamba_d_state": 16,
    "mamba_d_conv": 4,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_proj_bias": False,
    "mamba_conv_bias": True,
}
GRANITE: dict[str, float] = {
    "logits_scaling": 2.0,
    "attention_multiplier": 0.25,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.5,
}
LFM: dict[str, Any] = {
    "norm_eps": 1e-5,
    "conv_bias": False,
    "conv_L_cache": 3,
    "num_hidden_layers": 3,
    "layer_types": ["conv", "full_attention", "conv"],
    "block_dim": 64,
    "block_multiple_of": 32,
    "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": False,
}
DELTA: dict[str, Any] = {"kda_layers": [1, 3], "num_heads": 4, "head_dim": 16, "short_conv_kernel_size": 4}
WINDOWED = ["sliding_attention", "full_attention", "sliding_attention"]
MLP = "model.layers.*.mlp"
ZERO_ROUTER = "The router is zero until a checkpoint is loaded, so all tokens go to the same experts."
GATE_IN_ROUTER = "The router is a module whose only child is called gate_proj."
LAYER_TUPLE = "A decoder layer returns a tuple."
OWN_CONFIG = "ModelArgs writes to the given text_config, so the config must be deep-copied first."


def glu(paths: str = MLP, count: int = 2, **rest: Any) -> Gated:
    """Return a gated MLP with the most common names."""
    return Gated(paths, count, "gate_proj", "up_proj", "down_proj", **rest)


def mixture(
    layers: str, dense: int, sparse: int, experts: str, shared: str = "", **rest: Any
) -> tuple[Gated, ...]:
    """Return the gated MLPs of a model with dense layers and layers of experts, most with a shared expert."""
    rows = [glu(layers, dense, **rest)] if dense else []
    rows.append(glu(f"{layers}.{experts}", sparse, experts=4, **rest))
    if shared:
        rows.append(glu(f"{layers}.{shared}", sparse, **rest))
    return tuple(rows)


DENSE = (glu(),)
SWITCH = mixture(MLP, 1, 2, "switch_mlp", "shared_experts")

_TABLE: dict[str, Miniature] = {
    "Klear": Miniature(
        EXPERTS | {"mlp_only_layers": [0], "decoder_sparse_step": 1},
        mixture(MLP, 1, 2, "experts", "shared_experts"),
        notes="A learned softmax weighs the sum of the experts against the shared expert.",
    ),
    "afm7": Miniature(
        SIZES
        | {
            "hidden_dim": 64,
            "hidden_dim_scale_factor": 1.5,
            "num_layers": 3,
            "num_kv_reuse_layers": 1,
            "num_heads": 4,
            "num_kv_heads": 2,
        },
        (glu(count=2), glu("model.kv_reuse_layers.*.mlp", 1)),
        notes="Model.layers joins two lists of layers. qkv_proj is an nn.Linear that returns a tuple and has its"
        " own to_lora. Keys and values are rounded to 8 bits, so no gradient reaches their part of qkv_proj."
        " MLX cannot quantize it: the to_quantized of qkv_proj has no argument mode.",
    ),
    "afmoe": Miniature(
        EXPERTS | {"layer_types": WINDOWED, "sliding_window": 4},
        mixture(MLP, 1, 2, "experts", "shared_experts"),
        notes="self_attn.gate_proj is a sigmoid gate of the attention, not of an MLP.",
    ),
    "apertus": Miniature(
        SIZES | {"post_norm": False, "qk_norm": True},
        notes="No gate: down_proj(xielu(up_proj(x))), with two trainable scalars in act_fn.",
    ),
    "baichuan_m1": Miniature(
        SIZES | {"sliding_window": 4, "sliding_window_layers": [0], "conv_window": 2},
        DENSE,
        notes="The convolutions over keys and values are zero until a checkpoint is loaded, and attention has no"
        " effect until then. Each layer has a pair of caches.",
    ),
    "bailing_hybrid": Miniature(
        LATENT | {"layer_group_size": 2, "group_norm_size": 2},
        SWITCH,
        notes=GATE_IN_ROUTER,
    ),
    "bailing_moe": Miniature(EXPERTS, SWITCH, notes=GATE_IN_ROUTER),
    "bailing_moe_linear": Miniature(
        EXPERTS | {"layer_group_size": 2, "group_norm_size": 2, "use_bias": True},
        SWITCH,
        notes=f"With use_bias all projections have a bias, including those of experts. {GATE_IN_ROUTER}",
    ),
    "bailing_moe_v3": Miniature(
        LATENT | {"layer_group_size": 2, "moe_shared_expert_intermediate_size": 32, "n_group": 2},
        SWITCH,
        notes=ZERO_ROUTER,
    ),
    "bitnet": Miniature(
        SIZES,
        (
            glu(
                activation="relu2",
                plain="Channels are not independent: a norm over all of them follows the product of gate and up.",
            ),
        ),
        no_forward="BitLinear projections have a Metal kernel only",
        no_backward="BitLinear projections have a Metal kernel only",
        notes="Projections are BitLinear layers with packed ternary weights, which mlx-lm's LoRA does not support.",
    ),
    "cohere": Miniature(SIZES | {"layer_norm_eps": 1e-5}, DENSE, notes="MLP and attention share a norm."),
    "cohere2": Miniature(
        SIZES | {"layer_norm_eps": 1e-5, "sliding_window": 4, "sliding_window_pattern": 2},
        DENSE,
        notes="MLP and attention share a norm.",
    ),
    "dbrx": Miniature(
        {
            "vocab_size": 96,
            "d_model": 64,
            "n_layers": 2,
            "n_heads": 4,
            "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        },
        (Gated("transformer.blocks.*.ffn.experts.*", 8, "w1", "v1", "w2"),),
        notes="Each expert is a dense module that gets only its own tokens, [n, 64] in training and [64] in"
        " evaluation. It is not called without tokens. Routing uses NumPy in training and a list in"
        " evaluation, so the model cannot be compiled.",
    ),
    "deepseek": Miniature(EXPERTS, SWITCH, notes=ZERO_ROUTER),
    "deepseek_v2": Miniature(
        LATENT | {"rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}},
        SWITCH,
        notes=ZERO_ROUTER,
    ),
    "deepseek_v3": Miniature(LATENT, SWITCH, notes=ZERO_ROUTER),
    "deepseek_v32": Miniature(
        LATENT | {"index_head_dim": 32, "index_n_heads": 2, "index_topk": 4},
        SWITCH,
        notes=f"{ZERO_ROUTER} No gradient reaches the indexer, which only selects positions.",
    ),
    "deepseek_v41": Miniature(
        SIZES
        | {
            "num_attention_heads": 8,
            "head_dim": 8,
            "q_lora_rank": 32,
            "qk_rope_head_dim": 4,
            "o_groups": 2,
            "o_lora_rank": 32,
            "moe_intermediate_size": 32,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "swiglu_limit": 0.5,
            "sliding_window": 4,
            "compress_ratios": (0, 2),
            "kv_source_layer_ids": (1,),
            "index_source_layer_ids": (1,),
            "index_n_heads": 2,
            "index_head_dim": 8,
            "index_topk": 2,
            "hc_mult": 2,
        },
        mixture(MLP, 0, 2, "experts.switch_mlp", "shared_experts", activation="swiglu_input_clamped"),
        no_backward="without training forms, the router differentiates with respect to expert indices",
        notes=f"{ZERO_ROUTER} {LAYER_TUPLE} Experts get flattened tokens, [n, 64]. Gate and up are"
        " clipped at swiglu_limit, the gate from above only. Without training forms, only the MLPs of the last layer"
        " can be trained, since no router follows them. If the head size is a multiple of 16, rounding to 4 and 8"
        " bits stops the gradient too.",
    ),
    "dots1": Miniature(
        EXPERTS | {"mlp_bias": True},
        mixture(MLP, 1, 2, "experts", "shared_experts"),
        notes=f"{ZERO_ROUTER} Dense and shared projections have a bias; those of experts do not.",
    ),
    "ernie4_5": Miniature(SIZES | {"use_bias": True}, DENSE, notes="All projections have a bias."),
    "ernie4_5_moe": Miniature(
        EXPERTS
        | {
            "use_bias": True,
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
        },
        SWITCH,
        notes="All projections have a bias, including those of experts.",
    ),
    "exaone": Miniature(
        SIZES | {"num_layers": 2, "layer_norm_epsilon": 1e-5},
        (Gated("transformer.h.*.mlp", 2, "c_fc_0", "c_fc_1", "c_proj"),),
    ),
    "exaone4": Miniature(
        SIZES | {"rope_scaling": None, "sliding_window": 4, "sliding_window_pattern": "LG"},
        DENSE,
    ),
    "exaone_moe": Miniature(
        EXPERTS | {"layer_types": WINDOWED, "sliding_window": 4, "is_moe_layer": [False, True, True]},
        SWITCH,
        notes=ZERO_ROUTER,
    ),
    "falcon_h1": Miniature(
        SIZES | MAMBA | {"mamba_rms_norm": True},
        (glu("model.layers.*.feed_forward"),),
        notes="Loading a checkpoint multiplies the MLP's multipliers into its weights.",
    ),
    "gear": Miniature(
        SIZES
        | {
            "num_hidden_layers": 3,
            "layer_types": ["full_attention", "sliding_attention", "conv_mixer"],
            "sliding_window": 4,
        },
        (glu(count=3, activation="gelu_tanh"),),
        notes="hidden_activation in the config sets the activation: GELU with tanh, GELU or SiLU.",
    ),
    "gemma": Miniature(SIZES, (glu(activation="gelu"),)),
    "gemma2": Miniature(SIZES | {"query_pre_attn_scalar": 16.0}, (glu(activation="gelu_tanh"),)),
    "gemma3": Miniature(
        {
            "vocab_size": 96,
            "text_config": SIZES
            | {
                "model_type": "gemma3_text",
                "query_pre_attn_scalar": 16.0,
                "sliding_window": 4,
                "sliding_window_pattern": 2,
            },
        },
        (glu("language_model.model.layers.*.mlp", activation="gelu_tanh"),),
        notes=OWN_CONFIG,
    ),
    "gemma3_text": Miniature(
        SIZES | {"query_pre_attn_scalar": 16.0, "sliding_window": 4, "sliding_window_pattern": 2},
        (glu(activation="gelu_tanh"),),
    ),
    "gemma3n": Miniature(
        {
            "text_config": SIZES
            | {
                "model_type": "gemma3n_text",
                "num_hidden_layers": 3,
                "intermediate_size": [128, 96, 128],
                "num_kv_shared_layers": 1,
                "vocab_size_per_layer_input": 96,
                "sliding_window": 4,
                "rope_local_base_freq": 10000.0,
                "final_logit_softcapping": 30.0,
                "layer_types": WINDOWED,
                "activation_sparsity_pattern": [0.8, 0.0, 0.0],
                "hidden_size_per_layer_input": 32,
                "altup_num_inputs": 2,
                "altup_coef_clip": 120.0,
                "altup_correct_scale": True,
                "altup_active_idx": 0,
                "laurel_rank": 32,
            },
        },
        (
            glu("model.language_model.layers.0.mlp", 1, activation="gelu_topk"),
            glu("model.language_model.layers.1.mlp", 1, activation="gelu_tanh"),
            glu("model.language_model.layers.2.mlp", 1, activation="gelu_tanh"),
        ),
        notes="With a sparsity above 0, the activation subtracts a threshold computed from the mean and standard"
        " deviation of all channels. Each forward writes back the clipped weights of altup's two coefficient"
        " layers, so these must stay nn.Linear.",
    ),
    "gemma4": Miniature(
        {
            "vocab_size": 96,
            "text_config": SIZES
            | {
                "num_hidden_layers": 3,
                "global_head_dim": 32,
                "num_kv_shared_layers": 1,
                "layer_types": WINDOWED,
                "sliding_window": 4,
                "hidden_size_per_layer_input": 0,
                "tie_word_embeddings": True,
            },
        },
        (glu("language_model.model.layers.*.mlp", 3, activation="gelu_tanh"),),
        notes=f"{OWN_CONFIG} {LAYER_TUPLE} Layers that reuse keys and values have MLPs of twice the width.",
    ),
    "gemma4_text": Miniature(
        EXPERTS
        | {
            "global_head_dim": 32,
            "num_kv_shared_layers": 1,
            "layer_types": WINDOWED,
            "sliding_window": 4,
            "vocab_size_per_layer_input": 96,
            "hidden_size_per_layer_input": 32,
            "enable_moe_block": True,
            "top_k_experts": 2,
            "use_double_wide_mlp": True,
        },
        (
            glu(count=3, activation="gelu_tanh"),
            glu("model.layers.*.experts.switch_glu", 3, experts=4, activation="gelu_tanh"),
        ),
        notes=f"{LAYER_TUPLE} Each layer has a dense MLP and experts. The dense MLPs of layers that reuse"
        " keys and values have twice the width.",
    ),
    "glm": Miniature(SIZES, (Gated(MLP, 2, "gate_up_proj", "gate_up_proj", "down_proj"),)),
    "glm4": Miniature(
        SIZES | {"partial_rotary_factor": 0.5, "attention_bias": True},
        (Gated(MLP, 2, "gate_up_proj", "gate_up_proj", "down_proj"),),
    ),
    "glm4_moe": Miniature(
        EXPERTS | {"rope_scaling": None, "use_qk_norm": True, "partial_rotary_factor": 0.5},
        SWITCH,
        notes=ZERO_ROUTER,
    ),
    "glm4_moe_lite": Miniature(LATENT, SWITCH, notes=ZERO_ROUTER),
    "glm_moe_dsa": Miniature(
        LATENT
        | {
            "index_head_dim": 32,
            "index_n_heads": 2,
            "index_topk": 4,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "moe_layer_freq": 1,
            "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        },
        SWITCH,
        notes=ZERO_ROUTER,
    ),
    "gpt2": Miniature(GPT, notes="No gate: c_proj(gelu_tanh(c_fc(x)))."),
    "gpt_bigcode": Miniature(GPT, notes="No gate: c_proj(gelu(c_fc(x)))."),
    "gpt_neox": Miniature(
        SIZES | {"layer_norm_eps": 1e-5, "rotary_emb_base": 10000, "rotary_pct": 0.5},
        notes="No gate: dense_4h_to_h(gelu_tanh(dense_h_to_4h(x))).",
    ),
    "gpt_oss": Miniature(
        SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4},
        (glu("model.layers.*.mlp.experts", experts=4, activation="swiglu_oai"),),
        notes="All projections have a bias, including those of experts. The gate is clipped at 7 from above, up on"
        " both sides, and 1 is added to up.",
    ),
    "gptj": Miniature(GPT, notes="No gate: fc_out(gelu_tanh(fc_in(x)))."),
    "granite": Miniature(SIZES | GRANITE | {"mlp_bias": True}, DENSE, notes="The projections have a bias."),
    "granitemoe": Miniature(
        EXPERTS | GRANITE | {"num_hidden_layers": 2},
        (glu("model.layers.*.block_sparse_moe.switch_mlp", experts=4),),
    ),
    "granitemoehybrid": Miniature(
        EXPERTS
        | GRANITE
        | MAMBA
        | {"layer_types": ["mamba", "attention", "mamba"], "shared_intermediate_size": 64},
        (
            glu("model.layers.*.block_sparse_moe.switch_mlp", 3, experts=4),
            Gated("model.layers.*.shared_mlp", 3, "input_linear", "input_linear", "output_linear"),
        ),
        notes="Without num_local_experts each layer has a dense mlp with gate_proj, up_proj and down_proj.",
    ),
    "helium": Miniature(SIZES, DENSE),
    "hunyuan": Miniature(
        EXPERTS
        | {
            "num_hidden_layers": 2,
            "moe_topk": 2,
            "num_shared_expert": 1,
            "use_mixed_mlp_moe": True,
            "use_qk_norm": True,
            "use_cla": True,
            "cla_share_factor": 2,
            "rope_scaling": {"alpha": 1.0, "factor": 1.0, "type": "dynamic"},
        },
        mixture(MLP, 0, 2, "switch_mlp", "shared_mlp"),
        notes=f"{LAYER_TUPLE} With num_experts 1 each layer has a dense mlp.",
    ),
    "hunyuan_v1_dense": Miniature(SIZES, DENSE),
    "internlm2": Miniature(SIZES, (Gated("model.layers.*.feed_forward", 2, "w1", "w3", "w2"),)),
    "internlm3": Miniature(SIZES | {"bias": True}, DENSE, notes="The projections of the MLP have a bias."),
    "iquestloopcoder": Miniature(
        SIZES | {"loop_num": 2, "loop_window_size": 4},
        DENSE,
        notes="The model runs its layers twice, so a forward calls each MLP twice, with all tokens each time. Layers"
        " have no __call__: the model calls their parts.",
    ),
    "jamba": Miniature(
        EXPERTS
        | MAMBA
        | {
            "attn_layer_offset": 1,
            "attn_layer_period": 2,
            "expert_layer_offset": 0,
            "expert_layer_period": 2,
        },
        mixture("model.layers.*.feed_forward", 1, 2, "switch_mlp"),
    ),
    "kimi_k25": Miniature(
        {"text_config": LATENT},
        mixture("language_model.model.layers.*.mlp", 1, 2, "switch_mlp", "shared_experts"),
        notes=ZERO_ROUTER,
    ),
    "kimi_k3": Miniature(
        {
            "text_config": LATENT
            | {
                "linear_attn_config": DELTA,
                "activation_situ_beta": 1.5,
                "activation_situ_linear_beta": 2.0,
                "attn_res_block_size": 2,
                "routed_expert_hidden_size": 32,
                "latent_moe_use_norm": True,
            },
        },
        mixture("language_model.model.layers.*.mlp", 1, 2, "switch_mlp", "shared_experts", activation="situ"),
        notes=f"{LAYER_TUPLE} Experts work at a smaller width, between two projections of the block. Up goes"
        " through a tanh. The model reads the weights of self_attention_res_proj and mlp_res_proj directly, so"
        " these must stay nn.Linear.",
    ),
    "kimi_linear": Miniature(LATENT | {"linear_attn_config": DELTA, "model_max_length": 128}, SWITCH),
    "kimi_vl": Miniature(
        {"text_config": LATENT},
        mixture("language_model.model.layers.*.mlp", 1, 2, "switch_mlp", "shared_experts"),
        notes=ZERO_ROUTER,
    ),
    "laguna": Miniature(
        EXPERTS | {"layer_types": WINDOWED, "sliding_window": 4, "shared_expert_intermediate_size": 64},
        mixture(MLP, 1, 2, "switch_mlp", "shared_expert"),
    ),
    "lfm2": Miniature(SIZES | LFM, (Gated("model.layers.*.feed_forward", 3, "w1", "w3", "w2"),)),
    "lfm2-vl": Miniature(
        {"text_config": SIZES | LFM | {"model_type": "lfm2"}},
        (Gated("language_model.model.layers.*.feed_forward", 3, "w1", "w3", "w2"),),
        notes=OWN_CONFIG,
    ),
    "lfm2_moe": Miniature(
        EXPERTS | LFM | {"use_expert_bias": True},
        mixture("model.layers.*.feed_forward", 1, 2, "switch_mlp"),
    ),
    "lille-130m": Miniature(
        GPT | {"block_size": 64, "layer_norm_eps": 1e-5, "n_kv_heads": 2, "rope_theta": 10000.0},
        (glu("transformer.layers.*.feed_forward"),),
        notes="The MLP has its own norm, so gate and up get norm(x). Its width is a multiple of 256, here 256.",
    ),
    "llama": Miniature(
        SIZES
        | {"mlp_bias": True, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
        DENSE,
        notes="With mlp_bias the projections have a bias.",
    ),
}
MINIATURES = {name: replace(row, config={"model_type": name} | row.config) for name, row in _TABLE.items()}
