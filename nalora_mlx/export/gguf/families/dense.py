"""Transformers with dense MLPs and RMSNorm in GGUF, one table row per model type."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from nalora_mlx.export.gguf.architecture import (
    ATTENTION,
    MLP,
    QKV,
    Architecture,
    Check,
    checks,
    head_dim,
    is_sliding,
    no_other_head_dim,
    scaling_type,
)
from nalora_mlx.export.gguf.placement import Placement, interleave, layer_and_rest, renamed
from nalora_mlx.models.rope_config import SLIDING

# --- arguments and sizes -----------------------------------------------------------------------------


def _in_rope_parameters(args: Any) -> dict[str, Any]:
    return {"rope_scaling": args.rope_parameters, "rope_theta": args.rope_parameters["rope_theta"]}


def _hunyuan_theta(args: Any) -> dict[str, Any]:
    """Return the base of RoPE as it is with alpha, the only part of the scaling that mlx-lm reads."""
    alpha, dims = (args.rope_scaling or {}).get("alpha", 1.0), head_dim(args)
    return {"rope_theta": args.rope_theta * alpha ** (dims / (dims - 2)), "rope_scaling": None}


def _split_head_dim(args: Any) -> dict[str, Any]:
    return {"head_dim": args.hidden_size // args.num_attention_heads}


def _qwen(args: Any) -> dict[str, Any]:
    return {"rms_norm_eps": args.layer_norm_epsilon, "rope_theta": 10000.0}


def _lille(args: Any) -> dict[str, Any]:
    return {"intermediate_size": 256 * round(int(8 * args.n_embd / 3) / 256)}


def _plamo(args: Any) -> dict[str, Any]:
    return {"num_key_value_heads": -(-args.num_attention_heads // args.n_shared_head)}


# --- metadata ----------------------------------------------------------------------------------------


def _phi3(writer: Any, args: Any, config: dict[str, Any]) -> None:
    writer.add_sliding_window(0)  # mlx-lm uses none; llama.cpp's default depends on its version


def granite_multipliers(writer: Any, args: Any, config: dict[str, Any]) -> None:
    """Write the factors of Granite models."""
    writer.add_attention_scale(args.attention_multiplier)
    writer.add_embedding_scale(args.embedding_multiplier)
    writer.add_residual_scale(args.residual_multiplier)
    writer.add_logit_scale(args.logits_scaling)


def _minicpm(writer: Any, args: Any, config: dict[str, Any]) -> None:
    writer.add_embedding_scale(args.scale_emb)
    writer.add_residual_scale(args.scale_depth / args.num_hidden_layers**0.5)
    writer.add_logit_scale(1.0 if args.tie_word_embeddings else args.hidden_size / args.dim_model_base)


def _mistral3(writer: Any, args: Any, config: dict[str, Any]) -> None:
    rope = args.rope_parameters
    writer.add_attn_temperature_scale(rope["llama_4_scaling_beta"])
    if scaling_type(args) != "yarn":  # for which it is written anyway
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def _window_of_layer_types(writer: Any, args: Any, config: dict[str, Any]) -> None:
    writer.add_sliding_window(args.sliding_window)
    writer.add_sliding_window_pattern(is_sliding(args))


def _exaone4(writer: Any, args: Any, config: dict[str, Any]) -> None:
    if args.sliding_window_pattern:
        writer.add_sliding_window(args.sliding_window)
        writer.add_sliding_window_pattern(len(args.sliding_window_pattern))


def _sections(writer: Any, args: Any, config: dict[str, Any]) -> None:
    writer.add_rope_dimension_sections([*_mrope_section(args), 0, 0, 0][:4])


def _mrope_section(args: Any) -> list[int]:
    """Return how many pairs of dimensions rotate with each of a token's three positions."""
    half = head_dim(args) // 2
    return (args.rope_scaling or {}).get("mrope_section") or [half - 2 * (half // 3), half // 3, half // 3]


# --- tensors -----------------------------------------------------------------------------------------


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


def _helium_head(args: Any, path: str) -> list[Placement] | None:
    # mlx-lm keeps a head that it does not use.
    return [] if path == "lm_head.weight" and args.tie_word_embeddings else None


_lille_names = renamed(
    {
        "transformer.tok_embeddings": "token_embd",
        "transformer.norm": "output_norm",
        "attention.norm": "attn_norm",
        "attention.out_proj": "attn_output",
        "feed_forward.norm": "ffn_norm",
        "feed_forward.gate_proj": "ffn_gate",
        "feed_forward.up_proj": "ffn_up",
        "feed_forward.down_proj": "ffn_down",
    }
)


def _lille_tensors(args: Any, path: str) -> list[Placement] | None:
    layer, rest = layer_and_rest(path)
    if rest != "attention.qkv_proj.weight":
        return _lille_names(args, path)
    width, kv_width = args.n_embd, args.n_embd // args.n_head * args.n_kv_heads
    q, k, v = np.split(np.arange(width + 2 * kv_width), [width, width + kv_width])
    return [
        Placement(f"blk.{layer}.attn_{name}.weight", rows) for name, rows in (("q", q), ("k", k), ("v", v))
    ]


def _plamo_heads(args: Any, path: str) -> list[Placement] | None:
    """Reorder heads: in mlx-lm, head i reads the keys of head i modulo their number, in llama.cpp neighbours share."""
    d, kv_heads = head_dim(args), args.num_key_value_heads
    rows = np.arange(args.num_attention_heads * d).reshape(-1, kv_heads, d).swapaxes(0, 1).reshape(-1)
    if path.endswith(".q_proj.weight"):
        return [Placement(path, rows=rows)]
    return [Placement(path, columns=rows)] if path.endswith(".o_proj.weight") else None


# --- configs that llama.cpp would compute differently -----------------------------------------------


def _full_attention(args: Any) -> Iterator[str]:
    if SLIDING in (args.layer_types or ()):
        yield "layer_types has sliding_attention: llama.cpp uses full attention for this architecture"


def _smollm3_layers(args: Any) -> Iterator[str]:
    yield from _full_attention(args)
    if list(args.no_rope_layers) != [int((i + 1) % 4 != 0) for i in range(args.num_hidden_layers)]:
        yield "no_rope_layers: llama.cpp skips RoPE in every fourth layer and no others"


def _exaone4_layers(args: Any) -> Iterator[str]:
    if args.sliding_window_pattern != ("LLLG" if args.num_hidden_layers == 64 else None):
        yield (
            "sliding_window_pattern: llama.cpp uses sliding windows in models with 64 layers, three of four (LLLG), "
            "and full attention in others"
        )


def _all_sections(args: Any) -> Iterator[str]:
    if sum(_mrope_section(args)) != head_dim(args) // 2:
        yield "mrope_section does not cover head_dim / 2, as llama.cpp needs"


def _needs(key: str, expected: Any, meaning: str) -> Check:
    def problems(args: Any) -> Iterator[str]:
        if (found := getattr(args, key)) != expected:
            yield f"{key} is {found}: llama.cpp {meaning}"

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

# Without images, the three positions of a token are equal, so ordinary RoPE gives the same result. llama.cpp's qwen2vl
# does not read the norms' epsilon.
_QWEN2_VL = Architecture("qwen2", biases=QKV, rope_scaling=frozenset({"mrope"}))

DENSE: dict[str, Architecture] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "xverse": _LLAMA,
    "llava": _LLAMA,
    "mistral3": _LLAMA,
    "pixtral": _LLAMA,
    "iquestcoder": _LLAMA,
    "telechat3": Architecture(
        "llama",
        interleaved_rope=True,
        biases=ATTENTION | MLP,
        rope_scaling=frozenset({"linear", "yarn", "llama3"}),
    ),
    "helium": Architecture(
        "llama",
        interleaved_rope=True,
        traditional_rope=True,
        biases=ATTENTION | MLP,
        arguments=_split_head_dim,
        placements=_helium_head,
    ),
    "lille-130m": Architecture(
        "llama",
        names={
            "hidden_size": "n_embd",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "num_key_value_heads": "n_kv_heads",
            "rms_norm_eps": "layer_norm_eps",
        },
        arguments=_lille,
        sizes=lambda args: {"context_length": args.block_size},
        placements=_lille_tensors,
    ),
    "ministral3": Architecture(
        "mistral3",
        interleaved_rope=True,
        rope_scaling=frozenset({"yarn"}),
        arguments=_in_rope_parameters,
        extra_metadata=_mistral3,
        extra_checks=_full_attention,
    ),
    "qwen": Architecture("qwen", biases=frozenset({"attn_qkv"}), arguments=_qwen),
    "qwen2": Architecture("qwen2", biases=QKV, rope_scaling=_QWEN_SCALING),
    "mimo": Architecture("qwen2", biases=QKV, rope_scaling=_QWEN_SCALING),
    "qwen3": Architecture("qwen3", rope_scaling=_QWEN_SCALING),
    "qwen2_vl": _QWEN2_VL,
    "qwen2_5_vl": _QWEN2_VL,
    "qwen3_vl": Architecture(
        "qwen3vl", rope_scaling=frozenset({"mrope"}), extra_metadata=_sections, extra_checks=_all_sections
    ),
    "phi3": Architecture("phi3", rope_scaling=frozenset({"linear", "longrope"}), extra_metadata=_phi3),
    "smollm3": Architecture(
        "smollm3",
        interleaved_rope=True,
        rope_scaling=frozenset({"linear", "yarn"}),
        extra_checks=_smollm3_layers,
    ),
    "olmo2": Architecture(
        "olmo2",
        needs_output=True,
        rope_scaling=frozenset({"linear", "yarn"}),
        extra_checks=no_other_head_dim,
    ),
    "olmo3": Architecture(
        "olmo2",
        needs_output=True,
        rope_scaling=frozenset({"linear", "yarn"}),
        extra_metadata=_window_of_layer_types,
        extra_checks=no_other_head_dim,
    ),
    "glm": Architecture(
        "chatglm", interleaved_rope=True, traditional_rope=True, biases=QKV, extra_checks=no_other_head_dim
    ),
    "glm4": Architecture("glm4", interleaved_rope=True, biases=QKV),
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
        extra_metadata=granite_multipliers,
    ),
    "minicpm": Architecture(
        "minicpm",
        interleaved_rope=True,
        rope_scaling=frozenset({"linear", "yarn", "longrope"}),
        extra_metadata=_minicpm,
    ),
    "exaone": Architecture(
        "exaone",
        names={"num_hidden_layers": "num_layers", "rms_norm_eps": "layer_norm_epsilon"},
        rope_scaling=frozenset({"linear", "yarn", "llama3"}),
    ),
    "exaone4": Architecture(
        "exaone4",
        rope_scaling=frozenset({"linear", "yarn", "llama3"}),
        extra_metadata=_exaone4,
        extra_checks=checks(_exaone4_layers, no_other_head_dim),
    ),
    "hunyuan_v1_dense": Architecture(
        "hunyuan-dense",
        arguments=_hunyuan_theta,
        extra_checks=_needs("use_qk_norm", True, "always normalizes queries and keys"),
    ),
    "seed_oss": Architecture("seed_oss", biases=QKV, rope_scaling=frozenset({"linear", "yarn"})),
    "ernie4_5": Architecture("ernie4_5", interleaved_rope=True, traditional_rope=True, ignores_scaling=True),
    "plamo": Architecture("plamo", arguments=_plamo, placements=_plamo_heads),
}
