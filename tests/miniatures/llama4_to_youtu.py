"""Miniatures of mlx-lm's models, from llama4 to youtu_llm."""

from . import Gated, Miniature

GLU = ("gate_proj", "up_proj", "down_proj")

# Settings of nearly all models; from_dict ignores keys that a model does not know.
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 96,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
ROUTED = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 96,
    "norm_topk_prob": True,
}
GROUPED = ROUTED | {
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "routed_scaling_factor": 1.0,
    "first_k_dense_replace": 1,
}
LATENT = {
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 2,
}
SLIDING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
LLAMA4_SCALE = {
    "rope_type": "default",
    "rope_theta": 10000.0,
    "llama_4_scaling_beta": 0.1,
    "original_max_position_embeddings": 128,
}
LONGCAT = {
    "ffn_hidden_size": 128,
    "expert_ffn_hidden_size": 96,
    "moe_topk": 2,
    "n_routed_experts": 4,
    "zero_expert_num": 2,
    "zero_expert_type": "identity",
    "num_layers": 2,
    "routed_scaling_factor": 1.0,
    "mla_scale_q_lora": True,
    "mla_scale_kv_lora": True,
    "attention_method": "MLA",
    "attention_bias": False,
}
LONGCAT_GATED = (
    Gated("model.layers.*.mlps.*", 4, *GLU),
    Gated("model.layers.*.mlp.switch_mlp", 2, *GLU, experts=4),
)
LONGCAT_NOTE = (
    "Each layer has a list of two dense MLPs and one module of experts. Tokens for the identity experts go to "
    "expert 0 with weight 0, so switch_mlp counts them."
)


def _small(model_type: str, **more) -> dict:
    return SMALL | {"model_type": model_type} | more


def _tower(model_type: str, text: dict) -> dict:
    return {"model_type": model_type, "text_config": text}


def _dense(config: dict, paths: str = "model.layers.*.mlp", count: int = 2, notes: str = "") -> Miniature:
    return Miniature(config, (Gated(paths, count, *GLU),), notes=notes)


def _experts(config: dict, paths: str = "model.layers.*.mlp.switch_mlp", notes: str = "") -> Miniature:
    return Miniature(config, (Gated(paths, 2, *GLU, experts=4),), notes=notes)


def _sparse(root: str, shared: str) -> tuple[Gated, ...]:
    """Return the gated MLPs of a dense first layer and a second one with routed and shared experts."""
    rows = [Gated(f"{root}.0.mlp", 1, *GLU), Gated(f"{root}.1.mlp.switch_mlp", 1, *GLU, experts=4)]
    return tuple(rows + ([Gated(f"{root}.1.mlp.{shared}", 1, *GLU)] if shared else []))


