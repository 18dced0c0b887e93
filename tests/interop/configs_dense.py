"""Configs of tiny transformers with dense MLPs that can be exported to GGUF."""

from typing import Any

from tests.interop.configs_common import (
    BIASES,
    DYNAMIC,
    GEMMA,
    HEAD,
    LINEAR,
    LLAMA3,
    LONGROPE,
    SIZES,
    UNTIED,
    WINDOW,
    YARN,
)

# Model type -> config.
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "mistral": SIZES | UNTIED | HEAD,
    "qwen2": SIZES,
    "qwen3": SIZES | {"head_dim": 32},
    "gemma": GEMMA,
    "gemma2": GEMMA | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 7.0, "sliding_window": 64},
    "gemma3_text": GEMMA | WINDOW | {"rope_local_base_freq": 1000.0, "sliding_window_pattern": 6},
    "phi3": SIZES | UNTIED,
    "smollm3": SIZES,
    "olmo2": SIZES | UNTIED,
    "glm4": SIZES | HEAD | {"attention_bias": True, "partial_rotary_factor": 0.5},
    "internlm2": SIZES | UNTIED | {"bias": False},
    "internlm3": SIZES | UNTIED,
    "granite": SIZES
    | {
        "attention_bias": False,
        "mlp_bias": False,
        "attention_multiplier": 0.3,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "logits_scaling": 2.0,
    },
    "cohere2": SIZES | HEAD | WINDOW | {"logit_scale": 0.25, "sliding_window_pattern": 4},
    "starcoder2": SIZES | {"norm_epsilon": 1e-5},
}
# Variants of these configs: name -> (model type, changes).
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama untied": ("llama", UNTIED),
    "llama head_dim": ("llama", {"head_dim": 32}),
    "llama biases": ("llama", BIASES),
    "llama pairs": ("llama", {"rope_traditional": True}),
    "llama llama3": ("llama", LLAMA3),
    "llama linear": ("llama", LINEAR),
    "llama yarn": ("llama", YARN),
    "llama dynamic": ("llama", DYNAMIC),
    "qwen2 yarn untied": ("qwen2", YARN | UNTIED),
    "qwen3 yarn": ("qwen3", YARN),
    "gemma3 untied": ("gemma3_text", UNTIED),
    "gemma3 linear": ("gemma3_text", LINEAR),
    "gemma3 pattern": ("gemma3_text", {"sliding_window_pattern": 3}),
    "phi3 tied": ("phi3", {"tie_word_embeddings": True}),
    "phi3 partial": ("phi3", {"partial_rotary_factor": 0.5}),
    "phi3 longrope": ("phi3", LONGROPE),
    "phi3 linear": ("phi3", {"rope_scaling": LINEAR["rope_scaling"] | {"long_factor": []}}),
    "smollm3 yarn untied": ("smollm3", YARN | UNTIED),
    "olmo2 tied": ("olmo2", {"tie_word_embeddings": True}),
    "olmo2 yarn": ("olmo2", YARN),
    "glm4 no biases": ("glm4", {"attention_bias": False}),
    "internlm2 tied": ("internlm2", {"tie_word_embeddings": True}),
    "internlm2 linear": ("internlm2", LINEAR),
    "internlm3 biases": ("internlm3", {"bias": True, "qkv_bias": True}),
    "internlm3 dynamic": ("internlm3", DYNAMIC),
    "granite llama3 biases": ("granite", LLAMA3 | BIASES),
    "granite untied": ("granite", UNTIED),
    "cohere2 pattern": ("cohere2", {"sliding_window_pattern": 3}),
    "starcoder2 untied": ("starcoder2", UNTIED),
}
