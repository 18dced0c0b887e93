"""Models with gated delta nets in GGUF, one table row per model type."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from nalora_mlx.export.gguf.architecture import Architecture, rope_dims
from nalora_mlx.export.gguf.families.routing import always_normalized, experts
from nalora_mlx.export.gguf.placement import Placement, layer_and_rest, negative_exp


def _delta_net_sizes(writer: Any, args: Any, config: dict[str, Any]) -> None:
    writer.add_ssm_conv_kernel(args.linear_conv_kernel_dim)
    writer.add_ssm_state_size(args.linear_key_head_dim)
    writer.add_ssm_inner_size(args.linear_value_head_dim * args.linear_num_value_heads)
    writer.add_ssm_time_step_rank(args.linear_num_value_heads)
    writer.add_ssm_group_count(args.linear_num_key_heads)
    writer.add_full_attention_interval(args.full_attention_interval)


def _qwen35_name(config: dict[str, Any]) -> str | None:
    return "qwen35moe" if config.get("text_config", config).get("num_experts") else None


def _qwen35_metadata(writer: Any, args: Any, config: dict[str, Any]) -> None:
    _delta_net_sizes(writer, args, config)
    # Positions of time, height and width are the same in a text, but each pair of dimensions needs one of them.
    pairs = rope_dims(args) // 2
    writer.add_rope_dimension_sections([(pairs + 2) // 3, (pairs + 1) // 3, pairs // 3, 0])
    if args.num_experts:
        experts()(writer, args, config)


def _problems(args: Any) -> Iterator[str]:
    if args.linear_key_head_dim != args.linear_value_head_dim:
        yield "linear_key_head_dim differs from linear_value_head_dim: llama.cpp has one size for both"
    if args.num_experts:
        yield from always_normalized(args)


def _tiled(heads: int, groups: int) -> np.ndarray:
    """Return the order of value heads in llama.cpp, whose head h uses key head h % groups instead of h // repeats."""
    return np.arange(heads).reshape(groups, -1).T.reshape(-1)


def _rows_of(heads: np.ndarray, size: int) -> np.ndarray:
    """Return the rows of heads of `size` rows each, int64 [heads * size]."""
    return (heads[:, None] * size + np.arange(size)).reshape(-1)


def _qwen35(args: Any, path: str) -> list[Placement] | None:
    layer, rest = layer_and_rest(path)
    block = f"blk.{layer}"
    heads, groups, size = args.linear_num_value_heads, args.linear_num_key_heads, args.linear_value_head_dim
    order = _tiled(heads, groups)
    values, keys = _rows_of(order, size), 2 * groups * args.linear_key_head_dim
    qkv = np.concatenate([np.arange(keys), keys + values])
    found = {
        "linear_attn.in_proj_qkv.weight": Placement(f"{block}.attn_qkv.weight", qkv),
        "linear_attn.in_proj_z.weight": Placement(f"{block}.attn_gate.weight", values),
        "linear_attn.in_proj_b.weight": Placement(f"{block}.ssm_beta.weight", order),
        "linear_attn.in_proj_a.weight": Placement(f"{block}.ssm_alpha.weight", order),
        "linear_attn.out_proj.weight": Placement(f"{block}.ssm_out.weight", columns=values),
        "linear_attn.dt_bias": Placement(f"{block}.ssm_dt.bias", order),
        "linear_attn.A_log": Placement(f"{block}.ssm_a", order, values=negative_exp),
        "linear_attn.conv1d.weight": Placement(
            f"{block}.ssm_conv1d.weight",
            qkv,
            shape=(len(qkv), args.linear_conv_kernel_dim),
            full_precision=True,
        ),
    }.get(rest)
    return [found] if found else _shared_gate(args, block, rest)


def _shared_gate(args: Any, block: str, rest: str) -> list[Placement] | None:
    if rest != "mlp.shared_expert_gate.weight":
        return None
    return [Placement(f"{block}.ffn_gate_inp_shexp.weight", shape=(args.hidden_size,))]


def _qwen3_next(args: Any, path: str) -> list[Placement] | None:
    layer, rest = layer_and_rest(path)
    block = f"blk.{layer}"
    keys, channels = args.linear_num_key_heads, 2 * args.linear_num_key_heads * args.linear_key_head_dim
    channels += args.linear_num_value_heads * args.linear_value_head_dim
    if rest == "linear_attn.in_proj_qkvz.weight":  # rows are [key head, its q + k + v + z]
        d, repeats = args.linear_key_head_dim, args.linear_num_value_heads // keys
        v = repeats * args.linear_value_head_dim
        rows = np.arange(keys * (2 * d + 2 * v)).reshape(keys, -1)
        q, k, v, z = (part.reshape(-1) for part in np.split(rows, [d, 2 * d, 2 * d + v], axis=1))
        return [
            Placement(f"{block}.attn_qkv.weight", np.concatenate([q, k, v])),
            Placement(f"{block}.attn_gate.weight", z),
        ]
    found = {
        "linear_attn.in_proj_ba.weight": Placement(f"{block}.ssm_ba.weight"),
        "linear_attn.dt_bias": Placement(f"{block}.ssm_dt.bias"),
        "linear_attn.A_log": Placement(f"{block}.ssm_a", values=negative_exp),
        "linear_attn.conv1d.weight": Placement(
            f"{block}.ssm_conv1d.weight", shape=(channels, args.linear_conv_kernel_dim), full_precision=True
        ),
    }.get(rest)
    return [found] if found else _shared_gate(args, block, rest)


_QWEN35 = Architecture(
    "qwen35",
    other_name=_qwen35_name,
    biases=frozenset({"ssm_dt"}),
    rope_scaling=frozenset({"linear", "yarn"}),
    placements=_qwen35,
    extra_metadata=_qwen35_metadata,
    extra_checks=_problems,
)

DELTA_NETS: dict[str, Architecture] = {
    "qwen3_5": _QWEN35,
    "qwen3_5_moe": _QWEN35,
    "qwen3_next": Architecture(
        "qwen3next",
        biases=frozenset({"ssm_dt"}),
        rope_scaling=frozenset({"linear", "yarn"}),
        placements=_qwen3_next,
        extra_metadata=experts("softmax", _delta_net_sizes),
        extra_checks=_problems,
    ),
}