MIXED_MOE = ROUTED | {
    "mlp_only_layers": [0],
    "decoder_sparse_step": 1,
    "shared_expert_intermediate_size": 32,
}
SPARK_TEXT = SMALL | {
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_hidden_size": 32,
    "moe_intermediate_size": 96,
    "post_norm_eps": 1e-8,
    "rope_parameters": {"rope_theta": 10000.0},
    "layer_rope_theta": [10000.0, 0],
    "final_logit_softcapping": 20.0,
    "output_multiplier": 0.2,
}
QWEN3_5 = _small(
    "qwen3_5",
    **DELTA,
    rope_parameters={"type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
)
HADAMARD = QWEN3_5 | {"hidden_size": 128, "intermediate_size": 512, "model_type": "qwen3_5_text"}

MINIATURES: dict[str, Miniature] = {
    "llama4": Miniature(
        _tower(
            "llama4",
            SMALL
            | ROUTED
            | {
                "model_type": "llama4_text",
                "num_hidden_layers": 4,
                "num_experts_per_tok": 1,
                "attention_bias": False,
                "attention_chunk_size": 4,
                "interleave_moe_layer_step": 4,
                "intermediate_size": 96,
                "intermediate_size_mlp": 128,
                "rope_scaling": None,
                "use_qk_norm": True,
            },
        ),
        (
            Gated("language_model.model.layers.0.feed_forward", 1, *GLU),
            Gated("language_model.model.layers.1.feed_forward", 1, *GLU),
            Gated("language_model.model.layers.2.feed_forward", 1, *GLU),
            Gated("language_model.model.layers.3.feed_forward.experts", 1, *GLU, experts=4),
            Gated("language_model.model.layers.3.feed_forward.shared_expert", 1, *GLU),
        ),
        notes="At least four layers, since the forward reads cache[3], and one expert per token. The router's score "
        "scales the experts' input, not their output.",
    ),
    "llama4_text": _dense(
        _small("llama4_text", intermediate_size_mlp=96, no_rope_layers=[1, 0], use_qk_norm=True),
        "model.layers.*.feed_forward",
        notes="The MLP's width is intermediate_size_mlp; intermediate_size is unused.",
    ),
    "longcat_flash": Miniature(
        _small("longcat_flash", **LATENT, **LONGCAT), LONGCAT_GATED, notes=LONGCAT_NOTE
    ),
    "longcat_flash_ngram": Miniature(
        _small(
            "longcat_flash_ngram",
            **LATENT,
            **LONGCAT,
            ngram_vocab_size_ratio=2,
            emb_neighbor_num=3,
            emb_split_num=2,
        ),
        LONGCAT_GATED,
        notes=LONGCAT_NOTE,
    ),
    "mamba": Miniature(
        _small(
            "mamba",
            state_size=8,
            conv_kernel=4,
            use_bias=False,
            use_conv_bias=True,
            time_step_rank=4,
        ),
        notes="No MLP: SiLU gates the output of a state-space scan, not of a linear projection.",
    ),
    "mamba2": Miniature(
        _small(
            "mamba2",
            num_heads=8,
            state_size=16,
            conv_kernel=4,
            n_groups=2,
            use_bias=False,
            use_conv_bias=True,
            time_step_limit=[0.0, 100.0],
            time_step_rank=4,
            layer_norm_epsilon=1e-5,
        ),
        notes="No MLP: SiLU gates the output of a state-space scan, not of a linear projection.",
    ),
    "mellum": _experts(
        _small(
            "mellum",
            **ROUTED,
            **SLIDING,
            rope_parameters={
                "full_attention": {"rope_theta": 10000.0},
                "sliding_attention": {"rope_theta": 1000.0},
            },
        )
    ),
    "mimo": _dense(_small("mimo")),
    "mimo_v2_flash": Miniature(
        _small(
            "mimo_v2_flash",
            **GROUPED,
            hybrid_layer_pattern=[0, 1],
            moe_layer_freq=[0, 1],
            add_swa_attention_sink_bias=True,
            add_full_attention_sink_bias=False,
            sliding_window_size=4,
            layernorm_epsilon=1e-5,
            swa_rope_theta=1000.0,
            swa_num_attention_heads=4,
            swa_num_key_value_heads=2,
            v_head_dim=16,
            swa_head_dim=16,
            swa_v_head_dim=16,
            partial_rotary_factor=0.5,
        ),
        _sparse("model.layers", "shared_experts"),
        notes="The router's weight is zero until a checkpoint is loaded, so all experts tie for every token.",
    ),
    "minicpm": _dense(_small("minicpm", dim_model_base=32, scale_depth=1.4, scale_emb=2.0)),
    "minicpm3": _dense(
        _small(
            "minicpm3",
            **LATENT,
            dim_model_base=32,
            scale_depth=1.4,
            scale_emb=2.0,
            rope_scaling={"original_max_position_embeddings": 128},
        ),
        notes="The arguments are (inputs, mask, cache), so a cache must be passed by name.",
    ),
    "minimax": _experts(
        _small("minimax", **ROUTED, shared_intermediate_size=32, rotary_dim=8),
        "model.layers.*.block_sparse_moe.switch_mlp",
        notes="The arguments are (inputs, mask, cache), so a cache must be passed by name.",
    ),
    "minimax_m3_vl": Miniature(
        _tower(
            "minimax_m3_vl",
            SMALL
            | ROUTED
            | {
                "intermediate_size": 96,
                "dense_intermediate_size": 128,
                "shared_intermediate_size": 32,
                "moe_layer_freq": [0, 1],
                "sparse_attention_config": {
                    "sparse_num_index_heads": 2,
                    "sparse_index_dim": 16,
                    "sparse_block_size": 2,
                    "sparse_topk_blocks": 2,
                    "sparse_attention_freq": [0, 1],
                },
            },
        ),
        (
            Gated("language_model.model.layers.0.mlp", 1, *GLU, activation="swiglu_oai"),
            Gated(
                "language_model.model.layers.1.block_sparse_moe.switch_mlp",
                1,
                *GLU,
                activation="swiglu_oai",
                experts=4,
            ),
            Gated(
                "language_model.model.layers.1.block_sparse_moe.shared_experts",
                1,
                *GLU,
                activation="swiglu_oai",
            ),
        ),
        notes="The product is z sigmoid(alpha z), with z clipped from above, times (up clipped on both sides) + 1. "
        "Dense MLPs also have it as a module `activation`, called as (up, gate). alpha and limit come from the "
        "config. Experts get flattened tokens.",
    ),
    "ministral3": _dense(_small("ministral3", **SLIDING, rope_parameters=LLAMA4_SCALE)),
    "mistral3": _dense(
        _tower("mistral3", SMALL | {"model_type": "ministral3", "rope_parameters": LLAMA4_SCALE}),
        "language_model.model.layers.*.mlp",
        notes="text_config's model_type chooses ministral3, mistral4 or llama. ModelArgs may add keys to the given "
        "text_config.",
    ),
    "mistral4": Miniature(
        _small("mistral4", **GROUPED, **LATENT, rope_parameters=LLAMA4_SCALE),
        _sparse("model.layers", "shared_experts"),
    ),
    "mixtral": _experts(_small("mixtral", **ROUTED), "model.layers.*.block_sparse_moe.switch_mlp"),
    "muse_glimmer": _dense(
        _small("muse_glimmer", **SLIDING),
        notes="self_attn.gate_proj is a gate of the attention's output, not of an MLP.",
    ),
    "muse_spark": Miniature(
        _tower("muse_spark", SPARK_TEXT | SLIDING),
        (Gated("model.language_model.layers.*.mlp.experts", 2, *GLU, experts=4),),
        no_forward="attention, router and norms have Metal kernels only",
        no_backward="its Metal kernels have no gradient",
        notes="Experts work at width moe_hidden_size, between pre_expert_proj and post_expert_proj. Their SiLU is "
        "computed in float32 and the layers in bfloat16. The experts' module has a norm, post_expert_norm, "
        "which the enclosing block applies after the down projection.",
    ),
    "nanbeige": _dense(
        _small("nanbeige", num_loops=2),
        notes="The model runs its layers num_loops times, so a forward calls each MLP twice.",
    ),
    "nanochat": Miniature(_small("nanochat"), notes="Not gated: squared ReLU between c_fc and c_proj."),
    "nemotron": Miniature(
        _small("nemotron", hidden_act="relu2", norm_eps=1e-5),
        notes="Not gated: squared ReLU between up_proj and down_proj.",
    ),
    "nemotron-nas": Miniature(
        _small(
            "nemotron-nas",
            hidden_size=32,
            num_hidden_layers=4,
            block_configs=[
                {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 12.0}},
                {"attention": {"replace_with_linear": True}, "ffn": {"no_op": True}},
                {"attention": {"n_heads_in_group": 4}, "ffn": {"replace_with_linear": True}},
                {"attention": {"no_op": True}, "ffn": {"ffn_mult": 24.0}},
            ],
        ),
        (Gated("model.layers.0.mlp", 1, *GLU), Gated("model.layers.3.mlp", 1, *GLU)),
        notes="Layers differ: the MLP has width 256 or 512 (always multiples of 256), is a single linear layer, or "
        "is None. hidden_act may also be relu, gelu or gelu_new (tanh).",
    ),
    "nemotron_h": Miniature(
        _small(
            "nemotron_h",
            **GROUPED,
            attention_bias=False,
            mamba_num_heads=8,
            mamba_head_dim=16,
            mamba_proj_bias=False,
            ssm_state_size=16,
            conv_kernel=4,
            mlp_bias=False,
            layer_norm_epsilon=1e-5,
            use_bias=False,
            use_conv_bias=True,
            hybrid_override_pattern=["M", "*", "-", "E"],
            moe_shared_expert_intermediate_size=32,
            moe_latent_size=32,
        )
        | {"n_groups": 2},
        notes="Not gated: squared ReLU in the dense MLP (up_proj, down_proj), the shared expert and the experts "
        "(SwitchMLP: fc1, fc2).",
    ),
    "olmo": Miniature(
        {
            "model_type": "olmo",
            "d_model": 64,
            "n_layers": 2,
            "mlp_hidden_size": 256,
            "n_heads": 4,
            "vocab_size": 96,
            "embedding_size": 96,
        },
        (Gated("model.transformer.blocks.*", 2, "ff_proj", "ff_proj", "ff_out", gate_first=False),),
        no_forward="it adds the mask to its scores, but mlx-lm's mask is the string 'causal'",
        notes="Importing the module exits the process (SystemExit) unless a package hf_olmo can be imported. One "
        "token works, and so does a cache whose make_mask returns an additive mask. The MLP is part of the "
        "block, not a separate module. model.transformer.ff_out is the output head.",
    ),
    "olmo2": _dense(_small("olmo2")),
    "olmo3": _dense(_small("olmo3", **SLIDING)),
    "olmo_hybrid": _dense(
        _small(
            "olmo_hybrid",
            **DELTA,
            layer_types=["linear_attention", "full_attention"],
            linear_allow_neg_eigval=True,
            attention_bias=False,
        )
    ),
    "olmoe": _experts(
        _small("olmoe", **ROUTED),
        notes="Experts get flattened tokens. With mlp_bias they have a bias.",
    ),
    "openelm": Miniature(
        {
            "model_type": "openelm",
            "head_dim": 16,
            "num_transformer_layers": 2,
            "model_dim": 64,
            "vocab_size": 96,
            "ffn_dim_divisor": 32,
            "num_query_heads": [4, 8],
            "num_kv_heads": [2, 4],
            "ffn_multipliers": [1.0, 2.0],
        },
        (Gated("transformer.layers.*.ffn", 2, "proj_1", "proj_1", "proj_2"),),
        notes="Layers differ in width (64 and 128) and number of heads.",
    ),
    "phi": Miniature(_small("phi"), notes="Not gated: GELU (tanh) between fc1 and fc2."),
    "phi3": Miniature(
        _small("phi3"), (Gated("model.layers.*.mlp", 2, "gate_up_proj", "gate_up_proj", "down_proj"),)
    ),
    "phi3small": Miniature(
        _small(
            "phi3small",
            vocab_size=100352,
            hidden_size=32,
            dense_attention_every_n_layers=2,
            ff_intermediate_size=64,
            gegelu_limit=20.0,
            layer_norm_epsilon=1e-5,
        ),
        (
            Gated(
                "model.layers.*.mlp",
                2,
                "up_proj",
                "up_proj",
                "down_proj",
                activation="gegelu",
                plain="Channels of gate and up alternate in one projection, and both are clipped.",
            ),
        ),
        notes="gegelu is swiglu_oai (alpha 1.702, 1 added to up) with even outputs of up_proj as the gate and odd "
        "ones as up. vocab_size must be at least 100352, since the forward writes -inf to fixed ids up to "
        "100351, out of bounds for a smaller vocabulary.",
    ),
    "phimoe": _experts(_small("phimoe", **ROUTED), "model.layers.*.block_sparse_moe.switch_mlp"),
    "phixtral": Miniature(
        {
            "model_type": "phixtral",
            "num_vocab": 96,
            "model_dim": 64,
            "num_heads": 4,
            "num_layers": 2,
            "rotary_dim": 8,
        },
        notes="Not gated: GELU between the experts' fc1 and fc2. The arguments are (x, mask, cache).",
    ),
    "pixtral": _dense(
        _tower("pixtral", SMALL | {"model_type": "llama"}),
        "language_model.model.layers.*.mlp",
        notes="The language model is llama. ModelArgs sets keys in the given text_config.",
    ),
    "plamo": _dense(_small("plamo", n_shared_head=2), "model.layers.layers.*.mlp"),
    "plamo2": Miniature(
        _small("plamo2", hidden_size_per_head=16, mamba_d_state=16, mamba_num_heads=4),
        (Gated("model.layers.layers.*.mlp", 2, "gate_up_proj", "gate_up_proj", "down_proj"),),
        notes="Layer 0 is a state-space layer, layer 1 attention; both have an MLP.",
    ),
    "plamo3": Miniature(
        _small("plamo3", sliding_window=4, sliding_window_pattern=2),
        (Gated("model.layers.layers.*.mlp", 2, "gate_up_proj", "gate_up_proj", "down_proj"),),
    ),
    "prism_hadamard_qwen35": Miniature(
        {
            "model_type": "prism_hadamard_qwen35",
            "text_config": HADAMARD,
            "tensor_namespace": "mlx-vlm-qwen3_5",
            "quantization": {"bits": 2, "group_size": 128, "mode": "affine"},
            "modules": [
                {"path": f"model.layers.0.mlp.{name}", "embedding": False, "dtype": "float16", "block": block}
                for name, block in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 512))
            ],
        },
        (
            Gated(
                "language_model.model.layers.0.mlp",
                1,
                *GLU,
                plain="LoRA does not support its projections, packed 2-bit layers that rotate their input.",
            ),
            Gated(
                "language_model.model.layers.1.mlp",
                1,
                *GLU,
                plain="Layer 0 has packed projections under the same keys, so mlx-lm could not load the adapter.",
            ),
        ),
        notes="The miniature packs only the MLP of layer 0; published models pack nearly everything. Packed weights "
        "are zero until a checkpoint is loaded. A packed layer is a HadamardQuantizedLinear, which mlx-lm's "
        "LoRA does not support. Packed layers are frozen; after unfreeze(), gradients fail as in any quantized "
        "model.",
    ),
    "qwen": Miniature(
        _small("qwen", kv_channels=16, intermediate_size=256),
        (Gated("transformer.h.*.mlp", 2, "w2", "w1", "c_proj"),),
        notes="intermediate_size is twice the width of the MLP.",
    ),
    "qwen2": _dense(_small("qwen2")),
    "qwen2_moe": Miniature(
        _small("qwen2_moe", **MIXED_MOE),
        (
            Gated("model.layers.*.mlp.switch_mlp", 2, *GLU, experts=4),
            Gated("model.layers.*.mlp.shared_expert", 2, *GLU),
        ),
        notes="mlp.shared_expert_gate, with one output, scales the shared expert's output. It is a router.",
    ),
    "qwen2_vl": _dense(
        _tower("qwen2_vl", SMALL | {"model_type": "qwen2"}), "language_model.model.layers.*.mlp"
    ),
    "qwen3": _dense(_small("qwen3")),
    "qwen3_5": _dense(
        _tower("qwen3_5", QWEN3_5),
        "language_model.model.layers.*.mlp",
        notes="Layer 0 is linear attention, layer 1 full attention. With num_experts above 0 every layer has "
        "experts, as in qwen3_5_moe. The given rope_parameters may be changed in place.",
    ),
    "qwen3_5_moe": Miniature(
        _tower("qwen3_5_moe", QWEN3_5 | MIXED_MOE),
        (
            Gated("language_model.model.layers.*.mlp.switch_mlp", 2, *GLU, experts=4),
            Gated("language_model.model.layers.*.mlp.shared_expert", 2, *GLU),
        ),
    ),
    "qwen3_moe": Miniature(_small("qwen3_moe", **MIXED_MOE), _sparse("model.layers", "")),
    "qwen3_next": Miniature(
        _small("qwen3_next", **MIXED_MOE, **DELTA, partial_rotary_factor=0.5),
        _sparse("model.layers", "shared_expert"),
        notes="Layer 0 is linear attention, layer 1 full attention.",
    ),
    "qwen3_vl": _dense(
        _tower("qwen3_vl", SMALL | {"model_type": "qwen3"}), "language_model.model.layers.*.mlp"
    ),
    "qwen3_vl_moe": Miniature(
        _tower("qwen3_vl_moe", SMALL | MIXED_MOE | {"model_type": "qwen3_moe"}),
        _sparse("language_model.model.layers", ""),
    ),
    "recurrent_gemma": Miniature(
        _small(
            "recurrent_gemma",
            attention_bias=False,
            conv1d_width=4,
            intermediate_size=256,
            logits_soft_cap=30.0,
            attention_window_size=4,
            block_types=["recurrent", "attention"],
        ),
        (Gated("model.layers.*.mlp_block", 2, *GLU, activation="gelu_tanh"),),
        no_backward="its Model does not call the constructor of nn.Module, so nn.value_and_grad fails",
        no_freeze="its Model does not call the constructor of nn.Module, so freeze fails",
        notes="Freezing and gradients work after model._no_grad = set() and model._training = True. "
        "intermediate_size is twice the width of the MLP, whose projections have biases. The recurrent block "
        "(linear_y, linear_x, linear_out) is gated by GELU too, but it has a recurrence, so it is not an MLP.",
    ),
    "rwkv7": Miniature(
        _small(
            "rwkv7",
            norm_eps=1e-5,
            a_low_rank_dim=8,
            v_low_rank_dim=8,
            gate_low_rank_dim=8,
            decay_low_rank_dim=8,
        ),
        notes="Not gated: squared ReLU between ffn.key and ffn.value. Low-rank layers of the model itself "
        "are called LoRA. attn.k_k is zero until a checkpoint is loaded, and the gradient of the norm of zeros "
        "is NaN.",
    ),
    "seed_oss": _dense(_small("seed_oss")),
    "smollm3": _dense(_small("smollm3", no_rope_layers=[1, 0])),
    "solar_open": Miniature(
        _small("solar_open", **GROUPED, partial_rotary_factor=0.5),
        _sparse("model.layers", "shared_experts"),
        notes="The Model is that of glm4_moe. The router's weight is zero until a checkpoint is loaded.",
    ),
    "spark2_5": Miniature(
        _small(
            "spark2_5",
            **SLIDING,
            rope_parameters={
                "full_attention": {"rope_theta": 10000.0},
                "sliding_attention": {"rope_theta": 1000.0},
            },
        ),
        (Gated("model.layers.*.mlp", 2, *GLU, activation="gelu"),),
    ),
    "stablelm": _dense(
        _small(
            "stablelm", use_qkv_bias=True, partial_rotary_factor=0.5, layer_norm_eps=1e-5, qk_layernorm=True
        )
    ),
    "starcoder2": Miniature(_small("starcoder2"), notes="Not gated: GELU between c_fc and c_proj."),
    "step3p5": Miniature(
        _small(
            "step3p5",
            **SLIDING,
            num_attention_groups=2,
            num_hidden_layers=3,
            moe_num_experts=4,
            moe_top_k=2,
            moe_intermediate_size=96,
            share_expert_dim=32,
            moe_layers_enum="1,2",
            swiglu_limits=[0.0, 0.0, 7.0],
            swiglu_limits_shared=[0.0, 0.0, 5.0],
        )
        | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
        (
            Gated("model.layers.0.mlp", 1, *GLU),
            Gated("model.layers.1.mlp.switch_mlp", 1, *GLU, experts=4),
            Gated("model.layers.1.mlp.share_expert", 1, *GLU),
            Gated("model.layers.2.mlp.switch_mlp", 1, *GLU, activation="swiglu_output_clamped", experts=4),
            Gated("model.layers.2.mlp.share_expert", 1, *GLU, activation="swiglu_output_clamped"),
        ),
        notes="swiglu_output_clamped is SiLU clipped from above, times up clipped on both sides. Its limits are per "
        "layer, in one list for experts and one for shared experts and dense MLPs; 0 means no limit. The router "
        "is mlp.gate.gate.",
    ),
    "talkie": Miniature(
        _small("talkie"),
        (Gated("model.blocks.*.mlp", 2, "mlp_gate", "mlp_linear", "mlp_resid"),),
        notes="lm_head is an array, zero until a checkpoint is loaded; until then logits and all gradients are 0. "
        "The enclosing block scales the MLP's output.",
    ),
    "telechat3": _dense(_small("telechat3")),
    "youtu_llm": _dense(_small("youtu_llm", **LATENT)),
}
