"""Configs of tiny transformers with experts that can be exported to GGUF."""

from typing import Any

from tests.interop.configs_common import EXPERTS, SIZES, YARN

# Model type -> config.
CONFIGS: dict[str, dict[str, Any]] = {
    "mixtral": SIZES | EXPERTS | {"num_local_experts": 4},
    "qwen3_moe": SIZES
    | EXPERTS
    | {
        "head_dim": 32,
        "num_experts": 4,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
}
# Variants of these configs: name -> (model type, changes).
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral ignores scaling": ("mixtral", YARN),
}
