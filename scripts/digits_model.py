"""Make the base model of the digits example: a small vision-language model that mlx-vlm loads.

python scripts/digits_model.py [--language-model demo/model] [--output demo/digits/model]

The model has the architecture of SmolVLM. Its language tower is SmolLM2-135M-Instruct, unchanged. The rest is made here,
from pictures that the example's data do not contain (see scripts/digits_data.py):

1. The vision tower learns to classify digits. The classification head is thrown away.
2. The projector learns to translate its output for the language tower, so that this describes a picture in words.
   Both towers are frozen.

The result names the digit on one picture. It has never seen two pictures, a sum, or a question for a number.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from digits_data import enlarge, load_pictures
from mlx.utils import tree_flatten
from mlx_vlm.models import smolvlm

SEED = 0
WRAPPER, IMAGE, PICTURE_START = "<fake_token_around_image>", "<image>", "<global-img>"
QUESTIONS = ("What is in the picture?", "Describe the picture.", "What do you see?")
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Recipe:
    """The vision tower's size and how long each step trains."""

    image_size: int = 32
    patch_size: int = 8
    merged: int = 2  # patches per token and direction: 16 patches become 4 tokens
    hidden_size: int = 96
    layers: int = 2
    tower_epochs: int = 50
    tower_batch: int = 32
    tower_rate: float = 1e-3
    projector_iters: int = 120
    projector_batch: int = 8
    projector_rate: float = 2e-3

    @property
    def image_tokens(self) -> int:
        return (self.image_size // self.patch_size // self.merged) ** 2


def caption(digit: int) -> str:
    return f"A handwritten {WORDS[digit]}."


# --- the untrained model ------------------------------------------------------------------------------------


def build(language: dict[str, Any], weights: dict[str, mx.array], recipe: Recipe) -> tuple[smolvlm.Model, dict]:
    """Return the model with an untrained vision tower and projector, and its config.json.

    Args:
        language: config.json of a Llama model.
        weights: its weights. The vocabulary grows by three tokens, whose embedding is the mean of all others.
        recipe: the vision tower's size.
    """
    keys = (
        "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers",
        "rms_norm_eps", "rope_theta", "max_position_embeddings", "tie_word_embeddings",
    )  # fmt: skip
    vocabulary = language["vocab_size"]
    config = {
        "architectures": ["SmolVLMForConditionalGeneration"],
        "model_type": "smolvlm",
        "image_token_id": vocabulary + 1,
        "eos_token_id": [language["eos_token_id"]],
        "scale_factor": recipe.merged,
        "vocab_size": vocabulary + 3,
        "text_config": {
            "model_type": "llama",
            "vocab_size": vocabulary + 3,
            **{key: language[key] for key in keys},
        },
        "vision_config": {
            "model_type": "smolvlm_vision",
            "hidden_size": recipe.hidden_size,
            "intermediate_size": 2 * recipe.hidden_size,
            "num_attention_heads": recipe.hidden_size // 32,
            "num_hidden_layers": recipe.layers,
            "image_size": recipe.image_size,
            "patch_size": recipe.patch_size,
        },
    }
    model_config = smolvlm.ModelConfig.from_dict(config)
    model_config.text_config = smolvlm.TextConfig.from_dict(config["text_config"])
    model_config.vision_config = smolvlm.VisionConfig.from_dict(config["vision_config"])
    mx.random.seed(SEED)
    model = smolvlm.Model(model_config)
    language_model = {name.removeprefix("model."): array for name, array in weights.items()}
    for name in ("embed_tokens.weight", "lm_head.weight"):
        # mlx-vlm's language tower does not share the embedding with the output head.
        table = language_model.get(name, language_model["embed_tokens.weight"])
        if table.shape[0] == vocabulary:
            mean = mx.mean(table, axis=0, keepdims=True).astype(table.dtype)
            language_model[name] = mx.concatenate([table, mean, mean, mean])
        else:
            language_model[name] = table
    model.language_model.load_weights(list(language_model.items()))
    return model, config


def pixels(pictures: np.ndarray, recipe: Recipe) -> np.ndarray:
    """Return pictures [N, 8, 8] as the image processor makes them, [N, side, side, 3] with values from -1 to 1."""
    enlarged = enlarge(pictures, recipe.image_size).astype(np.float32) / 127.5 - 1
    return np.repeat(enlarged[..., None], 3, axis=-1)


def shifted(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Move each picture [N, side, side, C] by up to two pixels in both directions."""
    side = images.shape[1]
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)), constant_values=-1)
    offsets = rng.integers(0, 5, (len(images), 2))
    return np.stack([p[y : y + side, x : x + side] for p, (y, x) in zip(padded, offsets, strict=True)])


# --- training -----------------------------------------------------------------------------------------------


def fit(model: nn.Module, loss: Callable[..., mx.array], batches: Any, iters: int, rate: float) -> None:
    """Train the unfrozen parameters of a model with AdamW on batches, tuples of arrays."""
    warmup = max(1, iters // 20)
    schedule = optim.join_schedules(
        [optim.linear_schedule(rate / warmup, rate, warmup), optim.cosine_decay(rate, iters - warmup)], [warmup]
    )
    optimizer = optim.AdamW(schedule, weight_decay=0.05)
    loss_and_grad = nn.value_and_grad(model, loss)
    state = [model.trainable_parameters(), optimizer.state]

    def step(*batch: mx.array) -> mx.array:
        value, grad = loss_and_grad(*batch)
        optimizer.update(model, grad)
        return value

    total, interval = 0.0, max(1, iters // 5)
    for i, batch in zip(range(iters), batches, strict=False):
        value = step(*map(mx.array, batch))
        mx.eval(model.trainable_parameters(), optimizer.state, value)
        total += value.item()
        if (i + 1) % interval == 0:
            print(f"  {i + 1} of {iters} batches, loss {total / interval:.3f}", flush=True)
            total = 0.0
    del state


class Classifier(nn.Module):
    """A vision tower with a classification head."""

    def __init__(self, tower: nn.Module, hidden_size: int):
        super().__init__()
        self.tower = tower
        self.head = nn.Linear(hidden_size, 10)

    def __call__(self, images: mx.array) -> mx.array:  # [N, H, W, C] -> [N, 10]
        return self.head(mx.mean(self.tower(images)[0], axis=1))


def train_tower(model: smolvlm.Model, parts: dict, recipe: Recipe) -> None:
    pass
