"""Hybrids of Mamba and attention in GGUF, one table row per model type."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from nalora_mlx.export.gguf.architecture import ATTENTION, MLP, Architecture, head_dim
from nalora_mlx.export.gguf.families.dense import granite_multipliers
from nalora_mlx.export.gguf.families.state_spaces import StateSpace, all_layers, state_space_row
from nalora_mlx.export.gguf.placement import Placement, interleave, layer_and_rest

_COMMON = {
    "input_layernorm": "attn_norm",
    "self_attn.o_proj": "attn_output",
} | {f"self_attn.{name}_proj": f"attn_{name}" for name in "qkv"}
_FEED_FORWARD = {
    "feed_forward.gate_proj": "ffn_gate",
    "feed_forward.up_proj": "ffn_up",
    "feed_forward.down_proj": "ffn_down",
    "pre_ff_layernorm": "ffn_norm",
    "model.final_layernorm": "output_norm",
}


def _kv_heads(is_recurrent: list[bool], args: Any) -> list[int]:
    return [0 if recurrent else args.num_key_value_heads for recurrent in is_recurrent]


def _nemotron_h(args: Any) -> StateSpace:
    return StateSpace(
        args.conv_kernel,
        args.mamba_num_heads * args.mamba_head_dim,
        args.ssm_state_size,
        args.mamba_num_heads,
        args.n_groups,
        args.use_conv_bias,
        tuple(args.time_step_limit),
    )


def _nemotron_h_recurrent(args: Any) -> list[bool]:
    return [kind == "M" for kind in args.hybrid_override_pattern]


def _nemotron_h_name(config: dict[str, Any]) -> str | None:
    keys = ("hybrid_override_pattern", "layers_block_type", "layer_types")
    layers = {layer for key in keys for layer in config.get(key) or ()}
    return "nemotron_h_moe" if {"E", "moe"} & layers else None


def _nemotron_h_sizes(args: Any) -> dict[str, Any]:
    pattern = args.hybrid_override_pattern
    widths = {"-": args.intermediate_size, "E": args.moe_intermediate_size}
    return {
        "head_count_kv": [args.num_key_value_heads * (kind == "*") for kind in pattern],
        "feed_forward_length": [widths.get(kind, 0) for kind in pattern],
        "rms_norm_eps": args.layer_norm_epsilon,
        "layer_norm_eps": args.layer_norm_epsilon,  # llama.cpp reads both
        "rope_theta": None,
        "rope_dims": None,
    }


def _nemotron_h_metadata(writer: Any, args: Any, config: dict[str, Any]) -> None:
    if "E" not in args.hybrid_override_pattern:
        return
    writer.add_expert_count(args.n_routed_experts)
    writer.add_expert_used_count(args.num_experts_per_tok)
    writer.add_expert_feed_forward_length(args.moe_intermediate_size)
    writer.add_expert_shared_feed_forward_length(args.moe_shared_expert_intermediate_size)
    writer.add_expert_shared_count(args.n_shared_experts)
    writer.add_expert_weights_norm(args.norm_topk_prob)
    writer.add_expert_weights_scale(args.routed_scaling_factor)
    if args.moe_latent_size is not None:
        writer.add_moe_latent_size(args.moe_latent_size)


_NEMOTRON_H = {
    "backbone.embeddings": "token_embd",
    "backbone.norm_f": "output_norm",
    "norm": "attn_norm",
    "mixer.q_proj": "attn_q",
    "mixer.k_proj": "attn_k",
    "mixer.v_proj": "attn_v",
    "mixer.o_proj": "attn_output",
    "mixer.up_proj": "ffn_up",
    "mixer.down_proj": "ffn_down",
    "mixer.gate": "ffn_gate_inp",
    "mixer.switch_mlp.fc1": "ffn_up_exps",
    "mixer.switch_mlp.fc2": "ffn_down_exps",
    "mixer.shared_experts.up_proj": "ffn_up_shexp",
    "mixer.shared_experts.down_proj": "ffn_down_shexp",
}


def _nemotron_h_placements(args: Any, path: str) -> list[Placement] | None:
    layer, rest = layer_and_rest(path)
    if rest == "mixer.gate.e_score_correction_bias":
        return [Placement(f"blk.{layer}.exp_probs_b.bias")]
    latent = {"mixer.fc1_latent_proj.weight": "down", "mixer.fc2_latent_proj.weight": "up"}.get(rest)
    return [Placement(f"blk.{layer}.ffn_latent_{latent}.weight", ignores_lora=True)] if latent else None


def _nemotron_h_checks(args: Any) -> Iterator[str]:
    if "E" not in args.hybrid_override_pattern:
        return
    if "-" in args.hybrid_override_pattern:
        yield "layers with and without experts: llama.cpp's MLPs all have experts"
    if args.n_group != 1:
        yield f"n_group is {args.n_group}: llama.cpp's nemotron_h_moe does not choose among groups of experts"
    if not args.n_shared_experts:
        yield "n_shared_experts is 0: llama.cpp's nemotron_h_moe needs a shared expert"


def _jamba(args: Any) -> StateSpace:
    inner = args.mamba_expand * args.hidden_size
    return StateSpace(
        args.mamba_d_conv, inner, args.mamba_d_state, args.mamba_dt_rank, conv_bias=args.mamba_conv_bias
    )


def _jamba_recurrent(args: Any) -> list[bool]:
    return [kind != "attention" for kind in args.layers_block_type]


def _jamba_checks(args: Any) -> Iterator[str]:
    if args.mamba_expand != 2:
        yield f"mamba_expand is {args.mamba_expand}: llama.cpp's jamba needs 2"
    if args.num_experts > 1:
        yield "num_experts is above 1: mlx-lm normalizes the weights of Jamba's experts, llama.cpp does not"


_JAMBA = (
    _COMMON
    | _FEED_FORWARD
    | {
        "mamba.dt_layernorm": "ssm_dt_norm",
        "mamba.b_layernorm": "ssm_b_norm",
        "mamba.c_layernorm": "ssm_c_norm",
    }
)


def _falcon_h1(args: Any) -> StateSpace:
    return StateSpace(
        args.mamba_d_conv,
        args.mamba_d_ssm,
        args.mamba_d_state,
        args.mamba_n_heads,
        args.mamba_n_groups,
        args.mamba_conv_bias,
        has_grouped_norm=not args.mamba_rms_norm,
    )


def _falcon_h1_placements(args: Any, path: str) -> list[Placement] | None:
    layer, rest = layer_and_rest(path)
    if rest == "pre_ff_layernorm.weight":
        return [Placement(f"blk.{layer}.ffn_norm")]  # llama.cpp's name has no ".weight"
    if path != "model.embed_tokens.weight" or not args.tie_word_embeddings:
        return None
    factor = np.float32(args.lm_head_multiplier / args.embedding_multiplier)
    return [Placement("token_embd.weight"), Placement("output.weight", values=lambda array: array * factor)]


def _falcon_h1_checks(args: Any) -> Iterator[str]:
    if args.mamba_rms_norm and args.mamba_norm_before_gate:
        yield "mamba_norm_before_gate is true: llama.cpp normalizes after the gate"
    if args.attention_bias or args.projectors_bias:
        yield "attention_bias or projectors_bias is true: llama.cpp's falcon-h1 ignores the biases"


def _granite(args: Any) -> StateSpace:
    if "mamba" not in args.layer_types:
        return StateSpace(0, 0, 0, 0, 1)
    return StateSpace(
        args.mamba_d_conv,
        args.mamba_n_heads * args.mamba_d_head,
        args.mamba_d_state,
        args.mamba_n_heads,
        args.mamba_n_groups,
        args.mamba_conv_bias,
        tuple(args.time_step_limit),
        has_grouped_norm=False,
    )


def _granite_recurrent(args: Any) -> list[bool]:
    return [kind == "mamba" for kind in args.layer_types]


def _granite_name(config: dict[str, Any]) -> str | None:
    """Return the architecture of models without Mamba layers, which llama.cpp's granitehybrid does not load."""
    if "mamba" in config.get("layer_types", ()):
        return None
    return "granitemoe" if config.get("num_local_experts") else "granite"


