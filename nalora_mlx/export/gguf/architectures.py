"""Model types that can be exported to GGUF, one table row each.

tests/interop/test_gguf_architectures.py compares the logits of every row in mlx-lm and llama.cpp.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

QKV = frozenset({"attn_q", "attn_k", "attn_v"})
ATTENTION = QKV | {"attn_output"}
MLP = frozenset({"ffn_gate", "ffn_up", "ffn_down"})
NORMS = frozenset({"attn_norm", "ffn_norm", "output_norm"})


def _no_metadata(writer: Any, args: Any, config: dict[str, Any]) -> None:
    pass


def _no_problems(args: Any) -> Iterator[str]:
    return iter(())


@dataclass(frozen=True)
class Architecture:
    """How to write one mlx-lm model type as a GGUF architecture.

    RoPE rotates dimensions in pairs: either neighbours 2i and 2i + 1 ("interleaved", in mlx-lm "traditional"), or
    i and i + d/2.
    """

    name: str  # general.architecture
    interleaved_rope: bool = False  # in llama.cpp
    traditional_rope: bool = False  # in mlx-lm, unless the config has `rope_traditional`
    layer_norm: bool = False  # LayerNorm instead of RMSNorm: epsilon has another key
    norm_offset: float = 0.0  # what mlx-lm adds to norm weights at run time and llama.cpp does not
    grouped_qkv: bool = False  # one `wqkv` with rows [kv head, its queries + key + value, head_dim]
    needs_output: bool = False  # llama.cpp wants output.weight even if the embedding is tied
    biases: frozenset[str] = frozenset()  # tensors for which llama.cpp reads a bias
    rope_scaling: frozenset[str] = frozenset()  # scaling types that both programs compute alike
    ignores_scaling: bool = False  # mlx-lm's model does not read `rope_scaling`
    extra_metadata: Callable[[Any, Any, dict[str, Any]], None] = field(default=_no_metadata)
    extra_checks: Callable[[Any], Iterator[str]] = field(default=_no_problems)


# --- metadata of single architectures ----------------------------------------------------------------


def _mixtral(writer: Any, args: Any, config: dict[str, Any]) -> None:
    writer.add_expert_count(args.num_local_experts)
    writer.add_expert_used_count(args.num_experts_per_tok)


def _qwen3_moe(writer: Any, args: Any, config: dict[str, Any]) -> None:
    writer.add_expert_count(args.num_experts)
    writer.add_expert_used_count(args.num_experts_per_tok)
    writer.add_expert_feed_forward_length(args.moe_intermediate_size)


def _gemma2(writer: Any, args: Any, config: dict[str, Any]) -> None:
    writer.add_attn_logit_softcapping(args.attn_logit_softcapping)
    writer.add_final_logit_softcapping(args.final_logit_softcapping)
    # mlx-lm uses full attention in every layer. Both agree on prompts within the window.
    writer.add_sliding_window(config.get("sliding_window") or 4096)


def _gemma3(writer: Any, args: Any, config: dict[str, Any]) -> None:
    writer.add_sliding_window(args.sliding_window)
    writer.add_sliding_window_pattern(args.sliding_window_pattern)
    writer.add_rope_freq_base_swa(args.rope_local_base_freq)


def _phi3(writer: Any, args: Any, config: dict[str, Any]) -> None:
    writer.add_sliding_window(0)  # mlx-lm uses none; llama.cpp's default depends on its version


def _granite(writer: Any, args: Any, config: dict[str, Any]) -> None:
    writer.add_attention_scale(args.attention_multiplier)
    writer.add_embedding_scale(args.embedding_multiplier)
    writer.add_residual_scale(args.residual_multiplier)
    writer.add_logit_scale(args.logits_scaling)


def _cohere2(writer: Any, args: Any, config: dict[str, Any]) -> None:
    from gguf import RopeScalingType

    writer.add_logit_scale(args.logit_scale)
    writer.add_sliding_window(args.sliding_window)
    writer.add_sliding_window_pattern(args.sliding_window_pattern)
    writer.add_rope_scaling_type(RopeScalingType.NONE)


# --- configs of single architectures that llama.cpp would compute differently -----------------------


def _full_attention(args: Any) -> Iterator[str]:
    if "sliding_attention" in (args.layer_types or ()):
        yield "layer_types has sliding_attention: llama.cpp uses full attention for this architecture"


def _smollm3_layers(args: Any) -> Iterator[str]:
    yield from _full_attention(args)
    if list(args.no_rope_layers) != [int((i + 1) % 4 != 0) for i in range(args.num_hidden_layers)]:
        yield "no_rope_layers: llama.cpp skips RoPE in every fourth layer and no others"


def _gemma_scale(layers_of_27b: int) -> Callable[[Any], Iterator[str]]:
    def problems(args: Any) -> Iterator[str]:
        # The 27B models use another scale; llama.cpp recognizes them by their number of layers.
        large = args.num_hidden_layers == layers_of_27b
        expected = args.hidden_size // args.num_attention_heads if large else args.head_dim
        if args.query_pre_attn_scalar != expected:
            yield f"query_pre_attn_scalar is {args.query_pre_attn_scalar:g}: llama.cpp uses {expected}"

    return problems


def _all_experts(args: Any) -> Iterator[str]:
    if not args.norm_topk_prob:
        yield "norm_topk_prob is false: llama.cpp always normalizes the experts' weights"
    if args.decoder_sparse_step != 1 or args.mlp_only_layers:
        yield "decoder_sparse_step or mlp_only_layers gives dense layers: llama.cpp needs experts in every layer"


# --- the table ---------------------------------------------------------------------------------------

_LLAMA = Architecture(
    "llama",
    interleaved_rope=True,
    biases=ATTENTION | MLP,
    rope_scaling=frozenset({"linear", "yarn", "llama3"}),
    extra_checks=_full_attention,
)
_QWEN_SCALING = frozenset({"linear", "yarn"})

ARCHITECTURES: dict[str, Architecture] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": Architecture("llama", interleaved_rope=True, ignores_scaling=True, extra_metadata=_mixtral),
    "qwen2": Architecture("qwen2", biases=QKV, rope_scaling=_QWEN_SCALING),
    "qwen3": Architecture("qwen3", rope_scaling=_QWEN_SCALING),
    "qwen3_moe": Architecture(
        "qwen3moe", ignores_scaling=True, extra_metadata=_qwen3_moe, extra_checks=_all_experts
    ),
    "gemma": Architecture("gemma", norm_offset=1.0),
    "gemma2": Architecture("gemma2", norm_offset=1.0, extra_metadata=_gemma2, extra_checks=_gemma_scale(46)),
    "gemma3_text": Architecture(
        "gemma3",
        norm_offset=1.0,
        rope_scaling=frozenset({"linear"}),
        extra_metadata=_gemma3,
        extra_checks=_gemma_scale(62),
    ),
    "phi3": Architecture("phi3", rope_scaling=frozenset({"linear", "longrope"}), extra_metadata=_phi3),
    "smollm3": Architecture(
        "smollm3",
        interleaved_rope=True,
        rope_scaling=frozenset({"linear", "yarn"}),
        extra_checks=_smollm3_layers,
    ),
    "olmo2": Architecture("olmo2", needs_output=True, rope_scaling=frozenset({"linear", "yarn"})),
    "glm4": Architecture("glm4", interleaved_rope=True, traditional_rope=True, biases=QKV),
    "internlm2": Architecture(
        "internlm2",
        interleaved_rope=True,
        grouped_qkv=True,
        needs_output=True,
        rope_scaling=frozenset({"linear"}),
    ),
    "internlm3": Architecture(
        "llama", interleaved_rope=True, biases=ATTENTION | MLP, rope_scaling=frozenset({"linear"})
    ),
    "granite": Architecture(
        "granite",
        interleaved_rope=True,
        biases=ATTENTION | MLP,
        rope_scaling=frozenset({"linear", "yarn", "llama3"}),
        extra_metadata=_granite,
    ),
    "cohere2": Architecture(
        "cohere2", interleaved_rope=True, traditional_rope=True, layer_norm=True, extra_metadata=_cohere2
    ),
    "starcoder2": Architecture("starcoder2", layer_norm=True, biases=ATTENTION | MLP | NORMS),
}


# --- shared by all architectures ---------------------------------------------------------------------


def head_dim(args: Any) -> int:
    """Return the size of one attention head, as mlx-lm's model computes it."""
    return getattr(args, "head_dim", None) or args.hidden_size // args.num_attention_heads


