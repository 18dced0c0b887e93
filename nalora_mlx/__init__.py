"""Nonlinearity-Aware LoRA fine-tuning with MLX."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from nalora_mlx.adapters import adapt, fuse_model, load_adapter
    from nalora_mlx.core import InputError, NALoRAConfig, TrainingConfig
    from nalora_mlx.data import preview
    from nalora_mlx.finetuning import FinetuneResult, finetune
    from nalora_mlx.training import train

__all__ = [
    "FinetuneResult",
    "InputError",
    "NALoRAConfig",
    "TrainingConfig",
    "adapt",
    "finetune",
    "fuse_model",
    "load_adapter",
    "preview",
    "train",
]

_HOMES = {
    "FinetuneResult": "finetuning",
    "InputError": "core",
    "NALoRAConfig": "core",
    "TrainingConfig": "core",
    "adapt": "adapters",
    "finetune": "finetuning",
    "fuse_model": "adapters",
    "load_adapter": "adapters",
    "preview": "data",
    "train": "training",
}


def __getattr__(name: str) -> Any:
    # On first use, not on import: mlx and mlx-lm take longer to import than a --help may take.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
