"""Transformers with dense MLPs in GGUF, one table row per model type."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from nalora_mlx.export.gguf.architecture import (
    ATTENTION,
    MLP,
    NORMS,
    QKV,
    Architecture,
    Placement,
    head_dim,
    interleave,
)

# --- metadata of single architectures ----------------------------------------------------------------


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


# --- tensors of single architectures -----------------------------------------------------------------


def _split_wqkv(args: Any, path: str) -> list[Placement] | None:
    """Split InternLM 2's `wqkv`, whose rows are [kv head, its queries + key + value, head_dim]."""
    stem, _, leaf = path.rpartition(".")
    if not stem.endswith(".wqkv"):
        return None
    heads, kv_heads, d = args.num_attention_heads, args.num_key_value_heads, head_dim(args)
    rows = np.arange((heads + 2 * kv_heads) * d).reshape(kv_heads, -1, d)
    q, k, v = rows[:, :-2].reshape(-1), rows[:, -2].reshape(-1), rows[:, -1].reshape(-1)
    if not args.rope_traditional:
        q, k = interleave(q, heads), interleave(k, kv_heads)
    layer = stem.removesuffix(".attention.wqkv")
    return [
        Placement(f"{layer}.self_attn.{name}_proj.{leaf}", part)
        for name, part in zip("qkv", (q, k, v), strict=True)
    ]


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


# --- the table ---------------------------------------------------------------------------------------

_LLAMA = Architecture(
    "llama",
    interleaved_rope=True,
    biases=ATTENTION | MLP,
    rope_scaling=frozenset({"linear", "yarn", "llama3"}),
    extra_checks=_full_attention,
)
_QWEN_SCALING = frozenset({"linear", "yarn"})

DENSE: dict[str, Architecture] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Architecture("qwen2", biases=QKV, rope_scaling=_QWEN_SCALING),
    "qwen3": Architecture("qwen3", rope_scaling=_QWEN_SCALING),
    "gemma": Architecture("gemma", gelu=True, norm_offset=1.0),
    "gemma2": Architecture(
        "gemma2", gelu=True, norm_offset=1.0, extra_metadata=_gemma2, extra_checks=_gemma_scale(46)
    ),
    "gemma3_text": Architecture(
        "gemma3",
        gelu=True,
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
        placements=_split_wqkv,
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
    "starcoder2": Architecture("starcoder2", gelu=True, layer_norm=True, biases=ATTENTION | MLP | NORMS),
}
