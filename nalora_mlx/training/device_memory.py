"""Memory that a run leaves with the allocator and the operating system: cached buffers, and wired memory on Metal."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import mlx.core as mx

from nalora_mlx.ops.device_sizes import device_kind

CACHE_SHARE = 0.85  # of the budget, above which a GPU's cache is cleared
WIRED_MARGIN = 1.2  # times the planned peak: the plan is within 15% of the measured peak


def trim_cache(threshold: int | None = None) -> None:
    """Clear the allocator's cache of freed buffers if it has grown too large. Called after each step.

    Args:
        threshold: bytes, above which the cache is cleared. If None, a GPU keeps it until it and the memory in use near
            the budget: there, each new buffer costs time. On a CPU it is cleared after every step, which costs nothing.
    """
    if threshold is None and device_kind() != "cpu":
        threshold = round(CACHE_SHARE * _budget()) - mx.get_active_memory()
    if mx.get_cache_memory() > max(threshold or 0, 0):
        mx.clear_cache()


@contextmanager
def wired_memory(limit: int | None, peak: Callable[[], float]) -> Iterator[None]:
    """Keep a run's memory resident on Metal while the context is open. Other devices wire nothing.

    Args:
        limit: bytes to keep resident at most; 0 keeps none. If None, the peak and a margin. Never more than the
            device's recommended working set: with all of it wired, small machines have frozen.
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
        with suppress(RuntimeError):  # a failed command buffer has raised its error already
            mx.synchronize()  # the limit must not change while MLX evaluates
        mx.set_wired_limit(before)


def _budget() -> int:
    """Return the bytes that a run should stay within: --memory-budget, or else what the device recommends."""
    limit = mx.get_memory_limit()  # set by --memory-budget
    return min(limit, _recommended()) if device_kind() == "metal" else limit


def _recommended() -> int:
    """Return the recommended working set of a Metal device, in bytes."""
    return int(mx.device_info()["max_recommended_working_set_size"])
