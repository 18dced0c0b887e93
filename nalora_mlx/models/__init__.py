"""Base models, as mlx-lm defines them.

Loads models and tokenizers, finds a model's output head, keeps packed rows apart in attention, and renders prompts and
generates answers. May import `core`, `ops` and `data`.
"""

from nalora_mlx.models.loading import load_model, load_tokenizer
from nalora_mlx.models.output_head import find_output_head

__all__ = ["find_output_head", "load_model", "load_tokenizer"]
