"""What all mixtures of experts share in GGUF: the metadata of the routing, tensor names, and checks of configs."""

from collections.abc import Iterator
from typing import Any

from nalora_mlx.export.gguf.architecture import Check, Metadata
from nalora_mlx.models.rope_config import FULL, SLIDING

# Usual names of the settings -> DeepSeek's.
DEEPSEEK = {
    "num_experts": "n_routed_experts",
    "num_shared_experts": "n_shared_experts",
    "num_dense_layers": "first_k_dense_replace",
}
# Usual name of a setting that some models have -> method of GGUFWriter.
_SETTINGS = {
    "num_shared_experts": "add_expert_shared_count",
    "num_dense_layers": "add_leading_dense_block_count",
    "moe_intermediate_size": "add_expert_feed_forward_length",
    "shared_expert_intermediate_size": "add_expert_shared_feed_forward_length",
    "routed_scaling_factor": "add_expert_weights_scale",
}

# Names inside a layer that many models share, for architectures that gguf-py does not know.
USUAL_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.switch_mlp.gate_proj": "ffn_gate_exps",
    "mlp.switch_mlp.up_proj": "ffn_up_exps",
    "mlp.switch_mlp.down_proj": "ffn_down_exps",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
}


def experts(scoring: str = "softmax", *more: Metadata, normalizes_one: bool = True) -> Metadata:
    """Return a function that writes the settings of the experts and of the choice between them.

    Args:
        scoring: function of the router's logits, "softmax" or "sigmoid".
        more: functions that write other metadata.
        normalizes_one: whether mlx-lm normalizes the weight of a single chosen expert, which makes it 1.
    """

    def write(writer: Any, args: Any, config: dict[str, Any]) -> None:
        from gguf import ExpertGatingFuncType

        writer.add_expert_count(args.num_experts)
        writer.add_expert_used_count(args.num_experts_per_tok)
        for name, method in _SETTINGS.items():
            if (value := getattr(args, name, None)) is not None:
                getattr(writer, method)(value)
        if (normalize := getattr(args, "norm_topk_prob", None)) is not None:
            writer.add_expert_weights_norm(normalize and (normalizes_one or args.num_experts_per_tok > 1))
        if (getattr(args, "n_group", None) or 1) > 1:
            writer.add_expert_group_count(args.n_group)
            writer.add_expert_group_used_count(args.topk_group)
        writer.add_expert_gating_func(ExpertGatingFuncType[scoring.upper()])
        for function in more:
            function(writer, args, config)

    return write


def always_normalized(args: Any) -> Iterator[str]:
    """Check a config for an architecture in which the weights of the chosen experts always sum to 1."""
    if not args.norm_topk_prob:
        yield "norm_topk_prob is false: llama.cpp always normalizes the experts' weights"


def never_normalized(args: Any) -> Iterator[str]:
    """Check a config for an architecture in which the weights of the chosen experts are never normalized."""
    if args.norm_topk_prob:
        yield "norm_topk_prob is true: llama.cpp does not normalize the experts' weights for this architecture"


def has_shared_experts(args: Any) -> Iterator[str]:
    """Check a config for an architecture that needs shared experts."""
    if not args.num_shared_experts:
        yield "the model has no shared experts: llama.cpp needs them for this architecture"


def has_qk_norm(args: Any) -> Iterator[str]:
    """Check a config for an architecture that needs norms of queries and keys."""
    if not args.use_qk_norm:
        yield "use_qk_norm is false: llama.cpp needs the norms of queries and keys for this architecture"


def experts_in_every_layer(args: Any) -> Iterator[str]:
    """Check a config for an architecture that has experts in every layer after the dense ones."""
    if getattr(args, "moe_layer_freq", 1) != 1:
        yield f"moe_layer_freq is {args.moe_layer_freq}: llama.cpp needs experts in every layer after the dense ones"


def full_attention_every(period: int, *, full: int = -1) -> Check:
    """Return a check that in each period of layers only the one at index `full` has full attention, or by default."""

    def problems(args: Any) -> Iterator[str]:
        expected = [SLIDING] * period
        expected[full] = FULL
        found = args.layer_types
        if found and list(found) != [expected[i % period] for i in range(args.num_hidden_layers)]:
            yield f"layer_types: llama.cpp needs a repeated {', '.join(expected)}"

    return problems
