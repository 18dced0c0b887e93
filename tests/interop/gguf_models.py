"""Tiny random models of every model type that can be exported to GGUF or PEFT, with a tokenizer."""

import importlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.utils import MODEL_REMAPPING

from tests.miniatures.klear_to_llama import MINIATURES as FIRST
from tests.miniatures.llama4_to_youtu import MINIATURES as SECOND

ZOO = FIRST | SECOND

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

# Model type -> config.
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "mistral": SIZES | UNTIED | HEAD,
    "mixtral": SIZES | EXPERTS | {"num_local_experts": 4},
    "qwen2": SIZES,
    "qwen3": SIZES | {"head_dim": 32},
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
    "mixtral ignores scaling": ("mixtral", YARN),
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
# Model types that can be exported to PEFT but not to GGUF.
OTHERS = {
    name: ZOO[name].config | {"vocab_size": VOCABULARY}
    for name in ("ernie4_5", "helium", "hunyuan_v1_dense", "nemotron", "stablelm")
}
PROMPT = [int(token) for token in np.random.default_rng(1).integers(3, VOCABULARY, 24)]


def build(model_type: str, **changes: Any) -> tuple[nn.Module, dict[str, Any]]:
    """Return a random float32 model and its config. Every weight affects the logits."""
    config = (CONFIGS | OTHERS)[model_type] | {"model_type": model_type} | changes
    module = importlib.import_module(f"mlx_lm.models.{MODEL_REMAPPING.get(model_type, model_type)}")
    model = module.Model(module.ModelArgs.from_dict(config))
    if model_type == "gemma3_text" and config["tie_word_embeddings"]:
        model.sanitize({})  # drops the head, as for a checkpoint without one
    rng = np.random.default_rng(0)
    norm_center = 0.0 if model_type.startswith("gemma") else 1.0

    def random(path: str, array: mx.array) -> mx.array:
        values = 0.15 * rng.standard_normal(array.shape).astype(np.float32)
        return mx.array(
            values + norm_center if path.endswith("norm.weight") or "norm" in path.split(".")[-2] else values
        )

    model.update(tree_map_with_path(random, model.parameters()))
    model.eval()
    mx.eval(model.parameters())
    return model, config


def save(directory: Path, model: nn.Module, config: dict[str, Any], *, shards: int = 1) -> Path:
    """Write a model as mlx-lm does: config, safetensors, and a tokenizer of VOCABULARY tokens."""
    directory.mkdir(parents=True, exist_ok=True)
    weights = sorted(tree_flatten(model.parameters()))
    for i in range(shards):
        name = f"model-{i + 1:05d}-of-{shards:05d}.safetensors" if shards > 1 else "model.safetensors"
        mx.save_safetensors(str(directory / name), dict(weights[i::shards]))
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text(tokenizer_json())
    special = {"bos_token": "<|begin|>", "eos_token": "<|im_end|>", "chat_template": "{{ messages }}"}
    (directory / "tokenizer_config.json").write_text(json.dumps(special))
    return directory


@cache
def tokenizer_json() -> str:
    """Return the tokenizer.json of a byte-level BPE with VOCABULARY tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        min_frequency=1,
        special_tokens=["<|begin|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = Path(__file__).read_text()
    tokenizer.train_from_iterator(text.splitlines(), trainer)
    assert tokenizer.get_vocab_size() == VOCABULARY
    return tokenizer.to_str()


def logits(model: nn.Module, ids: list[int] = PROMPT) -> np.ndarray:
    """Return the model's logits for one sequence, float32 [tokens, vocabulary]."""
    return np.array(model(mx.array([ids]))[0].astype(mx.float32))
