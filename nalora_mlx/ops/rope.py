"""Rotary positions that do not follow from the order of the tokens."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx


@contextmanager
def rope_positions(positions: mx.array | None) -> Iterator[None]:
    """Make models that call mx.fast.rope use these positions for whole batches, instead of an offset.

    Each token becomes a sequence of its own with its position as the offset, so MLX's own kernel computes the rotation.

    Args:
        positions: [B, L]; None changes nothing. Calls with other shapes than [B, H, L, D] are left alone.
    """
    if positions is None:
        yield
        return
    mlx_rope = mx.fast.rope
    batch, length = positions.shape
    offsets = positions.reshape(-1)

    def rope(x: mx.array, dims: int, **options: Any) -> mx.array:
        if x.ndim != 4 or (x.shape[0], x.shape[2]) != (batch, length):
            return mlx_rope(x, dims, **options)
        heads, size = x.shape[1], x.shape[3]
        tokens = x.transpose(0, 2, 1, 3).reshape(batch * length, heads, 1, size)
        rotated = mlx_rope(tokens, dims, **options | {"offset": offsets})
        return rotated.reshape(batch, length, heads, size).transpose(0, 2, 1, 3)

    fast: Any = mx.fast
    fast.rope = rope
    try:
        yield
    finally:
        fast.rope = mlx_rope
