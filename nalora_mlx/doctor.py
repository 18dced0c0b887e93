"""`nalora doctor`: look at the machine and the model before a run, and say what is wrong with them."""

import argparse
import importlib.metadata
import os
import platform
import shutil
import sys
import time
from typing import TYPE_CHECKING

from nalora_mlx import __version__
from nalora_mlx.cli import Parser, add_settings
from nalora_mlx.config import NALoRAConfig, NAParameters

if TYPE_CHECKING:
    from rich.console import Console

SLOW_GFLOPS = 20  # below this a CPU's float32 products run without a tuned BLAS


def build_parser(prog: str) -> Parser:
    """Take the model and what would be adapted in it."""
    parser = Parser(prog=prog, description="Check the machine, and what NA-LoRA would do with a model.")
    parser.add_argument("--model", help="local model directory or Hugging Face repo")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run code that the model brings along"
    )
    add_settings(parser, NALoRAConfig, skip=(*NAParameters.__dataclass_fields__, "num_layers"))
    parser.add_argument(
        "--num-layers", type=int, default=-1, help="layers to adapt, from the last (default: all)"
    )
    return parser


def run(args: argparse.Namespace) -> None:
    """Print what was found, a remedy with each finding."""
    from rich.console import Console

    console = Console(highlight=False)
    _machine(console)
    given = vars(args)
    name, remote = given.pop("model"), given.pop("trust_remote_code")
    if name is not None:
        _model(console, name, remote, NALoRAConfig(**given))


def _machine(console: "Console") -> None:
    import mlx.core as mx

    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("mlx", "mlx-lm"))
    python = f"Python {platform.python_version()}"
    console.print(f"nalora {__version__}, {versions}, {python}, {platform.platform()}", markup=False)
    device = mx.default_device()
    console.print(f"device: {device}, {os.cpu_count()} processors", markup=False)
    if device.type != mx.cpu:
        memory = mx.device_info().get("max_recommended_working_set_size")
        if isinstance(memory, int):
            console.print(f"recommended working set: {memory / 2**30:.1f} GiB")
        return
    speed = _gflops()
    console.print(f"float32 products: {speed:.0f} GFLOP/s")
    if speed < SLOW_GFLOPS:
        console.print(
            "finding: no tuned BLAS is in use, and training takes some fifty times as long. Preload one: "
            "LD_PRELOAD=libopenblas.so.0 (package libopenblas0-pthread)",
            markup=False,
        )
    if shutil.which("g++") is None and shutil.which("c++") is None:
        console.print("finding: no C++ compiler, so that mx.compile fuses nothing on the CPU. Install g++")


def _gflops() -> float:
    """Speed of a 1024 x 1024 float32 product, the best of three; in GFLOP/s."""
    import mlx.core as mx

    a = mx.random.normal((1024, 1024))
    best = float("inf")
    mx.eval(a @ a)
    for _ in range(3):
        tic = time.perf_counter()
        mx.eval(a @ a)
        best = min(best, time.perf_counter() - tic)
    return 2 * 1024**3 / best / 1e9


def _model(console: "Console", name: str, trust_remote_code: bool, config: NALoRAConfig) -> None:
    from rich.table import Table

    from nalora_mlx.adapters import adapt
    from nalora_mlx.models import load_model

    model, _, _ = load_model(name, trust_remote_code)
    report = adapt(model, config)
    table = Table("gated MLP", "layout", "activation", "experts", "NA-LoRA")
    for gated in report.gated:
        table.add_row(gated.path, gated.layout, gated.activation, str(gated.experts or "-"), "yes")
    for skipped in report.skipped:
        table.add_row(skipped.path, "", "", "", skipped.reason)
    if report.gated or report.skipped:
        console.print(table)
    else:
        console.print("no gated MLP: NA-LoRA has nothing to act on, training would be plain LoRA")
    for notice in report.notices:
        console.print(f"finding: {notice}", markup=False)
    console.print(f"other adapted modules: {len(report.plain)}; keys: {', '.join(report.config.keys or ())}")


if __name__ == "__main__":
    from nalora_mlx.__main__ import main

    sys.exit(main(["doctor", *sys.argv[1:]]))
