"""Adapters: which modules get one, what it computes, and how it is saved, loaded and merged.

May import `core`, `ops`, `data` and `models`.
"""

from nalora_mlx.adapters.attach import AdaptResult, adapt, adapt_dora
from nalora_mlx.adapters.files import load_adapter
from nalora_mlx.adapters.merge import fuse_model

__all__ = ["AdaptResult", "adapt", "adapt_dora", "fuse_model", "load_adapter"]
