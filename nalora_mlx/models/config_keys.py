"""Keys of config.json that mlx-lm's classes do not read: which are irrelevant, and which change results when.

Each name is a regular expression that matches a whole key. A key that is in no table is reported by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nalora_mlx.models.model_class import ModelClass

# By reason, keys that do not change what a language model computes.
IRRELEVANT = {
    "mlx-lm reads it when it loads a model": """
        model_type architectures model_file quantization quantization_config quantize_activations text_config
    """,
    "describes the file, or the program that wrote it": r"""
        _.* name_or_path model_name transformers_version transformers\.js_config (torch_)?dtype
        auto_map (tokenizer|processor|feature_extractor)_class license language tags library_name
        unsloth_(fixed|version) finetuning_task task_specific_params problem_type prefix id2label label2id
        num_labels tf_legacy_loss torchscript use_bfloat16 (use_)?return_dict fp16 bf16 fp32 compression_config
        is_llama_config interpolate_factor full_attn_mod initial_context_length layer_switch
        order_of_interleaved_layers use_parallel_embedding
    """,
    "chooses how a thing is computed, not what": r"""
        attn_implementation(_\w+)? (use_)?flash_attn(_\w+)? use_flash_attention(_2)?
        use_cache_(kernel|quantization) use_(mamba_kernels|mambapy|associative_scan|sdpa) fused_\w+
        use_fused_\w+ (\w+_)?in_fp32 mamba_ssm_cache_dtype ssm_dtype reorder_and_upcast_attn (mamba_)?chunk_size
        chunk_size_feed_forward block_size pretraining_tp ep_size moe_shared_expert_overlap seq_length
        max_seq_len model_max_length mamba_ssm_dtype
    """,
    "belongs to generation": r"""
        (\w+_)?(bos|eos|pad|sep|unk|eod|eot|decoder_start|image|video|audio|im|boa|eoa|boi|eoi|mask|start|end)_token(_id|_ids)?
        use_cache cache_implementation num_logits_to_keep (max|min)_length do_sample early_stopping num_beams
        num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty
        exponential_decay_length_penalty (encoder_)?no_repeat_ngram_size bad_words_ids num_return_sequences
        output_(scores|attentions|hidden_states) return_dict_in_generate (begin_)?suppress_tokens
        remove_invalid_values generation_config chat_template
    """,
    "belongs to training": r"""
        (\w+_)?dropout(_\w+)? (\w+_)?pdrop (embedding_)?initializer_(range|factor|cutoff_factor)
        init_(std|method|range) (final_)?w_init_variance_scale
        (mamba_)?time_step_(min|max|floor|scale|init_scheme|rank) A_init_range linear_(dt|a_log)_(min|max)
        linear_dt_init_floor rescale_prenorm_residual output_router_logits router_aux_loss_(coef|weight)
        (router_)?z_loss_coef(ficient)? aux_loss_alpha seq_aux moe_loss_\w+ (router|input)_jitter_noise
        gradient_checkpointing pruned_heads tie_encoder_decoder mtp_\w+ (num_)?nextn_predict_(layers|\w+)
        num_mtp_\w+ moe_capacity bias_update_speed use_mtp loop_loss_weights (\w+_)?init_scale
        (\w+_)?use_xavier_init init_method
    """,
    "belongs to what turns images and sound into embeddings": r"""
        (vision|audio|visual|speech|projector|mm|vit|vlm|img|image|video)_\w+ multimodal_\w+ \w+_projector_\w+
        (\w+_)?token_index (spatial|temporal)_merge_size merged_hidden_size out_hidden_size downsample_(factor|ratio)
        deepstack_\w+ patch_\w+ tokens_per_second encoder_patch_size max_(image|num)_(tokens|tiles|patches) min_tiles
        max_tiles use_(thumbnail|tiling|image_\w+) tile_size do_image_splitting select_layer dynamic_image_size
        force_image_size ps_version vision audio
    """,
    "belongs to another head than the language model's": r"summary_\w+ classifier_\w+ use_cls_head",
    # A tensor too many, one that is missing or one of another shape ends the load.
    "shows in the names and shapes of the tensors": r"""
        (\w+_)?bias no_bias attention_(in|out)_bias add_(qkv_)?bias(_linear)? (padded_)?vocab_size hidden_size
        d_model n_embd n_inner (\w+_)?intermediate_size(_mlp)? (\w+_)?head_dim num_hidden_layers n_layers?
        num_layers lru_width (mamba_)?expand linear_num_heads per_layer_config
        (original_)?max_position_embeddings (use_)?qk_norm qk_layernorm post_norm num_(local_|routed_)?experts
        num_experts_per_tok(en)? n_routed_experts num_experts_per_layer mlp_layer_types moe_layers
        layers_block_type hybrid_(override|layer)_pattern kv_channels n_shared_experts num_shared_experts
        shared_expert_intermediate_size first_k_dense_replace moe_layer_freq (q|kv)_lora_rank
        qk_(nope|rope)_head_dim short_conv_kernel_size linear_conv_kernel_dim interleave_moe_layer_step
        full_attention_interval global_attn_every_n_layers num_key_value_heads n_ctx n_positions conv1d_width
        attn_output_gate conv_dim conv_dim_out num_heads indexer_types experts_per_token
    """,
}
_IRRELEVANT = re.compile("|".join(f"(?:{name})" for names in IRRELEVANT.values() for name in names.split()))

# Called with a value, the part of the config that holds it, and the class that reads this part.
Harmless = Callable[[Any, Mapping[str, Any], ModelClass], bool]


@dataclass(frozen=True)
class Rule:
    """A key that changes what a model computes, unless it has a harmless value.

    Attributes:
        keys: regular expression of the names.
        harmless: whether a value does what a class that does not read the key computes anyway.
        effect: what a class does instead, for the message.
        refuse: whether the model is refused; otherwise a notice is shown.
    """

    keys: str
    harmless: Harmless
    effect: str
    refuse: bool = True


@dataclass(frozen=True)
class Difference:
    """How a class differs from transformers, whatever a key that it does not read says."""

    when: Callable[[Mapping[str, Any]], bool]  # of the part of a config that the language model reads
    effect: str
    refuse: bool = False


DIFFERENCES = {  # by module of mlx-lm
    "ernie4_5_moe": Difference(
        lambda text: True, "ignores the bias that helps to choose experts (moe_statics)"
    ),
    "jamba": Difference(
        lambda text: text.get("num_experts", 16) > 1,
        "normalizes the weights of the chosen experts, which transformers does not",
    ),
    "minicpm3": Difference(
        lambda text: bool(text.get("tie_word_embeddings")),
        "does not scale the logits by hidden_size / dim_model_base if tie_word_embeddings is true",
        refuse=True,
    ),
}


def is_irrelevant(key: str) -> bool:
    """Return whether a key never changes what a language model computes."""
    return _IRRELEVANT.fullmatch(key) is not None


def find_rule(key: str) -> Rule | None:
    """Return the rule for a key; None if there is none."""
    return next((rule for rule in RULES if re.fullmatch(rule.keys, key)), None)


# Classes whose layers have a window only where `layer_types` says so.
WINDOW_BY_LAYER = {"llama", "ministral3", "smollm3"}

# --- values -------------------------------------------------------------------------------------------------

# What the code of a class that computes an activation mentions.
_ACTIVATIONS = {
    r"silu|swish|swiglu(oai)?": r"silu|swiglu|SiLU|SwitchGLU",
    r"gelu|gelu_python|gelu_new|gelu_pytorch_tanh|gelu_fast|gelu_accurate|quick_gelu": r"gelu|geglu|GELU",
    r"relu|relu2|relu_squared|relu_square": r"relu|ReLU",
    r"xielu": r"(?i)xielu",
}
_USUAL_LAYERS = (None, "default", "layer_norm", "rms_norm", "rmsnorm")
# The two ways to compute GELU, and the code of a class that computes it in this way.
_EXACT_GELU = (r"gelu|gelu_python", r"nn\.gelu\b|nn\.GELU\(\)")
_TANH_GELU = (r"gelu_new|gelu_pytorch_tanh|gelu_accurate", r"gelu_approx|geglu|tanh|precise")


def _any_of(*values: Any) -> Harmless:
    return lambda value, text, model: value in values


def _activation(value: Any, text: Mapping[str, Any], model: ModelClass) -> bool:
    if value is None:
        return True
    known = next((code for names, code in _ACTIVATIONS.items() if re.fullmatch(names, str(value))), None)
    return re.search(re.escape(str(value)) if known is None else known, model.source) is not None


def is_other_gelu(value: Any, model: ModelClass) -> bool:
    """Return whether a class computes GELU, but not in the way that a value names."""
    return any(
        re.fullmatch(names, str(value)) is not None and re.search(code, model.source) is None
        for names, code in (_EXACT_GELU, _TANH_GELU)
    )


def _softcapping(value: Any, text: Mapping[str, Any], model: ModelClass) -> bool:
    return value in (None, 0) or (model.text_name == "nanochat" and value == 15.0)


def _scores(value: Any, text: Mapping[str, Any], model: ModelClass) -> bool:
    return value is None or str(value) in model.source


def _window(value: Any, text: Mapping[str, Any], model: ModelClass) -> bool:
    types = text.get("layer_types")
    limit = text.get("max_position_embeddings") or 0
    return (
        not isinstance(value, int)
        or value <= 0
        or value >= limit > 0
        or text.get("use_sliding_window") is False
        or (isinstance(types, list) and not {"sliding_attention", "chunked_attention"} & set(map(str, types)))
    )


def _layer_types(value: Any, text: Mapping[str, Any], model: ModelClass) -> bool:
    # The window has a rule of its own, and other layers have tensors of their own.
    known = {"full_attention", "sliding_attention", "chunked_attention", "linear_attention", "conv"}
    known |= {"indexed_attention", "attention", "mamba", "moe", "mlp", "hybrid", "recurrent"}
    return not isinstance(value, list) or set(map(str, value)) <= known


def _no_rope(value: Any, text: Mapping[str, Any], model: ModelClass) -> bool:
    every_fourth = model.text_name == "llama4"
    return not isinstance(value, list) or all(
        bool(v) == (not every_fourth or (i + 1) % 4 != 0) for i, v in enumerate(value)
    )


def _rope_base(value: Any, text: Mapping[str, Any], model: ModelClass) -> bool:
    parameters = text.get("rope_parameters")
    same = isinstance(parameters, Mapping) and parameters.get("rope_theta") == value
    return same or value in (None, 10000) or re.search(r"(?i)rope", model.source) is None


def _epsilon(value: Any, text: Mapping[str, Any], model: ModelClass) -> bool:
    names = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "layernorm_epsilon", "norm_eps")
    return value in (None, 1e-5) or any(model.reads(name) for name in names) or str(value) in model.source


def _head_dim(value: Any, text: Mapping[str, Any], model: ModelClass) -> bool:
    return value is None or value == text.get("head_dim")


ACTIVATION = r"(mlp_|mamba_)?hidden_act(ivation)?|activation_function|ffn_act|activation"
RULES = (
    Rule(
        ACTIVATION,
        _activation,
        "does not compute it",
    ),
    Rule(
        r"(\w+_)?logits?_soft_?cap(ping)?|logit_soft_cap|final_softcap",
        _softcapping,
        "computes logits without it",
    ),
    Rule(r"clip_qkv", _any_of(None, 0), "does not clip"),
    Rule(
        r"(residual|embedding|attention|key|lm_head)_multiplier|logits_scaling|logit_scale|scale_emb|scale_depth"
        r"|routed_scaling_factor|moe_routed_scaling_factor|rope_ratio|rope_scaling_factor|output_multiplier"
        r"|(full_attn|linear_attn|mlp)_(alpha|beta)_factor|layernorm_(full|linear|mlp)\w*_(alpha|beta)",
        _any_of(None, 1),
        "does not multiply by it",
    ),
    Rule(r"norm_topk_prob", _any_of(None, False), "does not normalize the weights of experts"),
    Rule(r"moe_renormalize", _any_of(None, True), "normalizes the weights of experts"),
    Rule(r"scoring_func|score_func(tion)?|topk_method|moe_router_score_func", _scores, "has another router"),
    Rule(r"n_group|topk_group|num_expert_group", _any_of(None, 0, 1), "chooses experts from all groups"),
    Rule(r"decoder_sparse_step", _any_of(None, 1), "has experts in every layer"),
    Rule(r"mlp_only_layers", _any_of(None, []), "has experts in every layer"),
    Rule(r"use_bidirectional_attention", _any_of(None, False, "vision"), "attends to earlier tokens only"),
    Rule(r"is_causal|is_decoder", _any_of(None, True, False), "attends to earlier tokens only"),
    Rule(r"is_encoder_decoder|(add_)?cross_attention\w*|alibi|use_alibi", _any_of(None, False), "lacks it"),
    Rule(
        r"block_use_swiglu|use_gated_activation|use_parallel_block|use_pos_enc|use_embedding_sharing|tie_embedding"
        r"|mla_use_nope|use_grouped_topk",
        _any_of(None, True),
        "always does so",
    ),
    Rule(r"mlp_type|norm(alization)?_(type|function)", _any_of(*_USUAL_LAYERS), "has the usual layers"),
    Rule(r"rope_interleaved", _any_of(None, False), "rotates halves"),
    Rule(r"scale_attn_weights", _any_of(None, True), "divides by the square root of the head size"),
    Rule(
        r"scale_attn_by_inverse_layer_idx|moe_apply_router_weight_on_input|attention_k_eq_v|normalize_embedding",
        _any_of(None, False),
        "lacks it",
    ),
    Rule(r"no_rope_layers", _no_rope, "has RoPE in all layers"),
    Rule(r"no_rope_layer_interval", _any_of(None, 0, 4), "has RoPE in all layers"),
    Rule(r"rope_theta|rotary_emb_base", _rope_base, "has another RoPE base"),
    Rule(
        r"rope_local_base_freq|swa_rope_theta|rope_local_theta", _any_of(None, 10000), "has another RoPE base"
    ),
    Rule(r"rope_interleave", lambda value, text, model: value is not False, "interleaves"),
    Rule(r"query_pre_attn_scalar", _head_dim, "divides by the square root of the head size"),
    Rule(
        r"swiglu_limit|swiglu_alpha|moe_norm_min",
        lambda value, text, model: str(value) in model.source,
        "lacks it",
    ),
    Rule(r"time_step_limit", _any_of(None, [0.0, math.inf]), "does not limit the time step"),
    Rule(r"(rms_norm|layer_norm|layernorm|norm|block_norm)_eps(ilon)?", _epsilon, "has another epsilon"),
    Rule(r"layer_types", _layer_types, "has no layers of this type"),
    Rule(
        r"(\w+_)?sliding_window(_size)?|attention_window_size|window_size",
        _window,
        "attends to tokens beyond it",
        refuse=False,
    ),
    Rule(r"attention_chunk_size", _window, "attends to tokens beyond it", refuse=False),
    Rule(
        r"attn_temperature_tuning",
        _any_of(None, False, 0),
        "does not scale attention by position",
        refuse=False,
    ),
    # Settings of the keys above, or read by `rope_config` and `config_translation`.
    Rule(
        r"rope_parameters|rope_scaling|partial_rotary_factor|tie_word_embeddings|use_sliding_window|max_window_layers"
        r"|sliding_window_pattern|floor_scale|attn_scale|position_embedding_type|rotary_pct|swiglu_limits?\w*",
        lambda value, text, model: True,
        "",
    ),
)
