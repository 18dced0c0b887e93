"""Transformers with experts in GGUF, one table row per model type."""

from collections.abc import Iterator
from typing import Any

from nalora_mlx.export.gguf.architecture import Architecture


def _mixtral(writer: Any, args: Any, config: dict[str, Any]) -> None:
    writer.add_expert_count(args.num_local_experts)
    writer.add_expert_used_count(args.num_experts_per_tok)


def _qwen3_moe(writer: Any, args: Any, config: dict[str, Any]) -> None:
    writer.add_expert_count(args.num_experts)
    writer.add_expert_used_count(args.num_experts_per_tok)
    writer.add_expert_feed_forward_length(args.moe_intermediate_size)


def _all_experts(args: Any) -> Iterator[str]:
    if not args.norm_topk_prob:
        yield "norm_topk_prob is false: llama.cpp always normalizes the experts' weights"
    if args.decoder_sparse_step != 1 or args.mlp_only_layers:
        yield "decoder_sparse_step or mlp_only_layers gives dense layers: llama.cpp needs experts in every layer"


EXPERTS: dict[str, Architecture] = {
    "mixtral": Architecture("llama", interleaved_rope=True, ignores_scaling=True, extra_metadata=_mixtral),
    "qwen3_moe": Architecture(
        "qwen3moe", ignores_scaling=True, extra_metadata=_qwen3_moe, extra_checks=_all_experts
    ),
}
