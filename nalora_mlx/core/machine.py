"""Facts about this machine that decide how fast it trains on the CPU."""

import shutil
import time


def has_cpp_compiler() -> bool:
    """Return whether a C++ compiler is installed; `mx.compile` needs one to fuse operations on the CPU."""
    return shutil.which("g++") is not None or shutil.which("c++") is not None


def matmul_gflops() -> float:
    """Measure a 1024 x 1024 float32 matrix product on the default device, the best of three, in GFLOP/s."""
    import mlx.core as mx

    a = mx.random.normal((1024, 1024))
    best = float("inf")
    mx.eval(a @ a)
    for _ in range(3):
        tic = time.perf_counter()
        mx.eval(a @ a)
        best = min(best, time.perf_counter() - tic)
    return 2 * 1024**3 / best / 1e9
