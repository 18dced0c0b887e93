"""Transformers with DeepSeek's multi-head latent attention (MLA) in GGUF, one table row per model type.

llama.cpp caches the latent vectors. It needs the matrix that maps them to keys and values in two parts: `attn_k_b`
[heads, kv_lora_rank, qk_nope_head_dim], transposed, and `attn_v_b` [heads, v_head_dim, kv_lora_rank].
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from nalora_mlx.core.notices import Note
from nalora_mlx.export.gguf.architecture import Architecture, Check, checks
from nalora_mlx.export.gguf.families.routing import (
    DEEPSEEK,
    USUAL_NAMES,
    experts,
    experts_in_every_layer,
    has_shared_experts,
)
from nalora_mlx.export.gguf.placement import Placement, layer_and_rest, renamed

# --- sizes and metadata ------------------------------------------------------------------------------


def _sizes(args: Any) -> dict[str, Any]:
    return {
        "head_count_kv": 1,
        "key_length": args.kv_lora_rank + args.qk_rope_head_dim,
        "value_length": args.kv_lora_rank,
        "rope_dims": args.qk_rope_head_dim,
    }


def _latent(writer: Any, args: Any, config: dict[str, Any]) -> None:
    if args.q_lora_rank is not None:
        writer.add_q_lora_rank(args.q_lora_rank)
    writer.add_kv_lora_rank(args.kv_lora_rank)
    writer.add_key_length_mla(args.qk_nope_head_dim + args.qk_rope_head_dim)
    writer.add_value_length_mla(args.v_head_dim)
    if args.mscale_all_dim:
        writer.add_rope_scaling_yarn_log_mul(0.1 * args.mscale_all_dim)


def _indexer(writer: Any, args: Any, config: dict[str, Any]) -> None:
    writer.add_indexer_head_count(args.index_n_heads)
    writer.add_indexer_key_length(args.index_head_dim)
    writer.add_indexer_top_k(args.index_topk)
    writer.add_layer_norm_eps(1e-5)


def _glm_dsa(writer: Any, args: Any, config: dict[str, Any]) -> None:
    # llama.cpp would assume for models with a long context that some layers have no indexer of their own.
    writer.add_array("glm-dsa.attention.indexer.types", [1] * args.num_hidden_layers)


def _youtu(writer: Any, args: Any, config: dict[str, Any]) -> None:
    _latent(writer, args, config)
    writer.add_leading_dense_block_count(args.num_hidden_layers)
    writer.add_expert_feed_forward_length(args.intermediate_size)
    writer.add_expert_shared_count(0)


def _mistral4(writer: Any, args: Any, config: dict[str, Any]) -> None:
    writer.add_attn_temperature_scale(args.rope_parameters["llama_4_scaling_beta"])
    writer.add_attn_temperature_length(args.rope_parameters["original_max_position_embeddings"])


def _split_mscale(scaling: dict[str, Any] | None) -> dict[str, Any]:
    """Return RoPE scaling without mscale and mscale_all_dim, and these apart; both 1 if they have no effect."""
    scaling = dict(scaling or {})
    mscale, mscale_all_dim = scaling.pop("mscale", 1), scaling.pop("mscale_all_dim", 0)
    if scaling.get("factor", 1) <= 1:
        mscale = mscale_all_dim = 1
    return {"rope_scaling": scaling or None, "mscale": mscale, "mscale_all_dim": mscale_all_dim}


def _arguments(args: Any) -> dict[str, Any]:
    return _split_mscale(args.rope_scaling)


def _deepseek_v2_arguments(args: Any) -> dict[str, Any]:
    return _split_mscale(args.rope_scaling | {"type": "yarn"})  # mlx-lm does not read the type


def _mistral4_arguments(args: Any) -> dict[str, Any]:
    return _split_mscale(args.rope_parameters)


# --- tensors -----------------------------------------------------------------------------------------

_NAMES = USUAL_NAMES | {
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.embed_q": "attn_k_b",
    "self_attn.unembed_out": "attn_v_b",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
    "self_attn.indexer.wq_b": "indexer.attn_q_b",
    "self_attn.indexer.wk": "indexer.attn_k",
    "self_attn.indexer.k_norm": "indexer.k_norm",
    "self_attn.indexer.weights_proj": "indexer.proj",
}
# llama.cpp multiplies by these without the adapter.
_WITHOUT_LORA = {
    "lm_head",
    "self_attn.q_proj",
    "self_attn.q_a_proj",
    "self_attn.q_b_proj",
    "self_attn.kv_a_proj_with_mqa",
    "self_attn.indexer.wq_b",
    "self_attn.indexer.wk",
    "self_attn.indexer.weights_proj",
}
_rename = renamed(_NAMES, without_lora=_WITHOUT_LORA)


def _place(args: Any, path: str) -> list[Placement] | None:
    layer, inside = layer_and_rest(path)
    if inside != "self_attn.kv_b_proj.weight":
        return _rename(args, path)
    heads, nope, values = args.num_attention_heads, args.qk_nope_head_dim, args.v_head_dim
    rows = np.arange(heads * (nope + values)).reshape(heads, -1)

    def transpose(array: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(array.reshape(heads, nope, -1).swapaxes(1, 2))

    rank = args.kv_lora_rank
    return [
        Placement(
            f"blk.{layer}.attn_k_b.weight",
            rows[:, :nope].reshape(-1),
            values=transpose,
            shape=(heads, rank, nope),
        ),
        Placement(f"blk.{layer}.attn_v_b.weight", rows[:, nope:].reshape(-1), shape=(heads, values, rank)),
    ]


# --- checks ------------------------------------------------------------------------------------------


def _mscales(args: Any) -> Iterator[str]:
    if args.mscale != args.mscale_all_dim or not args.mscale:
        yield (
            f"rope_scaling has mscale {args.mscale:g} and mscale_all_dim {args.mscale_all_dim:g}: llama.cpp "
            "computes the same only if they are equal and not 0"
        )


def _mscale_of_1(args: Any) -> Iterator[str]:
    yield from _mscales(args)
    if args.mscale == args.mscale_all_dim != 1:
        yield f"rope_scaling has mscale {args.mscale:g}: llama.cpp computes the same only if it is 1"


def _indexer_rope(interleaved: bool) -> Check:
    def problems(args: Any) -> Iterator[str]:
        if args.indexer_rope_interleave != interleaved:
            yield f"indexer_rope_interleave is {args.indexer_rope_interleave}: llama.cpp has {interleaved} here"

    return problems


def _query_rank(args: Any) -> Iterator[str]:
    if (args.q_lora_rank is None) != (args.num_hidden_layers in (26, 27)):
        yield (
            f"q_lora_rank is {args.q_lora_rank} with {args.num_hidden_layers} layers: llama.cpp expects queries "
            "without rank in models of 26 or 27 layers and no others"
        )


def _deepseek_v2(args: Any) -> Iterator[str]:
    if args.topk_method == "group_limited_greedy":
        yield (
            "topk_method is group_limited_greedy: mlx-lm ranks groups by their best expert, llama.cpp by the sum "
            "of the best two"
        )


def _traditional(args: Any) -> Iterator[str]:
    if not args.rope_traditional:
        yield "rope_traditional is false: llama.cpp rotates pairs of neighbours"


def _mistral4_rope(args: Any) -> Iterator[str]:
    if args.rope_interleave is False:
        yield "rope_interleave is false: llama.cpp rotates pairs of neighbours"


def _other_epsilon(args: Any) -> Iterator[str]:
    """Note where mlx-lm has the constant 1e-6 for an epsilon."""
    if args.rms_norm_eps != 1e-6:
        yield Note(
            f"the norms of compressed queries, keys and values use epsilon {args.rms_norm_eps:g} in llama.cpp and "
            "1e-06 in mlx-lm; the difference is small"
        )


# --- the table ---------------------------------------------------------------------------------------

_DEEPSEEK_V3 = Architecture(
    "deepseek2",
    names=DEEPSEEK,
    biases=frozenset({"exp_probs_b"}),
    rope_scaling=frozenset({"yarn"}),
    arguments=_arguments,
    sizes=_sizes,
    placements=_place,
    extra_metadata=experts("sigmoid", _latent, normalizes_one=False),
    extra_checks=checks(_mscales, _query_rank, has_shared_experts, experts_in_every_layer),
    extra_notes=_other_epsilon,
)
_DEEPSEEK_V32 = dataclasses.replace(
    _DEEPSEEK_V3,
    name="deepseek32",
    biases=_DEEPSEEK_V3.biases | {"k_norm"},
    extra_metadata=experts("sigmoid", _latent, _indexer, normalizes_one=False),
    extra_checks=checks(_mscale_of_1, has_shared_experts, experts_in_every_layer, _indexer_rope(False)),
)

LATENT: dict[str, Architecture] = {
    "deepseek_v2": dataclasses.replace(
        _DEEPSEEK_V3,
        arguments=_deepseek_v2_arguments,
        extra_metadata=experts("softmax", _latent),
        extra_checks=checks(_mscales, _query_rank, has_shared_experts, experts_in_every_layer, _deepseek_v2),
    ),
    "deepseek_v3": _DEEPSEEK_V3,
    "joyai_llm_flash": _DEEPSEEK_V3,
    "kimi_k2": _DEEPSEEK_V3,
    "kimi_k25": _DEEPSEEK_V3,
    "kimi_vl": _DEEPSEEK_V3,
    "glm4_moe_lite": dataclasses.replace(_DEEPSEEK_V3, extra_notes=Architecture("any").extra_notes),
    "deepseek_v32": _DEEPSEEK_V32,
    "glm_moe_dsa": dataclasses.replace(
        _DEEPSEEK_V32,
        name="glm-dsa",
        extra_metadata=experts("sigmoid", _latent, _indexer, _glm_dsa, normalizes_one=False),
        extra_checks=checks(_mscale_of_1, has_shared_experts, experts_in_every_layer, _indexer_rope(True)),
    ),
    "mistral4": dataclasses.replace(
        _DEEPSEEK_V3,
        name="mistral4",
        arguments=_mistral4_arguments,
        extra_metadata=experts("softmax", _latent, _mistral4),
        extra_checks=checks(_mscale_of_1, has_shared_experts, _mistral4_rope),
    ),
    "youtu_llm": Architecture(
        "deepseek2",
        interleaved_rope=True,
        rope_scaling=frozenset({"yarn"}),
        arguments=_arguments,
        sizes=_sizes,
        placements=_place,
        extra_metadata=_youtu,
        extra_checks=checks(_mscales, _query_rank, _traditional),
        extra_notes=_other_epsilon,
    ),
}
