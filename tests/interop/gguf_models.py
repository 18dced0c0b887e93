"""Tiny random models of every model type that can be exported to GGUF or PEFT, with a tokenizer."""

import importlib
import json
import re
import sys
import types
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.utils import MODEL_REMAPPING

from tests.interop import configs_dense, configs_experts, configs_recurrent
from tests.interop.configs_common import VOCABULARY
from tests.miniatures.klear_to_llama import MINIATURES as FIRST
from tests.miniatures.llama4_to_youtu import MINIATURES as SECOND

ZOO = FIRST | SECOND
# mlx-lm's olmo requires it, but does not use it.
sys.modules.setdefault("hf_olmo", types.ModuleType("hf_olmo"))

CONFIGS: dict[str, dict[str, Any]] = (
    configs_dense.CONFIGS | configs_experts.CONFIGS | configs_recurrent.CONFIGS
)
VARIANTS = configs_dense.VARIANTS | configs_experts.VARIANTS | configs_recurrent.VARIANTS
PROMPT = [int(token) for token in np.random.default_rng(1).integers(3, VOCABULARY, 24)]
LONG_PROMPT = [int(token) for token in np.random.default_rng(1).integers(3, VOCABULARY, 208)]


def build(model_type: str, **changes: Any) -> tuple[nn.Module, dict[str, Any]]:
    """Return a random float32 model and its config. Every weight affects the logits."""
    config = CONFIGS[model_type] | {"model_type": model_type} | changes
    module = importlib.import_module(f"mlx_lm.models.{MODEL_REMAPPING.get(model_type, model_type)}")
    model = module.Model(module.ModelArgs.from_dict(config))
    if model_type in ("gemma3", "gemma3_text") and config.get("tie_word_embeddings", True):
        # Drops the head, as for a checkpoint without one.
        getattr(model, "language_model", model).sanitize({})
    rng = np.random.default_rng(0)

    def center(path: str) -> float:
        """Return the mean of a parameter: 1 for norms, unless the model adds that itself."""
        if path.endswith("layer_scalar"):
            return 1.0
        if not re.search(r"norm[^.]*\.\w+$|\.ln_\w+\.weight$", path):
            return 0.0
        if model_type in ("gemma", "gemma2", "gemma3", "gemma3_text"):
            return 0.0
        # Gemma 3n and 4 do not scale their attention, so these weights must be small.
        small = r"\.([qk]_norm|post_feedforward_layernorm)\."
        return 0.3 if model_type.startswith(("gemma3n", "gemma4")) and re.search(small, path) else 1.0

    def random(path: str, array: mx.array) -> mx.array:
        # Convolutions before a normalization are large, or the two programs' epsilons would differ visibly.
        size = 1.0 if "conv1d" in path or path.endswith("conv.weight") else 0.15
        values = size * rng.standard_normal(array.shape).astype(np.float32)
        return mx.array(values + np.float32(center(path)))

    model.update(tree_map_with_path(random, model.parameters()))
    model.eval()
    mx.eval(model.parameters())
    return model, config


def prompt(model_type: str) -> list[int]:
    """Return a prompt to compare logits on; a long one for recurrent models, whose errors could grow."""
    return LONG_PROMPT if model_type in configs_recurrent.CONFIGS else PROMPT


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
    # The layers of Gemma 3n share keys only with a cache.
    cache = model.make_cache() if model.model_type == "gemma3n" else None
    return np.array(model(mx.array([ids]), cache=cache)[0].astype(mx.float32))
