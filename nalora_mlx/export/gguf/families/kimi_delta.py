"""Models with Kimi delta attention and multi-head latent attention in GGUF, one table row per model type."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from nalora_mlx.export.gguf.architecture import Architecture, checks
from nalora_mlx.export.gguf.families.routing import always_normalized, experts, experts_in_every_layer
from nalora_mlx.export.gguf.placement import Placement, Placements, layer_and_rest, negative_exp

_COMMON = {
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.switch_mlp.gate_proj": "ffn_gate_exps",
    "mlp.switch_mlp.up_proj": "ffn_up_exps",
    "mlp.switch_mlp.down_proj": "ffn_down_exps",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}
_ATTENTION = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "b_proj": "ssm_beta",
    "o_norm": "ssm_norm",
    "q_a_proj": "attn_q_a",
    "q_a_layernorm": "attn_q_a_norm",
    "q_b_proj": "attn_q_b",
    "kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "kv_a_layernorm": "attn_kv_a_norm",
    "embed_q": "attn_k_b",
    "unembed_out": "attn_v_b",
}


def _placements(
    module: str, embedding: str, attention: dict[str, str], decay: Callable[[np.ndarray], np.ndarray]
) -> Placements:
    """Return the tensors of a model's parameters.

    Args:
        module: name of the attention in a layer.
        embedding: path of the embedding.
        attention: names of the attention's modules -> names in GGUF, besides the usual ones.
        decay: what becomes of A_log.
    """
    names = _ATTENTION | attention

    def place(args: Any, path: str) -> list[Placement] | None:
        layer, rest = layer_and_rest(path)
        stem, _, leaf = rest.rpartition(".")
        block = f"blk.{layer}"
        if layer < 0:
            name = (_COMMON | {embedding: "token_embd"}).get(stem)
            return [Placement(f"{name}.{leaf}", ignores_lora=name == "output")] if name else None
        if leaf in ("e_score_correction_bias", "expert_bias"):
            return [Placement(f"{block}.exp_probs_b.bias")]
        name = _COMMON.get(stem)
        if name:
            return [Placement(f"{block}.{name}.{leaf}")]
        own = rest.removeprefix(f"{module}.")
        if own == "A_log":
            heads = (args.num_attention_heads, 1)
            return [Placement(f"{block}.ssm_a", values=decay, shape=heads, full_precision=True)]
        if own == "dt_bias":
            return [Placement(f"{block}.ssm_dt.bias")]
        if "_conv" in own:
            shape = (args.num_attention_heads * args.head_dim, 1, args.short_conv_kernel_size)
            return [Placement(f"{block}.ssm_conv1d_{own[0]}.weight", shape=shape, full_precision=True)]
        name = names.get(own.removesuffix(f".{leaf}"))
        if own == "g_proj.weight" and not args.is_linear[layer]:
            name = "attn_gate"
        return [Placement(f"{block}.{name}.{leaf}", ignores_lora=True)] if name else None

    return place


def _sizes(args: Any) -> dict[str, Any]:
    attention = {"head_count_kv": [0 if linear else 1 for linear in args.is_linear]}
    latent = {"key_length": args.kv_lora_rank + args.qk_rope_head_dim, "value_length": args.kv_lora_rank}
    return attention | latent | {"rope_dims": args.qk_rope_head_dim}


def _metadata(writer: Any, args: Any, config: dict[str, Any]) -> None:
    writer.add_ssm_conv_kernel(args.short_conv_kernel_size)
    writer.add_kda_head_dim(args.head_dim)
    writer.add_kv_lora_rank(args.kv_lora_rank)
    writer.add_key_length_mla(args.qk_nope_head_dim + args.qk_rope_head_dim)
    writer.add_value_length_mla(args.v_head_dim)


def _bailing_metadata(writer: Any, args: Any, config: dict[str, Any]) -> None:
    if args.q_lora_rank is not None:
        writer.add_q_lora_rank(args.q_lora_rank)
    writer.add_float32("bailingmoe3.kda.gate_lower_bound", args.kda_lower_bound)


def _kimi_arguments(args: Any) -> dict[str, Any]:
    linear = args.linear_attn_config
    return {
        "is_linear": [layer + 1 in linear["kda_layers"] for layer in range(args.num_hidden_layers)],
        "head_dim": linear["head_dim"],
        "short_conv_kernel_size": linear.get("short_conv_kernel_size", 4),
        "qk_nope_head_dim": args.qk_nope_head_dim or args.head_dim,
        "qk_rope_head_dim": args.qk_rope_head_dim or 0,
        "v_head_dim": args.v_head_dim or args.head_dim,
    }


def _bailing_arguments(args: Any) -> dict[str, Any]:
    period, layers = args.layer_group_size, args.num_hidden_layers
    linear = [(layer + 1) % period != 0 and layer < layers // period * period for layer in range(layers)]
    width = args.moe_shared_expert_intermediate_size * args.num_shared_experts
    return {"is_linear": linear, "norm_topk_prob": True, "shared_expert_intermediate_size": width}


def _kimi_problems(args: Any) -> Iterator[str]:
    if args.linear_attn_config["num_heads"] != args.num_attention_heads:
        yield "linear_attn_config has another num_heads than the model: llama.cpp has one number of heads"
    if args.n_group != 1:
        yield f"num_expert_group is {args.n_group}: llama.cpp's kimi-linear does not choose among groups of experts"
    if not args.num_shared_experts:
        yield "num_shared_experts is 0: llama.cpp's kimi-linear needs a shared expert"


KIMI_DELTA: dict[str, Architecture] = {
    "kimi_linear": Architecture(
        "kimi-linear",
        needs_output=True,
        ignores_scaling=True,
        biases=frozenset({"ssm_dt", "exp_probs_b"}),
        names={
            "num_dense_layers": "first_k_dense_replace",
            "num_experts_per_tok": "num_experts_per_token",
            "norm_topk_prob": "moe_renormalize",
            "n_group": "num_expert_group",
        },
        arguments=_kimi_arguments,
        sizes=lambda args: _sizes(args) | {"context_length": args.model_max_length},
        placements=_placements(
            "self_attn",
            "model.embed_tokens",
            {"f_a_proj": "ssm_f_a", "f_b_proj": "ssm_f_b", "g_a_proj": "ssm_g_a", "g_b_proj": "ssm_g_b"},
            negative_exp,
        ),
        extra_metadata=experts("sigmoid", _metadata),
        extra_checks=checks(_kimi_problems, always_normalized, experts_in_every_layer),
    ),
    "bailing_moe_v3": Architecture(
        "bailingmoe3",
        biases=frozenset({"ssm_dt", "exp_probs_b"}),
        names={"num_dense_layers": "first_k_dense_replace"},
        arguments=_bailing_arguments,
        sizes=_sizes,
        placements=_placements(
            "attention",
            "model.word_embeddings",
            {"f_proj": "ssm_f_a", "g_proj": "ssm_g_a", "dense": "attn_output"},
            np.exp,
        ),
        extra_metadata=experts("sigmoid", _metadata, _bailing_metadata),
    ),
}
