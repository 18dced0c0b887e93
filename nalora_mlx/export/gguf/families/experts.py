"""Transformers with experts in GGUF, one table row per model type."""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from nalora_mlx.export.gguf.architecture import ATTENTION, QKV, Architecture, checks, head_dim, rope_dims
from nalora_mlx.export.gguf.families.dense import granite_multipliers
from nalora_mlx.export.gguf.families.latent import LATENT
from nalora_mlx.export.gguf.families.muse import MUSE
from nalora_mlx.export.gguf.families.routing import (
    DEEPSEEK,
    always_normalized,
    experts,
    experts_in_every_layer,
    has_qk_norm,
    has_shared_experts,
    never_normalized,
)
from nalora_mlx.export.gguf.families.varied_experts import VARIED_EXPERTS
from nalora_mlx.export.gguf.families.window_experts import WINDOW_EXPERTS
from nalora_mlx.export.gguf.placement import Placement, interleave, layer_and_rest, renamed

# --- arguments and metadata of single architectures --------------------------------------------------


def _bailing(writer: Any, args: Any, config: dict[str, Any]) -> None:
    experts(args.score_function, normalizes_one=False)(writer, args, config)
    writer.add_leading_dense_block_count(args.first_k_dense_replace)
    if args.moe_shared_expert_intermediate_size:
        writer.add_expert_shared_feed_forward_length(args.moe_shared_expert_intermediate_size)


def _ernie_arguments(args: Any) -> dict[str, Any]:
    return {"moe_intermediate_size": args.moe_intermediate_size or args.intermediate_size}


def _ernie(writer: Any, args: Any, config: dict[str, Any]) -> None:
    writer.add_interleave_moe_layer_step(1)
    if args.num_shared_experts:
        writer.add_expert_shared_feed_forward_length(args.moe_intermediate_size * args.num_shared_experts)


def _dbrx_arguments(args: Any) -> dict[str, Any]:
    return {
        "num_key_value_heads": args.attn_config["kv_n_heads"],
        "rope_theta": args.attn_config["rope_theta"],
        "intermediate_size": args.ffn_config["ffn_hidden_size"],
        "num_experts": args.ffn_config["moe_num_experts"],
        "num_experts_per_tok": args.ffn_config["moe_top_k"],
        "layer_norm_eps": 1e-5,
    }


def _dbrx(writer: Any, args: Any, config: dict[str, Any]) -> None:
    writer.add_clamp_kqv(args.attn_config["clip_qkv"])


# --- tensors of single architectures -----------------------------------------------------------------


_bailing_names = renamed(
    {
        "attention.query_key_value": "attn_qkv",
        "attention.dense": "attn_output",
        "attention.query_layernorm": "attn_q_norm",
        "attention.key_layernorm": "attn_k_norm",
        "mlp.gate.gate_proj": "ffn_gate_inp",
        "mlp.gate.expert_bias": "exp_probs_b.bias",
    }
)


def _bailing_tensors(args: Any, path: str) -> list[Placement] | None:
    found = _bailing_names(args, path)
    if args.use_qk_norm or not path.endswith("attention.query_key_value.weight"):
        return found
    heads, kv_heads, d = args.num_attention_heads, args.num_key_value_heads, head_dim(args)
    q, k, v = np.split(np.arange((heads + 2 * kv_heads) * d), [heads * d, (heads + kv_heads) * d])
    rows = np.concatenate([interleave(q, heads), interleave(k, kv_heads), v])
    return [dataclasses.replace(placement, rows=rows) for placement in found or []]


_DBRX_EXPERTS = {"w1": "ffn_gate_exps", "v1": "ffn_up_exps", "w2": "ffn_down_exps"}
_dbrx_names = renamed(
    {
        "transformer.wte": "token_embd",
        "transformer.norm_f": "output_norm",
        "norm_attn_norm.norm_1": "attn_norm",
        "norm_attn_norm.norm_2": "attn_output_norm",
        "norm_attn_norm.attn.Wqkv": "attn_qkv",
        "norm_attn_norm.attn.out_proj": "attn_output",
        "ffn.router.layer": "ffn_gate_inp",
    }
)


