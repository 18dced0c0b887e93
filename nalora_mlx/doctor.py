"""`nalora doctor`: look at the machine, the model and the data before a run, and say what is wrong with them."""

import argparse
import importlib.metadata
import os
import platform
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nalora_mlx import __version__
from nalora_mlx.cli import Parser, add_settings
from nalora_mlx.config import NALoRAConfig, NAParameters, RunConfig, load_run_config
from nalora_mlx.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from nalora_mlx.validate import Rows

DATA_SETTINGS = ("data", "mask_prompt", "max_seq_length", "show_masks")
MOST_FINDINGS = 50  # on the data; who has more has seen enough
SLOW_GFLOPS = 20  # below this a CPU's float32 products run without a tuned BLAS


def build_parser(prog: str) -> Parser:
    """Take the model and what would be adapted in it."""
    parser = Parser(prog=prog, description="Check the machine, and what NA-LoRA would do with a model.")
    parser.add_argument("--model", help="local model directory or Hugging Face repo")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run code that the model brings along"
    )
    parser.add_argument("-c", "--config", type=Path, help="YAML file of a run, for the keys of its data")
    others = set(RunConfig.__dataclass_fields__) - set(DATA_SETTINGS)
    add_settings(parser.add_argument_group("data"), RunConfig, skip=tuple(others))
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
    _kernels(console)
    given = vars(args)
    name, remote, path = given.pop("model"), given.pop("trust_remote_code"), given.pop("config")
    of_data = {key: given.pop(key) for key in DATA_SETTINGS if key in given}
    config = load_run_config(path, of_data)
    if name is None and config.model != RunConfig.model:
        name = config.model  # of the file
    rows = _rows(console, config) if path is not None or "data" in of_data else None
    problems = len(rows.problems) if rows else 0
    if name is not None:
        tokenizer = _model(console, name, remote, NALoRAConfig(**given))
        problems += _tokens(console, rows, tokenizer, config) if rows else 0
    if problems:
        raise InputError(f"--data: {problems} findings that keep a run from starting; they are listed above")


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


def _kernels(console: "Console") -> None:
    """Try every kernel of the gated residual against its reference, and time it."""
    from nalora_mlx.kernels.backend import ENVIRONMENT, REFERENCE, backend

    chosen = backend()
    if chosen == REFERENCE:
        why = f"{ENVIRONMENT}={REFERENCE}" if os.environ.get(ENVIRONMENT) == REFERENCE else "no GPU in use"
        console.print(f"gated residual: MLX's own operations ({why})", markup=False)
        return
    from nalora_mlx.kernels.survey import bandwidth, faults

    found = dict(faults(chosen))
    wrong = {kind: why for kind, why in found.items() if why is not None}
    console.print(
        f"gated residual: {len(found) - len(wrong)} of {len(found)} {chosen} kernels agree with MLX"
    )
    for kind, why in wrong.items():
        console.print(
            f"finding: the {chosen} kernel of {kind} is not used, since {why}. Training is right "
            "without it, and slower; please report it with this page",
            markup=False,
        )
    if not wrong:
        copied, reached = bandwidth(chosen)
        share = f"{reached / copied:.0%} of the {copied:.0f} GB/s of a copy"
        console.print(f"gated residual: {reached:.0f} GB/s, {share}")


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


def _model(console: "Console", name: str, trust_remote_code: bool, config: NALoRAConfig) -> Any:
    """Say what would be adapted in a model; returns its tokenizer."""
    from rich.table import Table

    from nalora_mlx.adapters import adapt
    from nalora_mlx.models import load_model

    model, tokenizer, _ = load_model(name, trust_remote_code)
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
    return tokenizer


def _rows(console: "Console", config: RunConfig) -> "Rows":
    """Say what is wrong with the rows, all of it; returns them."""
    from nalora_mlx.rows import SPLITS
    from nalora_mlx.validate import read_rows

    rows = read_rows(
        config, [name for name in SPLITS if name != "test" or not config.hf_dataset], all_needed=False
    )
    _findings(console, rows.problems + rows.notices)
    return rows


def _tokens(console: "Console", rows: "Rows", tokenizer: Any, config: RunConfig) -> int:
    """Say what becomes of the rows as tokens: what is cut or left out, lengths, masks; counts the problems."""
    from nalora_mlx.display import marked_text
    from nalora_mlx.validate import histogram, marked, summary, tokenize

    splits = tokenize(rows, tokenizer, config.max_seq_length)
    for name, split in splits.items():
        _findings(console, split.errors + split.notices)
        if split.examples:
            console.print(summary(name, split), markup=False, soft_wrap=True)
            console.print("\n".join(histogram(split.examples)), markup=False)
    for example in splits["train"].examples[: config.show_masks]:
        text = marked_text(example.source, marked(example, tokenizer), console.color_system is not None)
        console.print(text, soft_wrap=not console.is_terminal)
    return sum(len(split.errors) for split in splits.values())


def _findings(console: "Console", sentences: list[str]) -> None:
    for sentence in sentences[:MOST_FINDINGS]:
        console.print(f"finding: {sentence}", markup=False, soft_wrap=True)
    if len(sentences) > MOST_FINDINGS:
        console.print(f"finding: {len(sentences) - MOST_FINDINGS} more of these")


if __name__ == "__main__":
    from nalora_mlx.__main__ import main

    sys.exit(main(["doctor", *sys.argv[1:]]))
