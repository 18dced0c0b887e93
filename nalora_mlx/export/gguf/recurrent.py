"""Recurrent and hybrid models in GGUF, one table row per model type."""

from nalora_mlx.export.gguf.architecture import Architecture

RECURRENT: dict[str, Architecture] = {}
