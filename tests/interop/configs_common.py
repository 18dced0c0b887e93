"""Parts of the configs of tiny models."""

from typing import Any

VOCABULARY = 320
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 6,  # one period of gemma3's layer pattern
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
HEAD = {"head_dim": 16}
WINDOW = {"sliding_window": 8}  # shorter than PROMPT, so that the window has an effect
UNTIED = {"tie_word_embeddings": False}
EXPERTS = UNTIED | {"num_experts_per_tok": 2}
GEMMA = SIZES | {"head_dim": 32, "query_pre_attn_scalar": 32.0}
YARN = {
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "beta_fast": 16.0,
    }
}
LINEAR = {"rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 4.0}}
DYNAMIC = {"rope_scaling": {"rope_type": "dynamic", "type": "dynamic", "factor": 2.0}}
LLAMA3 = {
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
}
LONGROPE = {
    "original_max_position_embeddings": 128,
    "rope_scaling": {
        "type": "longrope",
        "short_factor": [1.0] * 8,
        "long_factor": [1.0 + 0.3 * i for i in range(8)],
    },
}
BIASES = {"attention_bias": True, "mlp_bias": True}
