"""Muse Glimmer in GGUF."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from nalora_mlx.export.gguf.architecture import Architecture, is_sliding
from nalora_mlx.export.gguf.families.routing import USUAL_NAMES
from nalora_mlx.export.gguf.families.window_experts import window_pattern
from nalora_mlx.export.gguf.placement import Placement, interleave, renamed

_names = renamed(
    USUAL_NAMES
    | {
        "self_attn.gate_proj": "attn_gate",
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    },
    offset=1.0,
)


def _tensors(args: Any, path: str) -> list[Placement] | None:
    if path == "model.norm.weight":  # has no offset
        return [Placement("output_norm.weight")]
    heads = {"q_proj": args.num_attention_heads, "k_proj": args.num_key_value_heads}.get(path.split(".")[-2])
    found = _names(args, path) or []
    if heads is None:
        return found
    # For RoPE, which rotates neighbours in llama.cpp.
    rows = interleave(np.arange(heads * args.head_dim), heads)
    return [dataclasses.replace(placement, rows=rows) for placement in found]


def _head_norms(args: Any) -> dict[str, np.ndarray]:
    """Return the weights of the norms of queries and keys, which have none in mlx-lm but scale the queries."""
    tensors = {}
    for i in range(args.num_hidden_layers):
        tensors[f"blk.{i}.attn_q_norm.weight"] = np.full(args.head_dim, args.qk_scale_factor, np.float32)
        tensors[f"blk.{i}.attn_k_norm.weight"] = np.ones(args.head_dim, np.float32)
    return tensors


def _metadata(writer: Any, args: Any, config: dict[str, Any]) -> None:
    window_pattern(writer, args, config)
    writer.add_logit_scale(args.output_multiplier)
    writer.add_final_logit_softcapping(args.final_logit_softcapping)


def _problems(args: Any) -> Iterator[str]:
    if [bool(theta) for theta in args.layer_rope_theta] != is_sliding(args):
        yield "layer_rope_theta: llama.cpp applies RoPE exactly in the layers with a sliding window"
    if not any(is_sliding(args)):
        yield "layer_types has no sliding_attention: llama.cpp needs some"
    if args.post_norm_eps != 1e-8:
        yield f"post_norm_eps is {args.post_norm_eps:g}: llama.cpp uses 1e-08"


MUSE: dict[str, Architecture] = {
    "muse_glimmer": Architecture(
        "muse-glimmer",
        needs_output=True,
        placements=_tensors,
        extra_metadata=_metadata,
        extra_tensors=_head_norms,
        extra_checks=_problems,
    ),
}
