"""Numerical operations: functions from arrays to arrays, without modules or state.

The package holds the activations of gated MLPs, attention and cross-entropy for training, vectorized elementary
functions for the CPU, and the kernels of the gated residual with their reference in plain MLX. It may import `core`
only.
"""

from nalora_mlx.ops.activations import ACTIVATIONS, Activation
from nalora_mlx.ops.attention import lean_attention
from nalora_mlx.ops.cross_entropy import cross_entropy_sum, tiled_cross_entropy_sum

__all__ = ["ACTIVATIONS", "Activation", "cross_entropy_sum", "lean_attention", "tiled_cross_entropy_sum"]
