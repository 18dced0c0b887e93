"""Base models as mlx-lm defines them.

Loads models and tokenizers, splits a model at its output head, isolates packed rows in attention, and holds
conversations. May import `core`, `ops` and `data`."""

from nalora_mlx.models.loading import load_model, load_tokenizer
from nalora_mlx.models.output_head import find_output_head

__all__ = ["find_output_head", "load_model", "load_tokenizer"]
