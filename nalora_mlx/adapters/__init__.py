"""Adapters: which modules get one, what it computes, and how it is saved, loaded and merged.

May import `core`, `ops`, `data` and `models`.
"""

from nalora_mlx.adapters.attach import AdaptResult, Gated, Skipped, adapt, adapt_dora, adapt_result
from nalora_mlx.adapters.files import load_adapter
from nalora_mlx.adapters.merge import fuse_model

__all__ = [
    "AdaptResult",
    "Gated",
    "Skipped",
    "adapt",
    "adapt_dora",
    "adapt_result",
    "fuse_model",
    "load_adapter",
]
