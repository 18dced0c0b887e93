"""Numerical operations: arrays in, arrays out, no modules.

Holds the activations of gated MLPs, attention and cross entropy for training, and the kernels of the gated residual,
each with its reference in plain MLX. May import `core`."""

from nalora_mlx.ops.activations import ACTIVATIONS, Activation
from nalora_mlx.ops.attention import lean_attention
from nalora_mlx.ops.cross_entropy import cross_entropy_sum, tiled_cross_entropy_sum

__all__ = ["ACTIVATIONS", "Activation", "cross_entropy_sum", "lean_attention", "tiled_cross_entropy_sum"]