def rope_dims(args: Any) -> int:
    """Return the number of dimensions of a head that RoPE rotates."""
    return int(head_dim(args) * getattr(args, "partial_rotary_factor", 1.0))


def _reorders_rope_rows(arch: Architecture, args: Any) -> bool:
    """Return whether q and k rows are reordered: mlx-lm pairs i with i + d/2, llama.cpp 2i with 2i + 1."""
    return arch.interleaved_rope and not getattr(args, "rope_traditional", arch.traditional_rope)


def scaling_type(args: Any) -> str:
    """Return the type of RoPE scaling in the config: `default`, `linear`, `yarn`, `llama3`, `longrope` ..."""
    scaling = getattr(args, "rope_scaling", None) or {}
    kind = scaling.get("type") or scaling.get("rope_type") or "default"
    return {"su": "longrope"}.get(kind, kind)


def config_problems(arch: Architecture, args: Any, config: dict[str, Any]) -> list[str]:
    """Return everything in the config that llama.cpp would compute differently, one line each."""
    found = list(arch.extra_checks(args))
    if not config.get("max_position_embeddings"):
        found.append("config.json has no max_position_embeddings: llama.cpp needs the context length")
    if not arch.interleaved_rope and getattr(args, "rope_traditional", False):
        found.append("rope_traditional is true: llama.cpp rotates halves for this architecture")
    if _reorders_rope_rows(arch, args) and rope_dims(args) != head_dim(args):
        found.append("partial_rotary_factor below 1 with rope_traditional false: llama.cpp rotates pairs")
    kind, scaling = scaling_type(args), getattr(args, "rope_scaling", None) or {}
    if arch.ignores_scaling or kind in ("default", "dynamic"):
        return found
    if kind not in arch.rope_scaling:
        known = ", ".join(sorted(arch.rope_scaling)) or "none"
        found.append(
            f"rope_scaling of type {kind}: llama.cpp's {arch.name} does not support it (only: {known})"
        )
    elif kind == "yarn" and (scaling.get("mscale", 1) != 1 or scaling.get("mscale_all_dim", 0) != 0):
        found.append("rope_scaling of type yarn with mscale or mscale_all_dim: llama.cpp reads neither here")
    return found