def _dbrx_tensors(args: Any, path: str) -> list[Placement] | None:
    """Stack the experts, each of which has matrices of its own in mlx-lm."""
    layer, rest = layer_and_rest(path)
    match = re.fullmatch(r"ffn\.experts\.(\d+)\.(\w+)\.weight", rest)
    if match is None:
        return _dbrx_names(args, path)
    expert, name = match.groups()
    return [Placement(f"blk.{layer}.{_DBRX_EXPERTS[name]}.weight", part=int(expert))]


# --- configs of single architectures that llama.cpp would compute differently -----------------------


def _no_dense_layers(args: Any) -> Iterator[str]:
    if args.decoder_sparse_step != 1 or args.mlp_only_layers:
        yield "decoder_sparse_step or mlp_only_layers gives dense layers: llama.cpp needs experts in every layer"


def _ernie_layers(args: Any) -> Iterator[str]:
    if args.moe_gate_act != "softmax":
        yield f"moe_gate_act is {args.moe_gate_act}: llama.cpp uses softmax"
    if args.moe_layer_interval != 1:
        yield f"moe_layer_interval is {args.moe_layer_interval}: llama.cpp needs experts in every layer"
    if not isinstance(args.moe_layer_start_index, int):
        yield "moe_layer_start_index is a list: llama.cpp needs one number"
    if args.moe_layer_end_index not in (None, args.num_hidden_layers - 1):
        yield f"moe_layer_end_index is {args.moe_layer_end_index}: llama.cpp has experts up to the last layer"


def _bailing_1(args: Any) -> Iterator[str]:
    if args.use_qk_norm:
        return
    if args.score_function != "softmax" or args.moe_router_enable_expert_bias:
        yield "score_function or moe_router_enable_expert_bias: llama.cpp's bailingmoe has softmax without bias"
    if args.first_k_dense_replace:
        yield f"first_k_dense_replace is {args.first_k_dense_replace}: llama.cpp's bailingmoe has no dense layers"
    if (args.rotary_dim or rope_dims(args)) != head_dim(args):
        yield "rotary_dim or partial_rotary_factor: llama.cpp's bailingmoe rotates whole heads"
    if args.moe_shared_expert_intermediate_size not in (None, args.moe_intermediate_size):
        yield "moe_shared_expert_intermediate_size: llama.cpp's bailingmoe has experts of one size"


def _equal_heads(args: Any) -> Iterator[str]:
    if args.num_key_value_heads != args.num_attention_heads:
        yield "num_key_value_heads differs from num_attention_heads: llama.cpp needs one key head per query head"


# --- the table ---------------------------------------------------------------------------------------

_LOCAL = {"num_experts": "num_local_experts"}
_SCALING = frozenset({"linear", "yarn"})
_BIAS = frozenset({"exp_probs_b"})
_SCORE_BIAS = {"mlp.gate.e_score_correction_bias": "exp_probs_b.bias"}

