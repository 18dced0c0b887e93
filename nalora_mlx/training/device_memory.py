"""How much memory MLX caches for reuse during a run and, on Metal, keeps wired (resident)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import mlx.core as mx

from nalora_mlx.ops.device_sizes import device_kind

CACHE_SHARE = 0.85  # of the budget; a GPU's cache is cleared when it and the memory in use exceed this
WIRED_MARGIN = 1.2  # times the planned peak, which may be up to 15% too low (scripts/check_planner.py)


def trim_cache(threshold: int | None = None) -> None:
    """Clear the allocator's cache of freed buffers if it has grown too large. Called after each step.

    Args:
        threshold: bytes above which the cache is cleared. If None, a GPU's cache is kept until it and the memory in
            use near the budget, because a GPU takes long to allocate buffers. A CPU does not, and its cache is cleared
            after each step.
    """
    if threshold is None and device_kind() != "cpu":
        threshold = round(CACHE_SHARE * _budget()) - mx.get_active_memory()
    if mx.get_cache_memory() > max(threshold or 0, 0):
        mx.clear_cache()


@contextmanager
def memory_limit(limit: int | None) -> Iterator[None]:
    """Set MLX's memory limit in bytes, near which it waits for running work and frees memory; None changes nothing."""
    if limit is None:
        yield
        return
    before = mx.set_memory_limit(limit)
    try:
        yield
    finally:
        mx.set_memory_limit(before)


@contextmanager
def wired_memory(limit: int | None, peak: Callable[[], float]) -> Iterator[None]:
    """Keep a run's memory resident on Metal while the context is open. Other devices wire nothing.

    Args:
        limit: bytes to keep resident at most; 0 keeps none. If None, the peak and a margin. It is never more than the
            device's recommended working set. Macs with 16 GB have frozen with all of that wired (mlx #3186).
        peak: returns the run's peak memory in bytes.
    """
    if device_kind() != "metal":
        yield
        return
    size = WIRED_MARGIN * peak() if limit is None else limit
    before = mx.set_wired_limit(int(min(size, _recommended())))
    try:
        yield
    finally:
        with suppress(RuntimeError):  # of a failed command buffer, which the run has raised already
            mx.synchronize()  # the limit must not change while MLX evaluates
        mx.set_wired_limit(before)


def _budget() -> int:
    """Return the bytes that a run should stay within: --memory-budget, or else what the device recommends."""
    limit = mx.get_memory_limit()  # set by --memory-budget
    return min(limit, _recommended()) if device_kind() == "metal" else limit


def _recommended() -> int:
    """Return the recommended working set of a Metal device, in bytes."""
    return int(mx.device_info()["max_recommended_working_set_size"])
