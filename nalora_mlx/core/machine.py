"""Facts about this machine that decide how fast it trains, and how precisely."""

import os
import shutil
import time

SLOW_GFLOPS = 20  # of float32 matrix products on a CPU; slower means that no optimized BLAS is in use
SLOW_PRODUCT = 0.2  # seconds, which no scatter of the measurement explains


def has_cpp_compiler() -> bool:
    """Return whether a C++ compiler is installed; `mx.compile` needs one to fuse operations on the CPU."""
    return shutil.which("g++") is not None or shutil.which("c++") is not None


def matmul_gflops() -> float:
    """Measure a 1024 x 1024 float32 matrix product on the default device, in GFLOP/s.

    Returns the best of three, or a single one if it is slow.
    """
    import mlx.core as mx

    a = mx.random.normal((1024, 1024))
    best = float("inf")
    mx.eval(a @ a)
    for _ in range(3):
        tic = time.perf_counter()
        mx.eval(a @ a)
        best = min(best, time.perf_counter() - tic)
        if best > SLOW_PRODUCT:
            break
    return 2 * 1024**3 / best / 1e9


def rounds_float32_products() -> bool:
    """Return whether float32 matrix products on the default device round their inputs to 11 bits (TF32).

    Some GPUs do so by default, for speed: NVIDIA's with tensor cores, and those of Macs from M5 on.
    MLX_ENABLE_TF32=0 turns it off.
    """
    import mlx.core as mx

    value = 1 + 2.0**-12  # twelve bits
    product = mx.full((1024, 1024), value) @ mx.eye(1024)
    return bool(mx.any(product != value).item())


def describe_float32_products() -> str:
    """Return in words how precise float32 matrix products on the default device are."""
    if not rounds_float32_products():
        return "float32 matrix products use all 24 bits of their inputs"
    return "float32 matrix products round their inputs to 11 bits (TF32), for speed; MLX_ENABLE_TF32=0 turns this off"


def describe_device(info: dict[str, str | int]) -> str:
    """Return the name of a device and what MLX says about its memory, from `mx.device_info()`."""
    text = str(info.get("device_name", "unknown"))
    size = info.get("memory_size") or info.get("total_memory")  # Metal's and CUDA's names
    if isinstance(size, int):
        text += f", {size / 1e9:.1f} GB of memory"
    recommended = info.get("max_recommended_working_set_size")
    if isinstance(recommended, int):
        text += f", {recommended / 1e9:.1f} GB of them recommended for the GPU"
    return f"{text}, {os.cpu_count()} processors"
