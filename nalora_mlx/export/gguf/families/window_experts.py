"""Transformers with experts and sliding-window attention in GGUF, one table row per model type."""

from collections.abc import Iterator
from typing import Any

from nalora_mlx.export.gguf.architecture import ATTENTION, Architecture, checks, is_sliding
from nalora_mlx.export.gguf.families.routing import (
    USUAL_NAMES,
    always_normalized,
    experts,
    full_attention_every,
    has_shared_experts,
)
from nalora_mlx.export.gguf.placement import renamed
from nalora_mlx.models.rope_config import FULL, SLIDING

_SCALING = frozenset({"linear", "yarn"})


def _window(writer: Any, args: Any, config: dict[str, Any]) -> None:
    writer.add_sliding_window(args.sliding_window)


def window_pattern(writer: Any, args: Any, config: dict[str, Any]) -> None:
    """Write the window and the layers that have it."""
    if any(is_sliding(args)):
        writer.add_sliding_window(args.sliding_window)
        writer.add_sliding_window_pattern(is_sliding(args))


# --- RoPE per layer type -----------------------------------------------------------------------------


def rope_of(args: Any, kind: str) -> dict[str, Any]:
    """Return the RoPE parameters of a type of layers."""
    return (args.rope_parameters or {}).get(kind) or {}


def full_rope(args: Any) -> dict[str, Any]:
    """Return the arguments of RoPE in full attention under their usual names."""
    full = rope_of(args, FULL)
    return {"rope_theta": full.get("rope_theta", 10000.0), "rope_scaling": full or None}


def rope_types(args: Any) -> Iterator[str]:
    """Check that RoPE is not scaled in sliding-window attention."""
    if (kind := rope_of(args, SLIDING).get("rope_type", "default")) != "default":
        yield f"rope_parameters of type {kind} in sliding attention: llama.cpp supports none"


# --- single architectures ----------------------------------------------------------------------------


def _mellum_problems(args: Any) -> Iterator[str]:
    yield from rope_types(args)
    thetas = {rope_of(args, FULL).get("rope_theta")}
    if any(is_sliding(args)):
        thetas.add(rope_of(args, SLIDING).get("rope_theta"))
    if len(thetas) > 1:
        yield "rope_theta differs between layer types: llama.cpp uses one for all"


def _exaone_problems(args: Any) -> Iterator[str]:
    yield from has_shared_experts(args)
    if not any(is_sliding(args)):
        yield "layer_types has no sliding_attention: llama.cpp would omit RoPE"
    dense = list(args.is_moe_layer).count(False)
    if not all(args.is_moe_layer[dense:]):
        yield "is_moe_layer: llama.cpp needs the dense layers first"


def _exaone(writer: Any, args: Any, config: dict[str, Any]) -> None:
    window_pattern(writer, args, config)
    writer.add_leading_dense_block_count(list(args.is_moe_layer).count(False))
    writer.add_expert_shared_feed_forward_length(args.moe_intermediate_size * args.num_shared_experts)


def _afmoe_problems(args: Any) -> Iterator[str]:
    yield from full_attention_every(4)(args)
    if args.n_group > 1:
        yield f"n_group is {args.n_group}: llama.cpp has no groups of experts for this architecture"
    if not args.mup_enabled:
        yield "mup_enabled is false: llama.cpp multiplies the embedding by the root of hidden_size"
    if args.score_func != "sigmoid":
        yield f"score_func is {args.score_func}: only sigmoid is exported"


def _llama4(writer: Any, args: Any, config: dict[str, Any]) -> None:
    writer.add_interleave_moe_layer_step(args.interleave_moe_layer_step)


def _llama4_problems(args: Any) -> Iterator[str]:
    if args.attention_chunk_size != 8192:
        yield f"attention_chunk_size is {args.attention_chunk_size}: llama.cpp uses 8192"
    if (args.floor_scale, args.attn_scale) != (8192, 0.1) or not args.attn_temperature_tuning:
        yield "attn_temperature_tuning, floor_scale or attn_scale: llama.cpp uses 8192 and 0.1"
    if args.use_qk_norm == (args.num_experts == 128):
        yield f"use_qk_norm is {args.use_qk_norm}: llama.cpp derives it from the number of experts"


def _llama4_epsilon(args: Any) -> Iterator[str]:
    if args.use_qk_norm and args.rms_norm_eps != 1e-6:
        yield (
            f"the norms of queries and keys use epsilon {args.rms_norm_eps:g} in llama.cpp and 1e-06 in mlx-lm; the "
            "difference is small"
        )


# --- the table ---------------------------------------------------------------------------------------

_BIAS = frozenset({"exp_probs_b"})

WINDOW_EXPERTS: dict[str, Architecture] = {
    "gpt_oss": Architecture(
        "gpt-oss",
        names={"num_experts": "num_local_experts", "moe_intermediate_size": "intermediate_size"},
        biases=ATTENTION | {"ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"},
        rope_scaling=_SCALING,
        placements=renamed(
            {
                "self_attn.sinks": "attn_sinks.weight",
                "mlp.router": "ffn_gate_inp",
                "mlp.experts.gate_proj": "ffn_gate_exps",
                "mlp.experts.up_proj": "ffn_up_exps",
                "mlp.experts.down_proj": "ffn_down_exps",
            }
        ),
        extra_metadata=experts("softmax", _window),
        extra_checks=full_attention_every(2),
    ),
    "llama4": Architecture(
        "llama4",
        names={
            "num_experts": "num_local_experts",
            "moe_intermediate_size": "intermediate_size",
            "intermediate_size": "intermediate_size_mlp",
        },
        rope_scaling=_SCALING | {"llama3"},
        extra_metadata=experts("sigmoid", _llama4),
        extra_checks=_llama4_problems,
        extra_notes=_llama4_epsilon,
    ),
    "afmoe": Architecture(
        "afmoe",
        names={"norm_topk_prob": "route_norm", "routed_scaling_factor": "route_scale"},
        biases=_BIAS,
        rope_scaling=_SCALING,
        placements=renamed(
            {
                "self_attn.gate_proj": "attn_gate",
                "post_attention_layernorm": "post_attention_norm",
                "pre_mlp_layernorm": "ffn_norm",
                "post_mlp_layernorm": "post_ffw_norm",
                "mlp.router.gate": "ffn_gate_inp",
                "mlp.expert_bias": "exp_probs_b.bias",
            }
        ),
        extra_metadata=experts("sigmoid", _window, normalizes_one=False),
        extra_checks=_afmoe_problems,
    ),
    "exaone_moe": Architecture(
        "exaone-moe",
        biases=_BIAS,
        rope_scaling=_SCALING,
        placements=renamed({"mlp.gate.e_score_correction_bias": "exp_probs_b.bias"}),
        extra_metadata=experts("sigmoid", _exaone, normalizes_one=False),
        extra_checks=_exaone_problems,
    ),
    "mellum": Architecture(
        "mellum",
        needs_output=True,
        rope_scaling=frozenset({"yarn"}),
        arguments=full_rope,
        placements=renamed(USUAL_NAMES),
        extra_metadata=experts("softmax", window_pattern),
        extra_checks=checks(always_normalized, _mellum_problems),
    ),
}
