"""Sizes of the pieces in which training computes, by kind of device.

A CPU is fastest on pieces that fit in its cache. A GPU needs few large launches: each costs microseconds, and
temporaries of many launches are in memory anyway, because MLX keeps more than ten command buffers in flight.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import mlx.core as mx


class DeviceSizes(NamedTuple):
    """The sizes for one kind of device."""

    head_rows: int  # rows of a tile of logits
    head_elements: int  # of a tile of logits; tiles with fewer rows have more columns
    head_columns: int  # of a tile of logits, at most
    attention_queries: int  # queries per block of attention
    score_bytes: (
        int  # of the scores of a layer, B x H x Lq x Lk; attention with at most so many is left to MLX
    )
    fused_attention: bool  # whether MLX fuses attention, forward and backward, in half precision
    chunk_bytes: int | None  # of a float32 array in chunks of elementwise operations; None for a single chunk
    group_positions: int  # positions of a batch, B x tokens, whose recurrence is computed at a time
    scan_elements: (
        int  # B x tokens x E x N of a selective scan that are computed at a time; five such arrays are live
    )

    def scaled(self, share: float) -> "DeviceSizes":
        """Return sizes that need this share of the memory."""
        return self._replace(
            head_rows=max(1, round(self.head_rows * share)),
            head_elements=max(1, round(self.head_elements * share)),
            group_positions=max(1, int(self.group_positions * share)),
            scan_elements=max(1, int(self.scan_elements * share)),
        )


SIZES = {
    # A tile of logits is 4 MB and a chunk 2 MB. Several fit in the cache, and matrix products are still fast.
    "cpu": DeviceSizes(512, 2**20, 4096, 128, 0, False, 2 << 20, 512, 2**25),
    # Large tiles. While gradients are traced, MLX composes attention of single operations and stores the scores of all
    # layers. In half precision, it moves two thirds of the bytes that our float32 scores take: by scripts/step_cost.py,
    # Qwen3-0.6B on 4 x 512 tokens is 11 % faster with it, and takes 1 GB more.
    "metal": DeviceSizes(2048, 2**24, 2**15, 512, 32 << 20, False, None, 1024, 2**25),
    # cuDNN computes attention, forward and backward, without storing scores.
    "cuda": DeviceSizes(2048, 2**24, 2**15, 512, 32 << 20, True, None, 2048, 2**25),
}

_chosen: ContextVar[DeviceSizes | None] = ContextVar("device_sizes", default=None)


def device_kind() -> str:
    """Return the kind of the default device: "cpu", "metal" or "cuda"."""
    if mx.default_device() == mx.Device(mx.cpu):
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def device_sizes() -> DeviceSizes:
    """Return the sizes for the default device, or those that `using_sizes` chose."""
    return _chosen.get() or SIZES[device_kind()]


@contextmanager
def using_sizes(sizes: DeviceSizes | str) -> Iterator[None]:
    """Use other sizes, or those of another kind of device, while the context is open."""
    token = _chosen.set(SIZES[sizes] if isinstance(sizes, str) else sizes)
    try:
        yield
    finally:
        _chosen.reset(token)