_QWEN3_MOE = Architecture(
    "qwen3moe",
    ignores_scaling=True,
    extra_metadata=experts(),
    extra_checks=checks(always_normalized, _no_dense_layers),
)
_MINIMAX = Architecture(
    "minimax-m2",
    names=_LOCAL | {"moe_intermediate_size": "intermediate_size"},
    needs_output=True,
    biases=_BIAS,
    ignores_scaling=True,
    sizes=lambda args: {"rope_dims": args.rotary_dim},
    placements=renamed({"block_sparse_moe.e_score_correction_bias": "exp_probs_b.bias"}),
    extra_metadata=experts("sigmoid"),
    extra_checks=has_qk_norm,
)
_GLM4_MOE = Architecture(
    "glm4moe",
    names=DEEPSEEK,
    biases=QKV | _BIAS,
    ignores_scaling=True,
    placements=renamed(_SCORE_BIAS),
    extra_metadata=experts("sigmoid", normalizes_one=False),
)
_OTHERS: dict[str, Architecture] = {
    "mixtral": Architecture(
        "llama", names=_LOCAL, interleaved_rope=True, ignores_scaling=True, extra_metadata=experts()
    ),
    "qwen3_moe": _QWEN3_MOE,
    "qwen3_vl_moe": _QWEN3_MOE,  # without images its positions are those of qwen3_moe
    "qwen2_moe": Architecture(
        "qwen2moe",
        biases=QKV,
        ignores_scaling=True,
        extra_metadata=experts(),
    ),
    "glm4_moe": _GLM4_MOE,
    "solar_open": _GLM4_MOE,
    "olmoe": Architecture(
        "olmoe",
        needs_output=True,
        rope_scaling=_SCALING,
        extra_metadata=experts(),
        extra_checks=checks(never_normalized, _equal_heads),
    ),
    "granitemoe": Architecture(
        "granitemoe",
        names=_LOCAL,
        interleaved_rope=True,
        biases=ATTENTION,
        rope_scaling=_SCALING | {"llama3"},
        extra_metadata=experts("softmax", granite_multipliers),
    ),
    "ernie4_5_moe": Architecture(
        "ernie4_5-moe",
        names={
            "num_experts": "moe_num_experts",
            "num_experts_per_tok": "moe_k",
            "num_shared_experts": "moe_num_shared_experts",
            "num_dense_layers": "moe_layer_start_index",
        },
        arguments=_ernie_arguments,
        ignores_scaling=True,
        extra_metadata=experts("softmax", _ernie),
        extra_checks=_ernie_layers,
    ),
    "minimax": _MINIMAX,
    "minimax_m2": _MINIMAX,
    "dots1": Architecture(
        "dots1",
        names=DEEPSEEK,
        needs_output=True,
        biases=_BIAS,
        rope_scaling=_SCALING,
        placements=renamed(_SCORE_BIAS),
        extra_metadata=experts("sigmoid", normalizes_one=False),
        extra_checks=checks(has_shared_experts, _equal_heads),
    ),
    "bailing_moe": Architecture(
        "bailingmoe2",
        other_name=lambda config: None if config.get("use_qk_norm") else "bailingmoe",
        needs_output=True,
        biases=_BIAS,
        rope_scaling=_SCALING,
        sizes=lambda args: {"rope_dims": args.rotary_dim} if args.rotary_dim else {},
        placements=_bailing_tensors,
        extra_metadata=_bailing,
        extra_checks=checks(has_shared_experts, _bailing_1),
    ),
    "deepseek": Architecture(
        "deepseek",
        names=DEEPSEEK,
        interleaved_rope=True,
        rope_scaling=frozenset({"linear"}),
        extra_metadata=experts(),
        extra_checks=checks(has_shared_experts, experts_in_every_layer),
    ),
    "dbrx": Architecture(
        "dbrx",
        names={
            "hidden_size": "d_model",
            "num_hidden_layers": "n_layers",
            "num_attention_heads": "n_heads",
        },
        arguments=_dbrx_arguments,
        layer_norm=True,
        sizes=lambda args: {"context_length": 32768},  # as of the one model
        placements=_dbrx_tensors,
        extra_metadata=experts("softmax", _dbrx),
    ),
}

EXPERTS = _OTHERS | WINDOW_EXPERTS | VARIED_EXPERTS | LATENT | MUSE

# Why other model types with experts cannot be exported.
_NO_ARCHITECTURE = "llama.cpp has no such architecture"
_PHIXTRAL = f"{_NO_ARCHITECTURE}: the experts are MLPs without a gate"
_DEEPSEEK_V41 = f"{_NO_ARCHITECTURE}: it has DeepSeek V4, which chooses keys in another way"
UNSUPPORTED_EXPERTS = {
    "Klear": f"{_NO_ARCHITECTURE}: a layer of its own weighs shared and other experts",
    "deepseek_v41": _DEEPSEEK_V41,
    "deepseek_v41_text": _DEEPSEEK_V41,
    "hunyuan": "llama.cpp normalizes the weights of the chosen experts, as the original does, and mlx-lm does not",
    "longcat_flash": f"{_NO_ARCHITECTURE}: some experts return their input",
    "longcat_flash_ngram": f"{_NO_ARCHITECTURE}: some experts return their input",
    "muse_spark": _NO_ARCHITECTURE,
    "phi-msft": _PHIXTRAL,
    "phimoe": "mlx-lm weighs the experts by SparseMixer, as the original does, and llama.cpp by softmax",
    "phixtral": _PHIXTRAL,
}
