"""Transformers with LayerNorm in GGUF, one table row per model type."""

import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from nalora_mlx.export.gguf.architecture import ATTENTION, MLP, NORMS, QKV, Architecture, no_other_head_dim
from nalora_mlx.export.gguf.placement import Placement

# --- sizes and metadata ------------------------------------------------------------------------------

_GPT = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
    "layer_norm_eps": "layer_norm_epsilon",
}


def _no_rope(args: Any) -> dict[str, Any]:
    return {"context_length": args.max_position_embeddings, "rope_theta": None, "rope_dims": None}


def _gpt2(args: Any) -> dict[str, Any]:
    return {"intermediate_size": 4 * args.n_embd, "num_key_value_heads": args.n_head}


def _gpt_bigcode(args: Any) -> dict[str, Any]:
    return {"intermediate_size": args.n_inner, "num_key_value_heads": 1 if args.multi_query else args.n_head}


def _gpt_neox(args: Any) -> dict[str, Any]:
    return {"intermediate_size": 4 * args.hidden_size, "num_key_value_heads": args.num_attention_heads}


def _cohere(writer: Any, args: Any, config: dict[str, Any]) -> None:
    from gguf import RopeScalingType

    writer.add_logit_scale(args.logit_scale)
    writer.add_rope_scaling_type(RopeScalingType.NONE)


def _cohere2(writer: Any, args: Any, config: dict[str, Any]) -> None:
    _cohere(writer, args, config)
    writer.add_sliding_window(args.sliding_window)
    writer.add_sliding_window_pattern(args.sliding_window_pattern)


def _parallel_residual(writer: Any, args: Any, config: dict[str, Any]) -> None:
    writer.add_parallel_residual(args.use_parallel_residual)


# --- tensors -----------------------------------------------------------------------------------------


def _gpt2_tensors(args: Any, path: str) -> list[Placement]:
    name = path.removeprefix("model.").removeprefix("transformer.")
    return [Placement(name, full_precision=name == "wpe.weight")]  # llama.cpp does not quantize positions


def _gpt_neox_tensors(args: Any, path: str) -> list[Placement]:
    name = path.replace("model.h.", "gpt_neox.layers.").replace("model.embed_out.", "embed_out.")
    name = name.replace("model.", "gpt_neox.")
    if ".query_key_value." not in path:
        return [Placement(name)]
    # Query, key and value of each head.
    rows = np.arange(3 * args.hidden_size).reshape(args.num_attention_heads, 3, -1)
    return [Placement(name, rows=rows.swapaxes(0, 1).reshape(-1))]


def _cohere_tensors(args: Any, path: str) -> list[Placement] | None:
    # A norm of each head, which llama.cpp multiplies in float32.
    return [Placement(path, full_precision=True)] if re.search(r"\.[qk]_norm\.weight$", path) else None


def _stablelm_tensors(args: Any, path: str) -> list[Placement] | None:
    norm = re.fullmatch(r"model\.layers\.(\d+)\.self_attn\.([qk])_layernorm\.norms\.(\d+)\.weight", path)
    if norm is None:
        return None
    return [Placement(f"blk.{norm[1]}.attn_{norm[2]}_norm.weight", part=int(norm[3]), full_precision=True)]


# --- configs that llama.cpp would compute differently -----------------------------------------------


def _cohere_norms(args: Any) -> Iterator[str]:
    if args.use_qk_norm != (args.num_hidden_layers >= 64):
        yield f"use_qk_norm is {args.use_qk_norm}: llama.cpp normalizes queries and keys from 64 layers on"


# --- the table ---------------------------------------------------------------------------------------

LAYER_NORM: dict[str, Architecture] = {
    "cohere": Architecture(
        "command-r",
        interleaved_rope=True,
        traditional_rope=True,
        layer_norm=True,
        placements=_cohere_tensors,
        extra_metadata=_cohere,
        extra_checks=_cohere_norms,
    ),
    "cohere2": Architecture(
        "cohere2", interleaved_rope=True, traditional_rope=True, layer_norm=True, extra_metadata=_cohere2
    ),
    "gpt2": Architecture(
        "gpt2",
        gelu=True,
        layer_norm=True,
        biases=frozenset({"attn_qkv", "attn_output", "ffn_up", "ffn_down"}) | NORMS,
        names=_GPT,
        arguments=_gpt2,
        sizes=_no_rope,
        placements=_gpt2_tensors,
    ),
    "gpt_bigcode": Architecture(
        "starcoder",
        gelu=True,
        layer_norm=True,
        biases=frozenset({"attn_qkv", "attn_output", "ffn_up", "ffn_down"}) | NORMS,
        names=_GPT,
        arguments=_gpt_bigcode,
        sizes=_no_rope,
        placements=_gpt2_tensors,
    ),
    "gpt_neox": Architecture(
        "gptneox",
        gelu=True,
        layer_norm=True,
        biases=frozenset({"attn_qkv", "attn_output", "ffn_up", "ffn_down"}) | NORMS,
        names={"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
        arguments=_gpt_neox,
        placements=_gpt_neox_tensors,
        extra_metadata=_parallel_residual,
    ),
    "nemotron": Architecture(
        "nemotron",
        layer_norm=True,
        norm_offset=1.0,
        biases=ATTENTION | MLP | NORMS,
        names={"layer_norm_eps": "norm_eps"},
        rope_scaling=frozenset({"linear"}),
        extra_checks=no_other_head_dim,
    ),
    "phi": Architecture("phi2", gelu=True, layer_norm=True, biases=ATTENTION | MLP | NORMS | {"output"}),
    "stablelm": Architecture("stablelm", layer_norm=True, biases=QKV | NORMS, placements=_stablelm_tensors),
    "starcoder2": Architecture("starcoder2", gelu=True, layer_norm=True, biases=ATTENTION | MLP | NORMS),
}
