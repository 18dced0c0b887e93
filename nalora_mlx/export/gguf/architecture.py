"""How model types become GGUF architectures: the description that a table row gives, and what all rows share."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from nalora_mlx.core.notices import Note
from nalora_mlx.export.gguf.placement import Placement, Placements, interleave, layer_and_rest
from nalora_mlx.models.rope_config import SLIDING

# Functions of a table row. `args` is mlx-lm's ModelArgs with the usual names, `config` the content of config.json.
Metadata = Callable[[Any, Any, dict[str, Any]], None]  # (GGUFWriter, args, config): writes keys
Check = Callable[[Any], Iterator[str]]  # (args): yields problems or notes, one line each
# Names of GGUF for the tensors of a block.
QKV = frozenset({"attn_q", "attn_k", "attn_v"})
ATTENTION = QKV | {"attn_output"}
MLP = frozenset({"ffn_gate", "ffn_up", "ffn_down"})
NORMS = frozenset({"attn_norm", "ffn_norm", "output_norm"})


def _no_metadata(writer: Any, args: Any, config: dict[str, Any]) -> None:
    pass


def _no_problems(args: Any) -> Iterator[str]:
    return iter(())


def _no_sizes(args: Any) -> dict[str, Any]:
    return {}


def _no_placements(args: Any, path: str) -> list[Placement] | None:
    return None


def _no_name(config: dict[str, Any]) -> None:
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
    # Returns the name of the architecture for configs of this type that have another one.
    other_name: Callable[[dict[str, Any]], str | None] = field(default=_no_name)
    interleaved_rope: bool = False  # in llama.cpp
    traditional_rope: bool = False  # in mlx-lm, unless the config has `rope_traditional`
    layer_norm: bool = False  # LayerNorm instead of RMSNorm: epsilon has another key
    norm_offset: float = 0.0  # what mlx-lm adds to norm weights at run time and llama.cpp does not
    needs_output: bool = False  # llama.cpp wants output.weight even if the embedding is tied
    biases: frozenset[str] = frozenset()  # tensors for which llama.cpp reads a bias
    rope_scaling: frozenset[str] = frozenset()  # scaling types that both programs compute alike
    ignores_scaling: bool = False  # mlx-lm's model does not read `rope_scaling`
    # Usual name of an argument -> name in mlx-lm's ModelArgs for this model type.
    names: dict[str, str] = field(default_factory=dict)
    # Arguments that mlx-lm's ModelArgs lack or have in another form, by their usual names.
    arguments: Callable[[Any], dict[str, Any]] = field(default=_no_sizes)
    gelu: bool = False  # ggml looks GELU up in a float16 table, so logits agree to 1e-3 only
    # Sizes that differ from those in SIZES; None leaves the key out.
    sizes: Callable[[Any], dict[str, Any]] = field(default=_no_sizes)
    # Tensors of a parameter that need more than the fields above; None for the common treatment, [] for no tensor.
    placements: Placements = field(default=_no_placements)
    # Parameters that GGUF keeps as a list of one number per layer: path in the layer -> GGUFWriter's method.
    scalars: dict[str, str] = field(default_factory=dict)
    extra_metadata: Metadata = field(default=_no_metadata)
    extra_tensors: Callable[[Any], dict[str, np.ndarray]] = field(default=_no_tensors)  # GGUF name -> float32
    extra_checks: Check = field(default=_no_problems)
    # Differences that are too small to refuse the model.
    extra_notes: Check = field(default=_no_problems)


def arguments(arch: Architecture, args: Any) -> Any:
    """Return mlx-lm's ModelArgs with the usual names."""
    named = {usual: getattr(args, own) for usual, own in arch.names.items()}
    return SimpleNamespace(**vars(args) | named | arch.arguments(args))


def head_dim(args: Any) -> int:
    """Return the size of one attention head, as mlx-lm's model computes it."""
    return getattr(args, "head_dim", None) or args.hidden_size // args.num_attention_heads


def checks(*functions: Check) -> Check:
    """Return one check that yields the problems of several."""
    return lambda args: (problem for function in functions for problem in function(args))


def no_other_head_dim(args: Any) -> Iterator[str]:
    """Yield a problem if heads have another size than hidden_size / num_attention_heads."""
    if head_dim(args) * args.num_attention_heads != args.hidden_size:
        yield f"head_dim is {head_dim(args)}: llama.cpp needs hidden_size / num_attention_heads"


