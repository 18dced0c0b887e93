"""Transformers in GGUF with unusual attention, activations or layers, one table row per model type."""

import dataclasses
import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np

from nalora_mlx.export.gguf.architecture import Architecture, head_dim, is_sliding
from nalora_mlx.export.gguf.placement import Placement, interleave, layer_and_rest, renamed
from nalora_mlx.models.rope_config import FULL, SLIDING

# --- MiniCPM 3 ---------------------------------------------------------------------------------------


def _minicpm3(args: Any) -> dict[str, Any]:
    scaling = args.rope_scaling or {}
    defaults = {"long_factor": 1.0, "original_max_position_embeddings": 4096}
    size = args.qk_nope_head_dim + args.qk_rope_head_dim
    return {
        "head_dim": size,
        "partial_rotary_factor": Fraction(args.qk_rope_head_dim, size),
        "rope_scaling": defaults | scaling | {"type": "longrope"},  # mlx-lm scales whatever the type
    }


def _minicpm3_sizes(args: Any) -> dict[str, Any]:
    return {"value_length": args.hidden_size // args.num_attention_heads}


def _minicpm3_metadata(writer: Any, args: Any, config: dict[str, Any]) -> None:
    writer.add_q_lora_rank(args.q_lora_rank)
    writer.add_kv_lora_rank(args.kv_lora_rank)


def _minicpm3_tensors(args: Any, path: str) -> list[Placement] | None:
    latent = re.search(r"\.(q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj)\.weight$", path)
    return [Placement(path, ignores_lora=True)] if latent else None


def _minicpm3_checks(args: Any) -> Iterator[str]:
    fixed = {
        "scale_emb": 12,
        "scale_depth": 1.4,
        "dim_model_base": 256,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-5,  # of every norm in llama.cpp, but not of those of the latents in mlx-lm
        "num_key_value_heads": args.num_attention_heads,
    }
    for key, expected in fixed.items():
        if getattr(args, key) != expected:
            yield f"{key} is {getattr(args, key)}: llama.cpp computes with {expected}"


# --- OpenELM -----------------------------------------------------------------------------------------

_openelm_names = renamed(
    {
        "transformer.token_embeddings": "token_embd",
        "transformer.norm": "output_norm",
        "attn_norm": "attn_norm",
        "ffn_norm": "ffn_norm",
        "attn.qkv_proj": "attn_qkv",
        "attn.q_norm": "attn_q_norm",
        "attn.k_norm": "attn_k_norm",
        "attn.out_proj": "attn_output",
        "ffn.proj_2": "ffn_down",
    }
)


def _openelm_sizes(args: Any) -> dict[str, Any]:
    from mlx_lm.models.openelm import make_divisible

    sizes = [make_divisible(m * args.model_dim, divisor=args.ffn_dim_divisor) for m in args.ffn_multipliers]
    return {"feed_forward_length": [int(size) for size in sizes]}


def _openelm_tensors(args: Any, path: str) -> list[Placement] | None:
    layer, rest = layer_and_rest(path)
    if rest != "ffn.proj_1.weight":
        return _openelm_names(args, path)
    gate, up = np.arange(2 * _openelm_sizes(args)["feed_forward_length"][layer]).reshape(2, -1)
    return [Placement(f"blk.{layer}.ffn_gate.weight", gate), Placement(f"blk.{layer}.ffn_up.weight", up)]


def _openelm_checks(args: Any) -> Iterator[str]:
    for key in ("normalize_qk_projections", "share_input_output_layers"):
        if not getattr(args, key):
            yield f"{key} is false: llama.cpp computes as if it were true"


# --- PLaMo 3 -----------------------------------------------------------------------------------------

_plamo3_names = renamed(
    {
        "pre_mixer_norm": "attn_norm",
        "post_mixer_norm.weight": "post_attention_norm",  # llama.cpp reads the later norms without ".weight"
        "pre_mlp_norm": "ffn_norm",
        "post_mlp_norm.weight": "post_ffw_norm",
        "mixer.qkv_proj": "attn_qkv",
        "mixer.q_norm": "attn_q_norm",
        "mixer.k_norm": "attn_k_norm",
        "mixer.o_proj": "attn_output",
        "mlp.gate_up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
)
# What mlx-lm adds to the weights of norms, if not 1.
_PLAMO3_OFFSETS = {"post_mixer_norm": 1 / 5, "post_mlp_norm": 1 / 5**1.5}


def _plamo3_tensors(args: Any, path: str) -> list[Placement] | None:
    found = _plamo3_names(args, path)
    norm = path.split(".")[-2]
    if found is None or not norm.endswith("norm"):
        return found
    offset = np.float32(_PLAMO3_OFFSETS.get(norm, 1.0))
    return [dataclasses.replace(placement, values=lambda array: array + offset) for placement in found]


def _plamo3(writer: Any, args: Any, config: dict[str, Any]) -> None:
    writer.add_sliding_window(args.window_size + 1)
    writer.add_sliding_window_pattern(args.sliding_window_pattern)
    writer.add_rope_freq_base_swa(args.rope_local_theta)


# --- nemotron-nas, DeciLM ----------------------------------------------------------------------------


def _deci_kv_heads(args: Any) -> list[int]:
    groups = [block.attention.n_heads_in_group for block in args.block_configs]
    return [args.num_attention_heads // group if group else 0 for group in groups]


def _deci_sizes(args: Any) -> dict[str, Any]:
    from importlib import import_module

    size_of = import_module("mlx_lm.models.nemotron-nas")._ffn_mult_to_intermediate_size
    blocks = args.block_configs
    return {
        "head_count": [0 if block.attention.no_op else args.num_attention_heads for block in blocks],
        "head_count_kv": _deci_kv_heads(args),
        "feed_forward_length": [
            0 if block.ffn.no_op else size_of(block.ffn.ffn_mult, args.hidden_size) for block in blocks
        ],
    }


def _deci_tensors(args: Any, path: str) -> list[Placement] | None:
    layer, rest = layer_and_rest(path)
    if rest == "self_attn.linear.weight":
        return [Placement(f"blk.{layer}.attn_output.weight")]
    if rest == "self_attn.k_proj.weight":
        kv_heads = _deci_kv_heads(args)[layer]
        return [Placement(path, interleave(np.arange(kv_heads * head_dim(args)), kv_heads))]
    return None


def _deci_checks(args: Any) -> Iterator[str]:
    if args.hidden_act != "silu":
        yield f"hidden_act is {args.hidden_act}: llama.cpp computes with silu"
    if any(block.ffn.replace_with_linear for block in args.block_configs):
        yield "block_configs replaces an MLP by a linear layer, which llama.cpp cannot"
    if any(block.ffn.no_op and not block.attention.no_op for block in args.block_configs):
        yield "block_configs has attention without an MLP, which llama.cpp skips"


# --- Nanbeige, Spark ---------------------------------------------------------------------------------


def _nanbeige(writer: Any, args: Any, config: dict[str, Any]) -> None:
    loops = len(args.loop_loss_weights) + 1 if args.loop_loss_weights else args.num_loops
    writer.add_uint32("nanbeige.num_loops", loops)
    writer.add_bool("nanbeige.skip_loop_final_norm", args.skip_loop_final_norm)


def _spark_rope(args: Any, kind: str) -> tuple[float, int]:
    rope = args.rope_parameters.get(kind, {})
    dims = int(args.head_dim * rope.get("partial_rotary_factor", 1.0))
    return float(rope.get("rope_theta", 10000.0)), dims


def _spark_sizes(args: Any) -> dict[str, Any]:
    theta, dims = _spark_rope(args, FULL)
    return {"rope_theta": theta, "rope_dims": dims}


def _spark(writer: Any, args: Any, config: dict[str, Any]) -> None:
    theta, dims = _spark_rope(args, SLIDING)
    writer.add_rope_freq_base_swa(theta)
    writer.add_rope_dimension_count_swa(dims)
    writer.add_sliding_window(args.sliding_window)
    writer.add_sliding_window_pattern(is_sliding(args))


# --- the table ---------------------------------------------------------------------------------------

UNUSUAL: dict[str, Architecture] = {
    "apertus": Architecture(
        "apertus",
        rope_scaling=frozenset({"linear", "yarn", "llama3"}),
        scalars={
            "mlp.act_fn.alpha_p": "add_xielu_alpha_p",
            "mlp.act_fn.alpha_n": "add_xielu_alpha_n",
            "mlp.act_fn.beta": "add_xielu_beta",
            "mlp.act_fn.eps": "add_xielu_eps",
        },
    ),
    "minicpm3": Architecture(
        "minicpm3",
        rope_scaling=frozenset({"longrope"}),
        arguments=_minicpm3,
        sizes=_minicpm3_sizes,
        placements=_minicpm3_tensors,
        extra_metadata=_minicpm3_metadata,
        extra_checks=_minicpm3_checks,
    ),
    "nanbeige": Architecture(
        "nanbeige",
        interleaved_rope=True,
        rope_scaling=frozenset({"linear", "yarn"}),
        extra_metadata=_nanbeige,
    ),
    "nemotron-nas": Architecture(
        "deci",
        interleaved_rope=True,
        rope_scaling=frozenset({"linear", "yarn", "llama3"}),
        sizes=_deci_sizes,
        placements=_deci_tensors,
        extra_checks=_deci_checks,
    ),
    "openelm": Architecture(
        "openelm",
        names={
            "hidden_size": "model_dim",
            "num_hidden_layers": "num_transformer_layers",
            "num_attention_heads": "num_query_heads",
            "num_key_value_heads": "num_kv_heads",
            "rope_theta": "rope_freq_constant",
        },
        sizes=_openelm_sizes,
        placements=_openelm_tensors,
        extra_checks=_openelm_checks,
    ),
    "plamo3": Architecture("plamo3", placements=_plamo3_tensors, extra_metadata=_plamo3),
    "spark2_5": Architecture(
        "spark2_5",
        gelu=True,
        sizes=_spark_sizes,
        placements=renamed(
            {
                "model.embedding": "token_embd",
                "self_attn.q_k_v_proj": "attn_qkv",
                "self_attn.g_proj": "attn_gate",
                "self_attn.out_proj": "attn_output",
            }
        ),
        extra_metadata=_spark,
    ),
}
