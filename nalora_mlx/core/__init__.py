"""Foundations of all other packages: errors, settings, strict parsing, signals, atomic storage, terminal output.

Imports no other package of the project. Importing `nalora_mlx.core` is cheap, because it does not import the modules
that need mlx."""

from nalora_mlx.core.config import NALoRAConfig, NAParameters, RunConfig, TrainingConfig
from nalora_mlx.core.errors import InputError, RunError

__all__ = ["InputError", "NALoRAConfig", "NAParameters", "RunConfig", "RunError", "TrainingConfig"]
