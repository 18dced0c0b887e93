"""Gemma in GGUF, one table row per model type."""

import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from nalora_mlx.export.gguf.architecture import Architecture, Check, is_sliding
from nalora_mlx.export.gguf.placement import Placement, layer_and_rest, renamed
from nalora_mlx.models.rope_config import FULL, SLIDING

# --- Gemma 2 and 3 -----------------------------------------------------------------------------------


def _gemma2(writer: Any, args: Any, config: dict[str, Any]) -> None:
    writer.add_attn_logit_softcapping(args.attn_logit_softcapping)
    writer.add_final_logit_softcapping(args.final_logit_softcapping)
    # mlx-lm uses full attention in every layer. Both agree on prompts within the window.
    writer.add_sliding_window(config.get("sliding_window") or 4096)


def _gemma3(writer: Any, args: Any, config: dict[str, Any]) -> None:
    writer.add_sliding_window(args.sliding_window)
    writer.add_sliding_window_pattern(args.sliding_window_pattern)
    writer.add_rope_freq_base_swa(args.rope_local_base_freq)


def _gemma_scale(layers_of_27b: int) -> Check:
    def problems(args: Any) -> Iterator[str]:
        # The 27B models use another scale; llama.cpp recognizes them by their number of layers.
        large = args.num_hidden_layers == layers_of_27b
        expected = args.hidden_size // args.num_attention_heads if large else args.head_dim
        if args.query_pre_attn_scalar != expected:
            yield f"query_pre_attn_scalar is {args.query_pre_attn_scalar:g}: llama.cpp uses {expected}"

    return problems


# --- Gemma 3n ----------------------------------------------------------------------------------------

_gemma3n_names = renamed(
    {
        "altup.correct_output_scale": "altup_correct_scale.weight",
        "laurel.linear_left": "laurel_l",
        "laurel.linear_right": "laurel_r",
        "laurel.post_laurel_norm": "laurel_post_norm",
    }
)


def _gemma3n(writer: Any, args: Any, config: dict[str, Any]) -> None:
    writer.add_altup_active_idx(args.altup_active_idx)
    writer.add_altup_num_inputs(args.altup_num_inputs)
    writer.add_embedding_length_per_layer_input(args.hidden_size_per_layer_input)
    writer.add_shared_kv_layers(args.num_kv_shared_layers)
    # Standard deviations above the mean at which an activation is kept; llama.cpp has the constant for 0.95.
    writer.add_activation_sparsity_scale([1.6448536 if share else -np.inf for share in _sparsity(args)])
    writer.add_sliding_window(args.sliding_window)
    writer.add_sliding_window_pattern(is_sliding(args))
    writer.add_rope_freq_base_swa(args.rope_local_base_freq)


def _sparsity(args: Any) -> list[float]:
    return args.activation_sparsity_pattern or [0.0] * args.num_hidden_layers


def _gemma3n_tensors(args: Any, path: str) -> list[Placement] | None:
    if path == "model.embed_tokens_per_layer.weight":
        return [Placement(path, ignores_lora=True)]
    if not re.search(r"altup|laurel|per_layer_model_projection", path):
        return None
    # llama.cpp's quantizer leaves these small tensors as they are.
    stem, _, number = path.removesuffix(".weight").rpartition(".")
    stacked = {"altup_projections": "altup_proj", "altup_unembed_projections": "altup_unembd_proj"}
    if (whole := stacked.get(stem.removeprefix("model."))) is not None:
        return [Placement(f"{whole}.weight", part=int(number), full_precision=True)]
    values, limit = None, args.altup_coef_clip
    if limit is not None and path.endswith((".prediction_coefs.weight", ".correction_coefs.weight")):
        values = partial(np.clip, a_min=-limit, a_max=limit)  # as mlx-lm does when it runs
    ignores_lora = path.endswith((".modality_router.weight", ".per_layer_model_projection.weight"))
    found = _gemma3n_names(args, path)
    name = found[0].name if found else path
    return [Placement(name, values=values, full_precision=True, ignores_lora=ignores_lora)]


