"""Transformers with experts in GGUF whose layers differ in their attention, one table row per model type."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from nalora_mlx.export.gguf.architecture import Architecture, is_sliding, llama3_factors, rope_dims
from nalora_mlx.export.gguf.families.routing import (
    USUAL_NAMES,
    always_normalized,
    experts,
    full_attention_every,
    has_qk_norm,
)
from nalora_mlx.export.gguf.families.window_experts import (
    full_rope,
    rope_of,
    rope_types,
    window_pattern,
)
from nalora_mlx.export.gguf.placement import Placement, renamed
from nalora_mlx.models.rope_config import FULL, SLIDING

_BIAS = frozenset({"exp_probs_b"})

# --- Laguna ------------------------------------------------------------------------------------------


def _laguna_rope(args: Any) -> dict[str, Any]:
    factors = {}
    for kind in (FULL, SLIDING):
        factor = rope_of(args, kind).get("partial_rotary_factor", args.partial_rotary_factor)
        factors[kind] = 1.0 if factor is None else factor
    return full_rope(args) | {
        "partial_rotary_factor": factors[FULL],
        "sliding_partial_rotary_factor": factors[SLIDING],
        "num_dense_layers": list(args.mlp_layer_types).count("dense"),
        "norm_topk_prob": True,
    }


def _laguna(writer: Any, args: Any, config: dict[str, Any]) -> None:
    if any(is_sliding(args)):
        writer.add_sliding_window(args.sliding_window)
        writer.add_sliding_window_pattern(4)
        writer.add_rope_freq_base_swa(rope_of(args, SLIDING).get("rope_theta", 10000.0))
        writer.add_rope_dimension_count_swa(int(args.head_dim * args.sliding_partial_rotary_factor))


def _laguna_problems(args: Any) -> Iterator[str]:
    yield from rope_types(args)
    if any(is_sliding(args)):
        yield from full_attention_every(4, full=0)(args)
    if "dense" in args.mlp_layer_types[args.num_dense_layers :]:
        yield "mlp_layer_types: llama.cpp needs the dense layers first"
    if not args.gating:
        yield "gating is false: llama.cpp needs the gate of the attention"
    if args.moe_router_logit_softcapping:
        yield "moe_router_logit_softcapping: llama.cpp does not cap the router's logits"
    if args.moe_router_score_func != "sigmoid":
        yield f"moe_router_score_func is {args.moe_router_score_func}: only sigmoid is exported"


# --- MiMo-V2 and Step 3.5 -------------------------------------------------------------------------------


def _mimo_sizes(args: Any) -> dict[str, Any]:
    sliding = args.hybrid_layer_pattern
    heads = (args.num_attention_heads, args.swa_num_attention_heads)
    kv_heads = (args.num_key_value_heads, args.swa_num_key_value_heads)
    return {
        "head_count": [heads[slides] for slides in sliding],
        "head_count_kv": [kv_heads[slides] for slides in sliding],
        "value_length": args.v_head_dim,
    }


def _mimo(writer: Any, args: Any, config: dict[str, Any]) -> None:
    writer.add_sliding_window(args.sliding_window_size)
    writer.add_sliding_window_pattern(list(map(bool, args.hybrid_layer_pattern)))
    writer.add_rope_freq_base_swa(args.swa_rope_theta)
    if args.attention_value_scale is not None:
        writer.add_float32("mimo2.attention.value_scale", args.attention_value_scale)


def _mimo_problems(args: Any) -> Iterator[str]:
    yield from always_normalized(args)
    if args.num_experts_per_tok == 1:
        yield "num_experts_per_tok is 1: llama.cpp normalizes the weight of a single expert"
    if args.routed_scaling_factor not in (None, 1):
        yield f"routed_scaling_factor is {args.routed_scaling_factor}: llama.cpp does not read it here"
    if args.n_shared_experts:
        yield "n_shared_experts: llama.cpp has no shared experts for this architecture"
    if args.swa_head_dim != args.head_dim or args.swa_v_head_dim != args.v_head_dim:
        yield "swa_head_dim or swa_v_head_dim: llama.cpp needs heads of one size"


def _step_arguments(args: Any) -> dict[str, Any]:
    """Return the values for full attention under the usual names, and those for sliding attention."""
    layers = range(args.num_hidden_layers)
    thetas = args.rope_theta if isinstance(args.rope_theta, list) else [args.rope_theta for _ in layers]
    factors = args.partial_rotary_factors or [1.0 for _ in layers]
    theta, factor = (dict(zip(is_sliding(args), values, strict=False)) for values in (thetas, factors))
    return {
        "rope_theta": theta.get(False),
        "partial_rotary_factor": factor.get(False, 1.0),
        "sliding_rope_theta": theta.get(True, theta.get(False)),
        "sliding_partial_rotary_factor": factor.get(True, factor.get(False, 1.0)),
        "rope_thetas": thetas,
        "rope_scaling": None,
        "full_rope_scaling": args.rope_scaling or {},
    }


def _step_sizes(args: Any) -> dict[str, Any]:
    other = args.attention_other_setting or {}
    heads = (args.num_attention_heads, other.get("num_attention_heads", args.num_attention_heads))
    kv_heads = (args.num_key_value_heads, other.get("num_attention_groups", args.num_key_value_heads))
    sliding = is_sliding(args)
    return {
        "head_count": [heads[slides] for slides in sliding],
        "head_count_kv": [kv_heads[slides] for slides in sliding],
        "rope_dims": 2 * rope_dims(args),  # llama.cpp takes half of it for full attention
    }


def _step_sliding_dims(args: Any) -> int:
    return int(args.head_dim * args.sliding_partial_rotary_factor)


def _step(writer: Any, args: Any, config: dict[str, Any]) -> None:
    layers = args.num_hidden_layers

    def limits(values: list[float] | None) -> list[float]:
        return [float(value or 0) for value in [*(values or []), *[0] * layers][:layers]]

    window_pattern(writer, args, config)
    writer.add_rope_freq_base_swa(args.sliding_rope_theta)
    writer.add_rope_dimension_count_swa(_step_sliding_dims(args))
    writer.add_swiglu_clamp_exp(limits(args.swiglu_limits))
    writer.add_swiglu_clamp_shexp(limits(args.swiglu_limits_shared))


def _scaling_kind(scaling: dict[str, Any]) -> str:
    return scaling.get("type") or scaling.get("rope_type") or "default"


def _step_factors(args: Any) -> dict[str, np.ndarray]:
    if _scaling_kind(args.full_rope_scaling) != "llama3":
        return {}
    full = llama3_factors(args.full_rope_scaling, args.rope_theta, rope_dims(args))
    factors = np.ones(max(rope_dims(args), _step_sliding_dims(args)) // 2, np.float32)
    factors[: len(full)] = full
    return {"rope_freqs.weight": factors}


def _step_problems(args: Any) -> Iterator[str]:
    kinds = args.layer_types or []
    if len(kinds) < args.num_hidden_layers or FULL not in kinds:
        yield "layer_types: llama.cpp needs one for every layer, and at least one full_attention"
    for name, values in (
        ("rope_theta", args.rope_thetas),
        ("partial_rotary_factors", args.partial_rotary_factors),
    ):
        if len(set(zip(kinds, values or [], strict=False))) > len(set(kinds)):
            yield f"{name} differs between layers of one type: llama.cpp has one for each type"
    kind = _scaling_kind(args.full_rope_scaling)
    if kind not in ("default", "llama3"):
        yield f"rope_scaling of type {kind}: llama.cpp's step35 does not support it (only: llama3)"
    if kind == "llama3" and SLIDING in (args.yarn_only_types or kinds):
        yield "yarn_only_types: llama.cpp scales RoPE in full attention only"


# --- MiniMax M3: attention to chosen blocks of keys --------------------------------------------------


def _minimax_m3_names() -> dict[str, str]:
    names = USUAL_NAMES | {f"self_attn.index_{name}": f"indexer.{name}" for name in _INDEXER}
    for name in ("gate", "up", "down"):
        names[f"block_sparse_moe.switch_mlp.{name}_proj"] = f"ffn_{name}_exps"
        names[f"block_sparse_moe.shared_experts.{name}_proj"] = f"ffn_{name}_shexp"
    return names | {
        "block_sparse_moe.gate": "ffn_gate_inp",
        "block_sparse_moe.e_score_correction_bias": "exp_probs_b.bias",
    }


_INDEXER = ("q_proj", "k_proj", "q_norm", "k_norm")
_rename_minimax_m3 = {
    is_gemma: renamed(_minimax_m3_names(), offset=float(is_gemma)) for is_gemma in (False, True)
}


def _minimax_m3_tensors(args: Any, path: str) -> list[Placement] | None:
    return _rename_minimax_m3[bool(args.use_gemma_norm)](args, path)


def _minimax_m3_arguments(args: Any) -> dict[str, Any]:
    layers = range(args.num_hidden_layers)
    has_experts = [bool(args.is_moe(i)) for i in layers]
    return {
        "intermediate_size": args.dense_intermediate_size,
        "moe_intermediate_size": args.intermediate_size,
        "num_shared_experts": args.shared_intermediate_size // args.intermediate_size,
        "num_dense_layers": has_experts.count(False),
        "norm_topk_prob": True,
        "rope_scaling": args.rope_parameters,
        "has_experts": has_experts,
        "has_indexer": [bool(args.is_sparse_attn(i)) for i in layers],
    }


def _minimax_m3(writer: Any, args: Any, config: dict[str, Any]) -> None:
    writer.add_indexer_head_count(args.index_n_heads)
    writer.add_indexer_key_length(args.index_head_dim)
    writer.add_indexer_top_k(args.index_topk_blocks)
    writer.add_uint32("minimax-m3.attention.indexer.block_size", args.index_block_size)
    writer.add_uint32("minimax-m3.attention.indexer.local_blocks", args.index_local_blocks)


def _minimax_m3_problems(args: Any) -> Iterator[str]:
    if not all(args.has_experts[args.num_dense_layers :]):
        yield "mlp_layer_types: llama.cpp needs the dense layers first"
    if args.has_indexer != args.has_experts:
        yield "layer_types: llama.cpp has sparse attention exactly in the layers with experts"
    elif args.index_n_heads != args.num_key_value_heads:
        yield f"index_n_heads is {args.index_n_heads}: llama.cpp needs one for each of num_key_value_heads"
    if args.shared_intermediate_size % args.moe_intermediate_size:
        yield "shared_intermediate_size: llama.cpp needs a multiple of intermediate_size"
    if (args.swiglu_alpha, args.swiglu_limit) != (1.702, 7.0):
        yield "swiglu_alpha or swiglu_limit: llama.cpp uses 1.702 and 7"
    yield from has_qk_norm(args)


def _minimax_m3_note(args: Any) -> Iterator[str]:
    keys = args.index_topk_blocks * args.index_block_size
    yield f"beyond {keys} tokens llama.cpp chooses keys only with flash attention, and attends to all without it"


# --- the table ---------------------------------------------------------------------------------------

VARIED_EXPERTS: dict[str, Architecture] = {
    "laguna": Architecture(
        "laguna",
        names={"routed_scaling_factor": "moe_routed_scaling_factor"},
        biases=_BIAS,
        rope_scaling=frozenset({"yarn"}),
        arguments=_laguna_rope,
        sizes=lambda args: {"head_count": list(args.num_attention_heads_per_layer)},
        placements=renamed(
            USUAL_NAMES
            | {
                "self_attn.g_proj": "attn_gate",
                "mlp.gate.proj": "ffn_gate_inp",
                "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
            }
        ),
        extra_metadata=experts("sigmoid", _laguna),
        extra_checks=_laguna_problems,
    ),
    "mimo_v2_flash": Architecture(
        "mimo2",
        names={"num_experts": "n_routed_experts", "rms_norm_eps": "layernorm_epsilon"},
        biases=_BIAS,
        sizes=_mimo_sizes,
        placements=renamed(
            {
                "self_attn.attention_sink_bias": "attn_sinks.weight",
                "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
            }
        ),
        extra_metadata=experts("sigmoid", _mimo),
        extra_checks=_mimo_problems,
    ),
    "minimax_m3_vl": Architecture(
        "minimax-m3",
        names={"num_experts": "num_local_experts"},
        needs_output=True,
        biases=_BIAS,
        arguments=_minimax_m3_arguments,
        sizes=lambda args: {"rope_dims": args.rotary_dim},
        placements=_minimax_m3_tensors,
        extra_metadata=experts("sigmoid", _minimax_m3),
        extra_checks=_minimax_m3_problems,
        extra_notes=_minimax_m3_note,
    ),
    "step3p5": Architecture(
        "step35",
        names={
            "num_key_value_heads": "num_attention_groups",
            "num_experts": "moe_num_experts",
            "num_experts_per_tok": "moe_top_k",
            "shared_expert_intermediate_size": "share_expert_dim",
            "routed_scaling_factor": "moe_router_scaling_factor",
            "norm_topk_prob": "norm_expert_weight",
        },
        biases=_BIAS,
        arguments=_step_arguments,
        sizes=_step_sizes,
        placements=renamed(
            {
                "self_attn.g_proj": "attn_gate",
                "mlp.gate.gate": "ffn_gate_inp",
                "mlp.gate.router_bias": "exp_probs_b.bias",
                "mlp.share_expert.gate_proj": "ffn_gate_shexp",
                "mlp.share_expert.up_proj": "ffn_up_shexp",
                "mlp.share_expert.down_proj": "ffn_down_shexp",
            }
        ),
        extra_metadata=experts("sigmoid", _step),
        extra_tensors=_step_factors,
        extra_checks=_step_problems,
    ),
}
