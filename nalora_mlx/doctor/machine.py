"""Checks of the machine: versions, speed, kernels, disk space and optional dependencies."""

import math
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING

from nalora_mlx import __version__
from nalora_mlx.core import machine, optional_dependencies
from nalora_mlx.core.config import RunConfig
from nalora_mlx.core.errors import counted
from nalora_mlx.core.versions import library_versions

if TYPE_CHECKING:
    import mlx.nn as nn

    from nalora_mlx.doctor.page import Page

LOW_DISK = 2e9  # bytes; about what a run of a small model writes


def check_machine(page: "Page") -> None:
    """Report versions and device. On a CPU, check the speed of matrix products; on a GPU, their precision."""
    versions = ", ".join(f"{name} {version}" for name, version in library_versions("mlx", "mlx-lm").items())
    page.note(f"nalora {__version__}, {versions}, Python {platform.python_version()}")
    page.note(platform.platform())
    import mlx.core as mx

    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    page.note(f"{'CPU' if on_cpu else 'GPU'}: {machine.describe_device(mx.device_info())}")
    if not on_cpu:
        page.note(machine.describe_float32_products())
        return
    with page.working("measuring matrix products"):
        speed = machine.matmul_gflops()
    if speed >= machine.SLOW_GFLOPS:
        page.ok(f"float32 matrix products: {speed:.0f} GFLOP/s")
    else:
        page.warning(
            f"float32 matrix products: {speed:.0f} GFLOP/s, because no optimized BLAS is in use; training takes about "
            "fifty times as long; start with bash scripts/environment.sh, or preload a BLAS: "
            "LD_PRELOAD=libopenblas.so.0 (package libopenblas0-pthread)"
        )
    if not machine.has_cpp_compiler():
        page.warning("no C++ compiler, without which mx.compile fuses no operations on the CPU; install g++")


def check_kernels(page: "Page", few: bool) -> None:
    """Compare kernels of the gated residual with their reference, and time the forward kernel.

    Args:
        page: to print on.
        few: check one kernel per activation instead of every kernel.
    """
    from nalora_mlx.ops.kernels.backend import ENVIRONMENT, REFERENCE, backend

    chosen = backend()
    if chosen == REFERENCE:
        why = f"{ENVIRONMENT}={REFERENCE}" if os.environ.get(ENVIRONMENT) == REFERENCE else "no GPU in use"
        page.note(f"gated residual: MLX's own operations ({why})")
        return
    from nalora_mlx.ops.kernels.healthcheck import check_kernels, kinds, measure_bandwidth

    count = len(list(kinds(chosen, few)))
    page.note(f"compiling {2 * count} kernels, which takes longer the first time")
    with page.working("compiling and checking kernels"):
        found = dict(check_kernels(chosen, few))
    wrong = {kind: why for kind, why in found.items() if why is not None}
    agree = f"gated residual: {len(found) - len(wrong)} of {len(found)} {chosen} kernels agree with MLX"
    rest = "; nalora doctor without --model checks all of them" if few else ""
    (page.note if wrong else page.ok)(agree + rest)
    for kind, why in wrong.items():
        page.failure(
            f"the {chosen} kernel of {kind} is not used, since {why}; training is correct "
            "without it, but slower; please report this page"
        )
    if not wrong:
        copied, reached = measure_bandwidth(chosen)
        page.note(
            f"gated residual: {reached:.0f} GB/s, {reached / copied:.0%} of the {copied:.0f} GB/s of a copy"
        )


def check_disk(page: "Page", model: "nn.Module | None", config: RunConfig) -> None:
    """Report whether there is enough disk space for the run's files."""
    from nalora_mlx.core.storage import free_space

    output = Path(config.adapter_path or ".").expanduser()
    free = free_space(output)
    space = f"{free / 1e9:.1f} GB free for {output}"
    if model is not None:
        from nalora_mlx.adapters.files import adapter_weights
        from nalora_mlx.core.trees import nbytes
        from nalora_mlx.runs.directory import check_space

        adapter = nbytes(adapter_weights(model))
        state = 2 * adapter  # Adam's moments
        saves = math.ceil(config.iters / config.save_every)
        shortage = check_space(output, adapter, state, saves, config.keep_last)
        if shortage is not None:
            page.warning(shortage)
            return
        fit = "fits" if saves == 1 else "fit"
        space += f"; {counted(saves, 'checkpoint')} of {(2 * adapter + state) / 1e6:.0f} MB {fit}"
    elif free < LOW_DISK:
        page.warning(f"{space}; free some space, or choose another --adapter-path")
        return
    page.ok(space)


def check_extras(page: "Page") -> None:
    """Report which optional dependencies are installed, and how to install the others."""
    installed = optional_dependencies.installed_extras()
    missing = [extra for extra in optional_dependencies.EXTRAS if extra not in installed]
    if installed:
        page.ok(f"installed: {', '.join(installed)}")
    if missing:
        uses = ", ".join(f"{extra} ({optional_dependencies.EXTRAS[extra]})" for extra in missing)
        page.note(f"not installed: {uses}; {optional_dependencies.install_command(*missing)}")