def config_notes(arch: Architecture, args: Any) -> list[str]:
    """Return what the user should know about the exported model, one line each."""
    kind = scaling_type(args)
    if arch.ignores_scaling and kind != "default":
        return [f"RoPE scaling ({kind}) is omitted: mlx-lm ignores it for this model type"]
    if kind == "dynamic":
        limit = args.max_position_embeddings
        return [f"GGUF has no dynamic RoPE scaling: the model is the same up to {limit} tokens"]
    if kind == "longrope":
        return ["the long RoPE factors are used at every length, as in mlx-lm"]
    if arch.name == "gemma2":
        return ["every second layer uses the sliding window in llama.cpp and full attention in mlx-lm"]
    return []


def write_metadata(writer: Any, arch: Architecture, args: Any, config: dict[str, Any]) -> None:
    """Write every key that llama.cpp reads for this architecture, with the values that mlx-lm's model uses."""
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(args.hidden_size)
    writer.add_block_count(args.num_hidden_layers)
    writer.add_feed_forward_length(args.intermediate_size)
    writer.add_head_count(args.num_attention_heads)
    writer.add_head_count_kv(args.num_key_value_heads)
    writer.add_key_length(head_dim(args))
    writer.add_value_length(head_dim(args))
    writer.add_vocab_size(args.vocab_size)
    if arch.layer_norm:
        writer.add_layer_norm_eps(getattr(args, "layer_norm_eps", None) or args.norm_epsilon)
    else:
        writer.add_layer_norm_rms_eps(args.rms_norm_eps)
    writer.add_rope_freq_base(args.rope_theta)
    writer.add_rope_dimension_count(rope_dims(args))
    if not arch.ignores_scaling:
        _write_scaling(writer, args)
    arch.extra_metadata(writer, args, config)


