"""How much memory the default device has, and how much of it a run should use."""

import os
from pathlib import Path

import mlx.core as mx

from nalora_mlx.ops.device_sizes import device_kind

RAM_SHARE = 0.8  # of the RAM, on a device without a recommended working set
CGROUPS = Path("/sys/fs/cgroup")


def default_budget() -> int:
    """Return the bytes that a run should stay within: Metal's recommended working set, or a share of the memory."""
    recommended = mx.device_info().get("max_recommended_working_set_size")
    if device_kind() == "metal" and isinstance(recommended, int):
        return recommended
    return int(RAM_SHARE * device_memory())


def device_memory() -> float:
    """Return the bytes of memory that the default device computes in: that of a CUDA GPU, or the machine's RAM."""
    total = mx.device_info().get("total_memory") if device_kind() == "cuda" else None
    return total if isinstance(total, int) else machine_memory()


def machine_memory() -> float:
    """Return the bytes of RAM of the machine, or of the container in which this process runs."""
    memory: float = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # cgroups 2 and 1
        try:
            return min(memory, int((CGROUPS / name).read_text()))
        except (OSError, ValueError):  # missing, or the word max
            continue
    return memory