def _gemma3n_checks(args: Any) -> Iterator[str]:
    sizes = args.intermediate_size if isinstance(args.intermediate_size, list) else [args.intermediate_size]
    layers = range(args.num_hidden_layers)
    fixed = {
        "altup_num_inputs": (args.altup_num_inputs, 4),
        "altup_active_idx": (args.altup_active_idx, 0),
        "altup_correct_scale": (args.altup_correct_scale, True),
        "laurel_rank": (args.laurel_rank, 64),
        "hidden_size_per_layer_input": (args.hidden_size_per_layer_input, 256),
        "final_logit_softcapping": (args.final_logit_softcapping, 30),
        "vocab_size_per_layer_input": (args.vocab_size_per_layer_input, args.vocab_size),
        "num_hidden_layers - num_kv_shared_layers": (args.num_hidden_layers - args.num_kv_shared_layers, 20),
        "activation_sparsity_pattern": (_sparsity(args), [0.95 if i < 10 else 0.0 for i in layers]),
        "intermediate_size": (sizes, [sizes[0]] * len(sizes)),
        "layer_types": (args.layer_types, [SLIDING if (i + 1) % 5 else FULL for i in layers]),
    }
    for key, (found, expected) in fixed.items():
        if found != expected:
            yield f"{key} is {found}: llama.cpp computes with {expected}"


# --- Gemma 4 -----------------------------------------------------------------------------------------

_gemma4_names = renamed(
    {
        "layer_scalar": "layer_output_scale.weight",
        "router.proj": "ffn_gate_inp",
        "router.scale": "ffn_gate_inp.scale",
        "router.per_expert_scale": "ffn_down_exps.scale",
        "experts.switch_glu.gate_proj": "ffn_gate_exps",
        "experts.switch_glu.up_proj": "ffn_up_exps",
    }
)


def _gemma4_tensors(args: Any, path: str) -> list[Placement] | None:
    if path in ("model.per_layer_model_projection.weight", "model.embed_tokens_per_layer.weight"):
        # llama.cpp's quantizer leaves the projection as it is.
        return [Placement(path, full_precision="projection" in path, ignores_lora=True)]
    layer, rest = layer_and_rest(path)
    if rest == "experts.switch_glu.down_proj.weight":
        scale = f"model.layers.{layer}.router.per_expert_scale"
        return [Placement(f"blk.{layer}.ffn_down_exps.weight", expert_scale=scale)]
    return _gemma4_names(args, path)


def _gemma4_sizes(args: Any) -> dict[str, Any]:
    head_dim = args.global_head_dim or args.head_dim
    first_shared = args.num_hidden_layers - args.num_kv_shared_layers
    global_kv_heads = args.num_key_value_heads
    if args.attention_k_eq_v and args.num_global_key_value_heads is not None:
        global_kv_heads = args.num_global_key_value_heads
    return {
        "feed_forward_length": [
            args.intermediate_size * (2 if args.use_double_wide_mlp and i >= first_shared > 0 else 1)
            for i in range(args.num_hidden_layers)
        ],
        "head_count_kv": [
            args.num_key_value_heads if kind == SLIDING else global_kv_heads for kind in args.layer_types
        ],
        "key_length": head_dim,
        "value_length": head_dim,
        "rope_dims": head_dim,
        "rope_theta": _rope(args, FULL).get("rope_theta", 10000.0),
    }


def _rope(args: Any, kind: str) -> dict[str, Any]:
    rope: dict[str, Any] = args.rope_parameters.get(kind, {})
    return rope


def _rope_type(args: Any, kind: str) -> str:
    rope = _rope(args, kind)
    return rope.get("type") or rope.get("rope_type", "default")


