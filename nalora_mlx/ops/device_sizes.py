"""Sizes of the pieces in which training computes, by kind of device.

A CPU is fastest on pieces that fit in its cache. A GPU needs few large launches. Each launch costs microseconds, and
small pieces would save little memory: MLX keeps more than ten command buffers in flight, with their temporaries.
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
    score_bytes: int  # of the scores of a layer, B x H x Lq x Lk, up to which attention is left to MLX
    fused_attention: bool  # whether MLX fuses attention in half precision, forward and backward
    chunk_bytes: int | None  # of a float32 array in a chunk of elementwise operations; None for one chunk
    group_positions: int  # B x tokens of a recurrence that are computed at a time
    scan_elements: int  # B x tokens x E x N of a selective scan at a time; about five such arrays are live

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
    # A tile of logits is 64 MB in float32. While gradients are traced, MLX composes attention of single operations and
    # stores the scores of all layers. With few scores that is faster: in half precision, it moves two thirds of the
    # bytes of our float32 scores. For Qwen3-0.6B on 4 x 512 tokens, scripts/step_cost.py predicts 10 % less time on an
    # M2 Pro or M4 Max, 30 % less on an M5 Max, and 1 GB more.
    "metal": DeviceSizes(2048, 2**24, 2**15, 512, 32 << 20, False, None, 1024, 2**25),
    # The same, but cuDNN computes attention, forward and backward, without storing scores.
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