def _granite_metadata(writer: Any, args: Any, config: dict[str, Any]) -> None:
    granite_multipliers(writer, args, config)
    writer.add_rope_scaling_finetuned(args.position_embedding_type != "nope")  # whether llama.cpp uses RoPE
    if args.num_local_experts:
        writer.add_expert_count(args.num_local_experts)
        writer.add_expert_used_count(args.num_experts_per_tok)
        writer.add_expert_shared_feed_forward_length(args.shared_intermediate_size)


def _granite_placements(args: Any, path: str) -> list[Placement] | None:
    layer, rest = layer_and_rest(path)
    block = f"blk.{layer}"
    if rest == "shared_mlp.input_linear.weight":
        gate, up = np.split(np.arange(2 * args.shared_intermediate_size), 2)
        return [
            Placement(f"{block}.ffn_gate_shexp.weight", gate),
            Placement(f"{block}.ffn_up_shexp.weight", up),
        ]
    for name, heads in (("q", args.num_attention_heads), ("k", args.num_key_value_heads)):
        stem, _, leaf = rest.rpartition(".")
        if stem == f"self_attn.{name}_proj":
            rows = interleave(np.arange(heads * head_dim(args)), heads)
            return [Placement(f"{block}.attn_{name}.{leaf}", rows)]
    return None