def _gemma4(writer: Any, args: Any, config: dict[str, Any]) -> None:
    writer.add_key_length_swa(args.head_dim)
    writer.add_value_length_swa(args.head_dim)
    writer.add_rope_dimension_count_swa(args.head_dim)
    writer.add_rope_freq_base_swa(_rope(args, SLIDING).get("rope_theta", 10000.0))
    writer.add_sliding_window(args.sliding_window)
    writer.add_sliding_window_pattern(is_sliding(args))
    writer.add_shared_kv_layers(args.num_kv_shared_layers)
    writer.add_embedding_length_per_layer_input(args.hidden_size_per_layer_input or 0)
    writer.add_final_logit_softcapping(args.final_logit_softcapping or 0.0)  # llama.cpp's default is 30
    if args.enable_moe_block:
        writer.add_expert_count(args.num_experts)
        writer.add_expert_used_count(args.top_k_experts)
        writer.add_expert_feed_forward_length(args.moe_intermediate_size)


def _gemma4_factors(args: Any) -> dict[str, np.ndarray]:
    """Return the factors that stop the rotation of the dimensions that full attention does not rotate."""
    if FULL not in args.layer_types:
        return {}
    rope, dims = _rope(args, FULL), args.global_head_dim or args.head_dim
    factors = np.ones(dims // 2, np.float32)
    if _rope_type(args, FULL) == "proportional":
        factors *= rope.get("factor", 1.0)
        factors[int(dims * rope.get("partial_rotary_factor", 1.0)) // 2 :] = 1e30
    return {"rope_freqs.weight": factors}


def _gemma4_checks(args: Any) -> Iterator[str]:
    if (kind := _rope_type(args, SLIDING)) != "default":
        yield f"rope_parameters of sliding_attention has type {kind}: llama.cpp does not scale it"
    if (kind := _rope_type(args, FULL)) not in ("default", "proportional"):
        yield f"rope_parameters of full_attention has type {kind}: llama.cpp has default and proportional"
    if args.hidden_size_per_layer_input and args.vocab_size_per_layer_input != args.vocab_size:
        yield "vocab_size_per_layer_input is not vocab_size: llama.cpp needs embeddings of every token"
    own = args.layer_types[: args.num_hidden_layers - args.num_kv_shared_layers]
    shared = args.layer_types[len(own) :]
    # A layer that shares keys and values takes them from the last layer of its kind, in llama.cpp from the last
    # (full) or last but one (sliding).
    if (SLIDING in shared and own[-2:-1] != [SLIDING]) or (FULL in shared and own[-1:] != [FULL]):
        yield "layer_types: llama.cpp shares keys and values of one sliding and one full layer in this order"


# --- the table ---------------------------------------------------------------------------------------

_GEMMA3 = Architecture(
    "gemma3",
    gelu=True,
    norm_offset=1.0,
    rope_scaling=frozenset({"linear"}),
    extra_metadata=_gemma3,
    extra_checks=_gemma_scale(62),
)
_GEMMA4 = Architecture(
    "gemma4",
    gelu=True,
    sizes=_gemma4_sizes,
    placements=_gemma4_tensors,
    extra_metadata=_gemma4,
    extra_tensors=_gemma4_factors,
    extra_checks=_gemma4_checks,
)

GEMMA: dict[str, Architecture] = {
    "gemma": Architecture("gemma", gelu=True, norm_offset=1.0),
    "gemma2": Architecture(
        "gemma2", gelu=True, norm_offset=1.0, extra_metadata=_gemma2, extra_checks=_gemma_scale(46)
    ),
    "gemma3": _GEMMA3,
    "gemma3_text": _GEMMA3,
    "gemma3n": Architecture(
        "gemma3n",
        gelu=True,
        ignores_scaling=True,
        placements=_gemma3n_tensors,
        extra_metadata=_gemma3n,
        extra_checks=_gemma3n_checks,
    ),
    "gemma4": _GEMMA4,
    "gemma4_text": _GEMMA4,
    "gemma4_unified": _GEMMA4,
}