def _write_scaling(writer: Any, args: Any) -> None:
    from gguf import RopeScalingType

    kind, scaling = scaling_type(args), getattr(args, "rope_scaling", None) or {}
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(kind))
        writer.add_rope_scaling_factor(scaling["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(scaling.get("original_max_position_embeddings", 4096))
        writer.add_rope_scaling_yarn_beta_fast(scaling.get("beta_fast", 32))
        writer.add_rope_scaling_yarn_beta_slow(scaling.get("beta_slow", 1))
    if kind == "longrope":
        original = args.original_max_position_embeddings
        growth = args.max_position_embeddings / original
        scale = math.sqrt(1 + math.log(growth) / math.log(original)) if growth > 1 else 1.0
        writer.add_rope_scaling_type(RopeScalingType.LONGROPE)
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_attn_factors(scale)


def rope_factors(arch: Architecture, args: Any) -> dict[str, np.ndarray]:
    """Return tensors of factors by which llama.cpp divides its RoPE frequencies, float32 [rope_dims / 2]."""
    kind, scaling = scaling_type(args), getattr(args, "rope_scaling", None) or {}
    if arch.ignores_scaling:
        return {}
    if kind == "longrope":
        factors = np.broadcast_to(np.asarray(scaling["long_factor"], np.float32), (rope_dims(args) // 2,))
        return {"rope_factors_long.weight": factors, "rope_factors_short.weight": factors}
    if kind != "llama3":
        return {}
    factor, old = scaling["factor"], scaling.get("original_max_position_embeddings", 8192)
    low, high = scaling.get("low_freq_factor", 1.0), scaling.get("high_freq_factor", 4.0)
    dims = rope_dims(args)
    wavelength = 2 * np.pi * args.rope_theta ** (np.arange(0, dims, 2) / dims)  # [dims / 2]
    smooth = (old / wavelength - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    factors = np.where(wavelength > old / low, factor, np.where(wavelength < old / high, 1.0, between))
    return {"rope_freqs.weight": factors.astype(np.float32)}


def _interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """Reorder row indices [heads * d] from halves (i, i + d/2) to pairs (2i, 2i + 1) within each head."""
    return rows.reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)


def tensor_rows(arch: Architecture, args: Any, path: str) -> list[tuple[str, np.ndarray | None]]:
    """Return the tensors to write for the mlx-lm parameter at `path`, as (name to look up, rows).

    Rows are the parameter's row indices in the order to write, int64; None keeps all rows in place.
    """
    heads, kv_heads, d = args.num_attention_heads, args.num_key_value_heads, head_dim(args)
    path = path.replace("block_sparse_moe.switch_mlp", "mlp.experts").replace("switch_mlp", "experts")
    stem, _, leaf = path.rpartition(".")
    reorder = _reorders_rope_rows(arch, args)
    if arch.grouped_qkv and stem.endswith(".wqkv"):
        rows = np.arange((heads + 2 * kv_heads) * d).reshape(kv_heads, -1, d)
        q, k, v = rows[:, :-2].reshape(-1), rows[:, -2].reshape(-1), rows[:, -1].reshape(-1)
        if reorder:
            q, k = _interleave(q, heads), _interleave(k, kv_heads)
        layer = stem.removesuffix(".attention.wqkv")
        return [
            (f"{layer}.self_attn.{name}_proj.{leaf}", part)
            for name, part in zip("qkv", (q, k, v), strict=True)
        ]
    if reorder and stem.endswith(".q_proj"):
        return [(path, _interleave(np.arange(heads * d), heads))]
    if reorder and stem.endswith(".k_proj"):
        return [(path, _interleave(np.arange(kv_heads * d), kv_heads))]
    return [(path, None)]