def _granite_checks(args: Any) -> Iterator[str]:
    if "mamba" in args.layer_types and args.mamba_n_heads * args.mamba_d_head != 2 * args.hidden_size:
        yield "mamba_n_heads * mamba_d_head is not twice hidden_size: llama.cpp's granitehybrid needs that"


_GRANITE = _COMMON | {
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "shared_mlp.output_linear": "ffn_down_shexp",
    "block_sparse_moe.router.layer": "ffn_gate_inp",
    "block_sparse_moe.switch_mlp.gate_proj": "ffn_gate_exps",
    "block_sparse_moe.switch_mlp.up_proj": "ffn_up_exps",
    "block_sparse_moe.switch_mlp.down_proj": "ffn_down_exps",
}

MAMBA_HYBRIDS: dict[str, Architecture] = {
    "nemotron_h": state_space_row(
        "nemotron_h",
        _nemotron_h,
        "mixer",
        _NEMOTRON_H,
        _nemotron_h_recurrent,
        other_name=_nemotron_h_name,
        metadata=_nemotron_h_metadata,
        placements=_nemotron_h_placements,
        checks=_nemotron_h_checks,
        sizes=_nemotron_h_sizes,
        biases=ATTENTION | MLP | {"exp_probs_b"},
    ),
    "jamba": state_space_row(
        "jamba",
        _jamba,
        "mamba",
        _JAMBA,
        _jamba_recurrent,
        checks=_jamba_checks,
        sizes=lambda args: {
            "head_count_kv": _kv_heads(_jamba_recurrent(args), args),
            "rope_theta": None,
            "rope_dims": None,
        },
    ),
    "falcon_h1": state_space_row(
        "falcon-h1",
        _falcon_h1,
        "mamba",
        _COMMON | _FEED_FORWARD,
        all_layers,
        placements=_falcon_h1_placements,
        checks=_falcon_h1_checks,
        rope_scaling=frozenset({"linear"}),
        biases=MLP,
    ),
    "granitemoehybrid": state_space_row(
        "granitehybrid",
        _granite,
        "mamba",
        _GRANITE,
        _granite_recurrent,
        other_name=_granite_name,
        metadata=_granite_metadata,
        placements=_granite_placements,
        checks=_granite_checks,
        sizes=lambda args: {"head_count_kv": _kv_heads(_granite_recurrent(args), args)},
        ignores_scaling=True,
        biases=ATTENTION | MLP,
    ),
}
