"""How model types become GGUF architectures: the description that a table row gives, and what all rows share."""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

QKV = frozenset({"attn_q", "attn_k", "attn_v"})
ATTENTION = QKV | {"attn_output"}
MLP = frozenset({"ffn_gate", "ffn_up", "ffn_down"})
NORMS = frozenset({"attn_norm", "ffn_norm", "output_norm"})


@dataclass(frozen=True)
class Placement:
    """A tensor of the file made from one parameter of the model: choose rows and columns, then change values."""

    name: str  # one that gguf-py's map knows, or GGUF's own
    rows: np.ndarray | None = None  # indices in the order to write, int64 [rows]; None keeps all in place
    columns: np.ndarray | None = None  # likewise, of the last axis
    values: Callable[[np.ndarray], np.ndarray] | None = None  # elementwise, float32 to float32
    shape: tuple[int, ...] | None = (
        None  # of the tensor in the file, if not that of the chosen rows and columns
    )
    full_precision: bool = False  # whether llama.cpp needs float32

    @property
    def is_selection(self) -> bool:
        """Whether the tensor has the parameter's own values, so that a LoRA of the parameter is one of the tensor."""
        return self.values is None and self.shape is None


def _no_metadata(writer: Any, args: Any, config: dict[str, Any]) -> None:
    pass


def _no_problems(args: Any) -> Iterator[str]:
    return iter(())


def _no_sizes(args: Any) -> dict[str, Any]:
    return {}


def _no_placements(args: Any, path: str) -> list[Placement] | None:
    return None


def _no_tensors(args: Any) -> dict[str, np.ndarray]:
    return {}


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
    needs_output: bool = False  # llama.cpp wants output.weight even if the embedding is tied
    biases: frozenset[str] = frozenset()  # tensors for which llama.cpp reads a bias
    rope_scaling: frozenset[str] = frozenset()  # scaling types that both programs compute alike
    ignores_scaling: bool = False  # mlx-lm's model does not read `rope_scaling`
    gelu: bool = False  # ggml looks GELU up in a float16 table, so logits agree to 1e-3 only
    # Sizes that differ from those in SIZES; None leaves the key out.
    sizes: Callable[[Any], dict[str, Any]] = field(default=_no_sizes)
    # Tensors of a parameter that need more than the fields above; None for the common treatment, [] for no tensor.
    placements: Callable[[Any, str], list[Placement] | None] = field(default=_no_placements)
    extra_metadata: Callable[[Any, Any, dict[str, Any]], None] = field(default=_no_metadata)
    extra_tensors: Callable[[Any], dict[str, np.ndarray]] = field(default=_no_tensors)  # GGUF name -> float32
    extra_checks: Callable[[Any], Iterator[str]] = field(default=_no_problems)


def head_dim(args: Any) -> int:
    """Return the size of one attention head, as mlx-lm's model computes it."""
    return getattr(args, "head_dim", None) or args.hidden_size // args.num_attention_heads


def rope_dims(args: Any) -> int:
    """Return the number of dimensions of a head that RoPE rotates."""
    return int(head_dim(args) * getattr(args, "partial_rotary_factor", 1.0))


def reorders_rope_rows(arch: Architecture, args: Any) -> bool:
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
    if reorders_rope_rows(arch, args) and rope_dims(args) != head_dim(args):
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


# Sizes that every architecture has: name -> (method of GGUFWriter, value for a model).
SIZES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "context_length": ("add_context_length", lambda args: args.max_position_embeddings),
    "embedding_length": ("add_embedding_length", lambda args: args.hidden_size),
    "block_count": ("add_block_count", lambda args: args.num_hidden_layers),
    "feed_forward_length": ("add_feed_forward_length", lambda args: args.intermediate_size),
    "head_count": ("add_head_count", lambda args: args.num_attention_heads),
    "head_count_kv": ("add_head_count_kv", lambda args: args.num_key_value_heads),
    "key_length": ("add_key_length", lambda args: head_dim(args)),
    "value_length": ("add_value_length", lambda args: head_dim(args)),
    "vocab_size": ("add_vocab_size", lambda args: args.vocab_size),
    "layer_norm_eps": (
        "add_layer_norm_eps",
        lambda args: getattr(args, "layer_norm_eps", None) or args.norm_epsilon,
    ),
    "rms_norm_eps": ("add_layer_norm_rms_eps", lambda args: args.rms_norm_eps),
    "rope_theta": ("add_rope_freq_base", lambda args: args.rope_theta),
    "rope_dims": ("add_rope_dimension_count", lambda args: rope_dims(args)),
}


def write_metadata(writer: Any, arch: Architecture, args: Any, config: dict[str, Any]) -> None:
    """Write every key that llama.cpp reads for this architecture, with the values that mlx-lm's model uses."""
    own = {
        "context_length": config.get("max_position_embeddings"),
        ("rms_norm_eps" if arch.layer_norm else "layer_norm_eps"): None,
        **arch.sizes(args),
    }
    for name, (method, value_of) in SIZES.items():
        value = own[name] if name in own else value_of(args)
        if value is not None:
            getattr(writer, method)(value)
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


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """Reorder row indices [heads * d] from halves (i, i + d/2) to pairs (2i, 2i + 1) within each head."""
    return rows.reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)


def place(arch: Architecture, args: Any, path: str) -> list[Placement]:
    """Return the tensors that are made from the parameter at `path`."""
    path = path.removeprefix("language_model.")
    found = arch.placements(args, path)
    if found is not None:
        return found
    heads, kv_heads, d = args.num_attention_heads, args.num_key_value_heads, head_dim(args)
    reorder = reorders_rope_rows(arch, args)
    stem = path.rpartition(".")[0]
    path = path.replace("block_sparse_moe.switch_mlp", "mlp.experts").replace("switch_mlp", "experts")
    if reorder and stem.endswith(".q_proj"):
        return [Placement(path, interleave(np.arange(heads * d), heads))]
    if reorder and stem.endswith(".k_proj"):
        return [Placement(path, interleave(np.arange(kv_heads * d), kv_heads))]
    if arch.norm_offset and re.search("norm$", stem):
        return [Placement(path, values=lambda array: array + np.float32(arch.norm_offset))]
    return [Placement(path)]
