"""Recurrent and hybrid models in GGUF, one table row per model type."""

import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from nalora_mlx.export.gguf.architecture import Architecture
from nalora_mlx.export.gguf.families.delta_nets import DELTA_NETS
from nalora_mlx.export.gguf.families.kimi_delta import KIMI_DELTA
from nalora_mlx.export.gguf.families.mamba_hybrids import MAMBA_HYBRIDS
from nalora_mlx.export.gguf.families.routing import always_normalized, experts
from nalora_mlx.export.gguf.families.state_spaces import STATE_SPACES
from nalora_mlx.export.gguf.placement import Placement, layer_and_rest, renamed


def _kv_heads(args: Any) -> list[int]:
    """Return the number of key-value heads of each layer: 0 where a convolution takes the place of attention."""
    attention = set(args.full_attn_idxs)
    return [args.num_key_value_heads * (layer in attention) for layer in range(args.num_hidden_layers)]


def _lfm2_mlp_size(args: Any) -> int:
    """Return the width of the MLPs, as mlx-lm's model computes it."""
    size: int = args.block_ff_dim
    if args.block_auto_adjust_ff_dim:
        size = int(2 * size / 3)
        if args.block_ffn_dim_multiplier is not None:
            size = int(args.block_ffn_dim_multiplier * size)
        size = args.block_multiple_of * -(-size // args.block_multiple_of)
    return size


def _lfm2_sizes(args: Any) -> dict[str, Any]:
    return {
        "feed_forward_length": _lfm2_mlp_size(args),
        "head_count_kv": _kv_heads(args),
        "rms_norm_eps": args.norm_eps,
    }


def _lfm2_metadata(writer: Any, args: Any, config: dict[str, Any]) -> None:
    writer.add_shortconv_l_cache(args.conv_L_cache)


def _lfm2_placements(args: Any, path: str) -> list[Placement] | None:
    layer, rest = layer_and_rest(path)
    if rest == "conv.conv.weight":
        shape = (args.hidden_size, args.conv_L_cache)
        return [Placement(f"blk.{layer}.shortconv.conv.weight", shape=shape, full_precision=True)]
    return None


def _lfm2_moe_sizes(args: Any) -> dict[str, Any]:
    return {"head_count_kv": _kv_heads(args), "rms_norm_eps": args.norm_eps}


def _lfm2_moe_placements(args: Any, path: str) -> list[Placement] | None:
    layer, rest = layer_and_rest(path)
    if rest == "feed_forward.expert_bias":
        return [Placement(f"blk.{layer}.exp_probs_b.bias")]
    return _lfm2_placements(args, path)


def _lfm2_moe_tensors(args: Any) -> dict[str, np.ndarray]:
    """Return zeros for the biases that llama.cpp needs and the model lacks."""
    if args.use_expert_bias:
        return {}
    layers = range(args.num_dense_layers, args.num_hidden_layers)
    return {f"blk.{layer}.exp_probs_b.bias": np.zeros(args.num_experts, np.float32) for layer in layers}


def _lfm2_moe_problems(args: Any) -> Iterator[str]:
    yield from always_normalized(args)
    if args.routed_scaling_factor != 1:
        yield "routed_scaling_factor is not 1: llama.cpp's lfm2moe does not scale the experts' outputs"


# --- RWKV --------------------------------------------------------------------------------------------

_rwkv7_names = renamed(
    {
        "model.embeddings": "token_embd",
        "attn_norm": "attn_norm",
        "ffn_norm": "attn_norm_2",
        "attn.r_proj": "time_mix_receptance",
        "attn.k_proj": "time_mix_key",
        "attn.v_proj": "time_mix_value",
        "attn.o_proj": "time_mix_output",
        "ffn.key": "channel_mix_key",
        "ffn.value": "channel_mix_value",
    }
)


def _rwkv7_sizes(args: Any) -> dict[str, Any]:
    unused = dict.fromkeys(("head_count_kv", "key_length", "value_length", "rope_theta", "rope_dims"))
    # A state has no context length.
    return unused | {"head_count": 0, "layer_norm_eps": args.norm_eps, "context_length": 1 << 20}


def _rwkv7_metadata(writer: Any, args: Any, config: dict[str, Any]) -> None:
    writer.add_wkv_head_size(args.head_dim)
    writer.add_decay_lora_rank(args.decay_low_rank_dim)
    writer.add_iclr_lora_rank(args.a_low_rank_dim)
    writer.add_value_residual_mix_lora_rank(args.v_low_rank_dim)
    writer.add_gate_lora_rank(args.gate_low_rank_dim)


def _rwkv7_placements(args: Any, path: str) -> list[Placement] | None:
    layer, rest = layer_and_rest(path)
    block, (stem, _, leaf), size = f"blk.{layer}", rest.rpartition("."), args.hidden_size
    if found := _rwkv7_names(args, path):
        return found
    if stem == "pre_norm":  # of the first layer
        return [Placement(f"token_embd_norm.{leaf}")]
    if low_rank := re.fullmatch(r"attn\.(\w)_lora\.lora\.([02])\.(weight|bias)", rest):
        name, part, leaf = low_rank.groups()
        number = 0 if leaf == "bias" else 1 + int(part) // 2
        name = f"{block}.time_mix_{name}{number}.weight"
        return [Placement(name, full_precision=True, ignores_lora=True)]
    if rest == "ffn.x_k":
        return [Placement(f"{block}.channel_mix_lerp_k.weight", shape=(1, 1, size), full_precision=True)]
    if stem == "attn" and leaf.startswith("x_"):
        part = "rwkvag".index(leaf[-1])
        name = f"{block}.time_mix_lerp_fused.weight"
        return [Placement(name, shape=(1, 1, size), part=part, full_precision=True)]
    if stem == "attn":  # k_k, k_a, r_k
        return [Placement(f"{block}.time_mix_{leaf}.weight", shape=(size,))]
    if stem == "attn.g_norm":
        return [Placement(f"{block}.time_mix_ln.{leaf}", shape=(size,))]
    return None


def _rwkv7_tensors(args: Any) -> dict[str, np.ndarray]:
    """Return tensors of the first layer that llama.cpp needs and does not use."""
    size, rank = args.hidden_size, args.a_low_rank_dim
    shapes = {"v0": (size,), "v1": (rank, size), "v2": (size, rank)}
    return {f"blk.0.time_mix_{name}.weight": np.zeros(shape, np.float32) for name, shape in shapes.items()}


def _rwkv7_problems(args: Any) -> Iterator[str]:
    if args.head_dim % 32:
        yield f"head_dim is {args.head_dim}: llama.cpp computes RWKV only with multiples of 32"


_LFM2 = Architecture(
    "lfm2",
    ignores_scaling=True,
    sizes=_lfm2_sizes,
    placements=_lfm2_placements,
    extra_metadata=_lfm2_metadata,
)

RECURRENT: dict[str, Architecture] = (
    DELTA_NETS
    | KIMI_DELTA
    | STATE_SPACES
    | MAMBA_HYBRIDS
    | {
        "lfm2": _LFM2,
        "lfm2-vl": _LFM2,
        "lfm2_moe": Architecture(
            "lfm2moe",
            ignores_scaling=True,
            biases=frozenset({"exp_probs_b"}),
            sizes=_lfm2_moe_sizes,
            placements=_lfm2_moe_placements,
            extra_metadata=experts("sigmoid", _lfm2_metadata),
            extra_tensors=_lfm2_moe_tensors,
            extra_checks=_lfm2_moe_problems,
        ),
        "rwkv7": Architecture(
            "rwkv7",
            layer_norm=True,
            needs_output=True,
            ignores_scaling=True,
            biases=frozenset({"attn_norm", "attn_norm_2", "output_norm", "token_embd_norm", "time_mix_ln"}),
            sizes=_rwkv7_sizes,
            placements=_rwkv7_placements,
            extra_metadata=_rwkv7_metadata,
            extra_tensors=_rwkv7_tensors,
            extra_checks=_rwkv7_problems,
        ),
    }
)

# Why the other recurrent models of mlx-lm cannot be exported.
UNSUPPORTED_RECURRENT: dict[str, str] = {
    "bailing_hybrid": "llama.cpp has no such architecture: its Bailing models lack lightning attention",
    "bailing_moe_linear": "llama.cpp has no such architecture: its Bailing models lack lightning attention",
    "kimi_k3": "not written yet: llama.cpp has Kimi K3, whose layers attend to the outputs of earlier ones",
    "olmo_hybrid": "llama.cpp has no such architecture: its OLMo models lack gated delta nets",
    "plamo2": "its tokenizer is a program of its own, without a tokenizer.json or tokenizer.model to convert",
    "prism_hadamard_qwen35": "llama.cpp does not rotate activations, as these packed 2-bit weights need",
    "recurrent_gemma": "llama.cpp has no such architecture",
}