def is_sliding(args: Any) -> list[bool]:
    """Return which layers have sliding-window attention."""
    return [kind == SLIDING for kind in args.layer_types or ()]


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
    return {"su": "longrope", "deepseek_yarn": "yarn", "telechat3-yarn": "yarn"}.get(kind, kind)


def config_problems(arch: Architecture, args: Any, config: dict[str, Any]) -> list[str]:
    """Return everything in the config that llama.cpp would compute differently, one line each."""
    found = list(arch.extra_checks(args))
    if not config.get("max_position_embeddings") and not arch.sizes(args).get("context_length"):
        found.append("config.json has no max_position_embeddings: llama.cpp needs the context length")
    if not arch.interleaved_rope and getattr(args, "rope_traditional", False):
        found.append("rope_traditional is true: llama.cpp rotates halves for this architecture")
    if reorders_rope_rows(arch, args) and rope_dims(args) != head_dim(args):
        found.append("partial_rotary_factor below 1 with rope_traditional false: llama.cpp rotates pairs")
    kind = scaling_type(args)
    if arch.ignores_scaling or kind in ("default", "dynamic"):
        return found
    if kind not in arch.rope_scaling:
        known = ", ".join(sorted(arch.rope_scaling)) or "none"
        found.append(
            f"rope_scaling of type {kind}: llama.cpp's {arch.name} does not support it (only: {known})"
        )
    return found


def config_notes(arch: Architecture, args: Any) -> list[str]:
    """Return what the user should know about the exported model, one line each."""
    return [*arch.extra_notes(args), *_scaling_notes(arch, args)]


def _scaling_notes(arch: Architecture, args: Any) -> list[str]:
    kind = scaling_type(args)
    if arch.ignores_scaling and kind != "default":
        return [Note(f"RoPE scaling ({kind}) is omitted: mlx-lm ignores it for this model type")]
    if kind == "dynamic":
        limit = args.max_position_embeddings
        return [f"GGUF has no dynamic RoPE scaling: the model is the same up to {limit} tokens"]
    if kind == "longrope":
        return [Note("the long RoPE factors are used at every length, as in mlx-lm")]
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
        # llama.cpp scales queries and keys as for mscale = 1 and mscale_all_dim = 0.
        growth = 0.1 * math.log(max(scaling["factor"], 1.0))
        expected = (scaling.get("mscale", 1) * growth + 1) / (scaling.get("mscale_all_dim", 0) * growth + 1)
        writer.add_rope_scaling_attn_factors(expected / (growth + 1))
    if kind == "longrope":
        original = scaling.get("original_max_position_embeddings") or args.original_max_position_embeddings
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
    return {"rope_freqs.weight": llama3_factors(scaling, args.rope_theta, rope_dims(args))}


def llama3_factors(scaling: dict[str, Any], theta: float, dims: int) -> np.ndarray:
    """Return the factors of RoPE scaling of type llama3, float32 [dims / 2]."""
    factor, old = scaling["factor"], scaling.get("original_max_position_embeddings", 8192)
    low, high = scaling.get("low_freq_factor", 1.0), scaling.get("high_freq_factor", 4.0)
    wavelength = 2 * np.pi * theta ** (np.arange(0, dims, 2) / dims)  # [dims / 2]
    smooth = (old / wavelength - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    factors = np.where(wavelength > old / low, factor, np.where(wavelength < old / high, 1.0, between))
    return factors.astype(np.float32)


def place(arch: Architecture, args: Any, path: str) -> list[Placement]:
    """Return the tensors that are made from the parameter at `path`."""
    path = path.removeprefix("language_model.").replace("model.language_model.", "model.")
    if layer_and_rest(path)[1] in arch.scalars:
        return []
    found = arch.placements(args, path)
    if found is not None:
        return found
    reorder = reorders_rope_rows(arch, args)
    stem = path.rpartition(".")[0]
    path = path.replace("block_sparse_moe.switch_mlp", "mlp.experts").replace("switch_mlp", "experts")
    if reorder and stem.endswith(".q_proj"):
        heads = args.num_attention_heads
        return [Placement(path, interleave(np.arange(heads * head_dim(args)), heads))]
    if reorder and stem.endswith(".k_proj"):
        heads = args.num_key_value_heads
        return [Placement(path, interleave(np.arange(heads * head_dim(args)), heads))]
    if arch.norm_offset and path.endswith("norm.weight"):
        return [Placement(path, values=lambda array: array + np.float32(arch.norm_offset))]
    return [Placement(path)]
