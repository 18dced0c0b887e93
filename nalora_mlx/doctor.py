"""`nalora doctor`: one page on the machine, the model and the data before a run, with what is wrong and what helps."""

import argparse
import importlib.metadata
import math
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nalora_mlx import __version__
from nalora_mlx.cli import Parser, add_settings
from nalora_mlx.core.config import NALoRAConfig, NAParameters, RunConfig, load_run_config

if TYPE_CHECKING:
    import mlx.nn as nn

    from nalora_mlx.core.terminal import Page
    from nalora_mlx.data.checks import Rows
    from nalora_mlx.data.tokenization import Example, Split

DATA_SETTINGS = ("data", "mask_prompt", "max_seq_length", "show_masks")
MEMORY_SETTINGS = ("batch_size", "grad_checkpoint", "memory_budget", "quantize", "num_layers")
SLOW_GFLOPS = 20  # below this a CPU's float32 products run without a tuned BLAS
LITTLE_DISK = 2e9  # bytes; a run of a small model needs about so many
# What can be installed beside, and what it is for; which packages that takes is in pyproject.toml alone.
EXTRAS = {
    "export": "GGUF files",
    "kquants": "K-quants in GGUF files",
    "report": "nalora report",
    "tensorboard": "--report-to tensorboard",
    "vlm": "models that see",
    "notebook": "examples/finetune.ipynb",
}


def build_parser(prog: str) -> Parser:
    """Take the model, the data, and the settings that decide what would be adapted and how much memory it takes."""
    parser = Parser(
        prog=prog,
        description="Check the machine, and a run before it starts. Exit status 0 if a run can start, 2 if not.",
    )
    parser.add_argument("--model", help="local model directory or Hugging Face repo")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run code that the model brings along"
    )
    parser.add_argument("-c", "--config", type=Path, help="YAML file of a run; flags win")
    for title, names in (("data", DATA_SETTINGS), ("memory", MEMORY_SETTINGS)):
        others = set(RunConfig.__dataclass_fields__) - set(names)
        add_settings(parser.add_argument_group(title), RunConfig, skip=tuple(others))
    add_settings(
        parser.add_argument_group("adapter"),
        NALoRAConfig,
        skip=(*NAParameters.__dataclass_fields__, "num_layers"),
    )
    return parser


def run(args: argparse.Namespace) -> None:
    """Print the page.

    Raises:
        InputError: something keeps a run from starting.
    """
    from rich.console import Console

    from nalora_mlx.core.terminal import Page

    given = vars(args)
    name, remote, path = given.pop("model"), given.pop("trust_remote_code"), given.pop("config")
    config = load_run_config(path, given)
    replace(config, train=True).check()
    if name is None and config.model != RunConfig.model:
        name = config.model  # of the file
    page = Page(Console(highlight=False))
    with page.section("Machine"):
        _machine(page)
    with page.section("Kernels"):
        _kernels(page)
    loaded = examples = rows = None
    with page.section("Model"):
        if name is None:
            page.fact("none given; --model M says what NA-LoRA would do with it")
        else:
            loaded = _model(page, name, remote, config)
    with page.section("Data"):
        if path is None and "data" not in given:
            page.fact("none given; --data D checks its rows")
        else:
            rows = _rows(page, config)
            examples = _tokens(page, rows, loaded[1], config) if loaded else None
    with page.section("Memory"):
        _memory(page, loaded[0] if loaded else None, examples, config)
    with page.section("Disk"):
        _disk(page, loaded[0] if loaded else None, config)
    with page.section("Extras"):
        _extras(page)
    page.verdict()


# --- machine and kernels ------------------------------------------------------------------------------------


def _machine(page: "Page") -> None:
    import mlx.core as mx

    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("mlx", "mlx-lm"))
    page.fact(f"nalora {__version__}, {versions}, Python {platform.python_version()}, {platform.platform()}")
    device = mx.default_device()
    page.fact(f"device: {device}, {os.cpu_count()} processors")
    if device.type != mx.cpu:
        return
    speed = _gflops()
    if speed >= SLOW_GFLOPS:
        page.good(f"float32 products: {speed:.0f} GFLOP/s")
    else:
        page.finding(
            f"float32 products: {speed:.0f} GFLOP/s. No tuned BLAS is in use, and training takes some fifty times as "
            "long. Preload one: LD_PRELOAD=libopenblas.so.0 (package libopenblas0-pthread)"
        )
    if shutil.which("g++") is None and shutil.which("c++") is None:
        page.finding("no C++ compiler, so that mx.compile fuses nothing on the CPU. Install g++")


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


def _kernels(page: "Page") -> None:
    """Try every kernel of the gated residual against its reference, and time it."""
    from nalora_mlx.ops.kernels.backend import ENVIRONMENT, REFERENCE, backend

    chosen = backend()
    if chosen == REFERENCE:
        why = f"{ENVIRONMENT}={REFERENCE}" if os.environ.get(ENVIRONMENT) == REFERENCE else "no GPU in use"
        page.fact(f"gated residual: MLX's own operations ({why})")
        return
    from nalora_mlx.ops.kernels.survey import bandwidth, faults

    found = dict(faults(chosen))
    wrong = {kind: why for kind, why in found.items() if why is not None}
    agree = f"gated residual: {len(found) - len(wrong)} of {len(found)} {chosen} kernels agree with MLX"
    (page.fact if wrong else page.good)(agree)
    for kind, why in wrong.items():
        page.finding(
            f"the {chosen} kernel of {kind} is not used, since {why}. Training is right "
            "without it, and slower; please report it with this page"
        )
    if not wrong:
        copied, reached = bandwidth(chosen)
        page.fact(
            f"gated residual: {reached:.0f} GB/s, {reached / copied:.0%} of the {copied:.0f} GB/s of a copy"
        )


# --- model and data -----------------------------------------------------------------------------------------


def _model(page: "Page", name: str, trust_remote_code: bool, config: RunConfig) -> tuple["nn.Module", Any]:
    """Say what would be adapted in a model; returns it, adapted, and its tokenizer."""
    from mlx.utils import tree_flatten

    from nalora_mlx.adapters.attach import adapt, adapt_dora
    from nalora_mlx.models.loading import load_model

    model, tokenizer, _ = load_model(name, trust_remote_code, config.quantize)
    size = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    page.good(f"loaded: {len(model.layers)} layers, {size / 1e9:.2f} GB of weights")
    wanted = config.lora_config()
    layers = min(wanted.num_layers, len(model.layers))  # more than there are means all
    attach = adapt_dora if config.fine_tune_type == "dora" else adapt
    report = attach(model, replace(wanted, num_layers=layers))
    for path, rows in _alike((g.path, (g.layout, g.activation, g.experts)) for g in report.gated):
        layout, activation, experts = rows
        of = f", {experts} experts" if experts else ""
        page.good(f"{path}: {activation} ({layout}{of}): NA-LoRA")
    for path, reason in _alike((s.path, s.reason) for s in report.skipped):
        page.fact(f"{path}: {reason}")
    for notice in report.notices:
        page.finding(notice)
    if not report.gated and not report.skipped:
        page.finding("no gated MLP: NA-LoRA has nothing to act on, training would be plain LoRA")
    keys = ", ".join(report.config.keys or ())
    page.fact(
        f"{layers if layers > 0 else len(model.layers)} layers adapted, {len(report.plain)} other modules; keys: {keys}"
    )
    return model, tokenizer


def _alike(items: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Paths that differ in the number of the layer alone, as one: model.layers.0-15.mlp."""
    groups: dict[tuple[str, Any], list[int]] = {}
    for path, what in items:
        number = re.search(r"\d+", path)
        pattern = path if number is None else f"{path[: number.start()]}{{}}{path[number.end() :]}"
        groups.setdefault((pattern, what), []).append(int(number.group()) if number else 0)
    for (pattern, what), numbers in groups.items():
        yield pattern.replace("{}", _spans(sorted(numbers))), what


def _spans(numbers: list[int]) -> str:
    """Increasing numbers as spans: 0-3,7."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in spans)


def _rows(page: "Page", config: RunConfig) -> "Rows":
    """Say what is wrong with the rows, all of it; returns them."""
    from nalora_mlx.data.checks import read_rows
    from nalora_mlx.data.sources import SPLITS

    rows = read_rows(
        config, [name for name in SPLITS if name != "test" or not config.hf_dataset], all_needed=False
    )
    _all(page, rows.problems, rows.notices)
    return rows


def _tokens(page: "Page", rows: "Rows", tokenizer: Any, config: RunConfig) -> "list[Example]":
    """Say what becomes of the rows as tokens: what is cut or left out, lengths, masks; returns those of training."""
    from nalora_mlx.core.terminal import colours, marked_text
    from nalora_mlx.data.checks import tokenize
    from nalora_mlx.data.summary import histogram, marked, summary

    splits: dict[str, Split] = tokenize(rows, tokenizer, config.max_seq_length)
    for name, split in splits.items():
        _all(page, split.errors, split.notices)
        if split.examples:
            page.good(summary(name, split))
        if name == "train" and split.examples:
            for line in histogram(split.examples):
                page.console.print(f"  {line}", markup=False, soft_wrap=True)
    for example in splits["train"].examples[: config.show_masks]:
        text = marked_text(example.source, marked(example, tokenizer), colours(page.console))
        page.console.print(text, soft_wrap=not page.console.is_terminal)
    return list(splits["train"].examples)


def _all(page: "Page", problems: list[str], notices: list[str]) -> None:
    for say, sentences in ((page.problem, problems), (page.finding, notices)):
        for sentence in sentences:
            say(sentence)


# --- memory, disk, extras -----------------------------------------------------------------------------------


def _memory(
    page: "Page", model: "nn.Module | None", examples: "list[Example] | None", config: RunConfig
) -> None:
    """Say what memory there is, and what a run would need of it, measured on a few steps."""
    import numpy as np

    from nalora_mlx.data.tokenization import Example
    from nalora_mlx.training.memory_plan import default_budget, largest_batch, plan
    from nalora_mlx.training.optimizers import build_optimizer

    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    budget = config.memory_budget or default_budget()
    page.fact(f"{whole / 1e9:.1f} GB in this machine; a run should stay within {budget / 1e9:.1f} GB")
    if model is None:
        return
    if config.fine_tune_type == "full":
        page.fact("full fine-tuning is planned by nalora lora --plan")
        return
    if not examples:
        length = config.max_seq_length
        row = Example(np.ones(length, np.int32), np.ones(length, bool), "a full row")
        examples = [row] * config.batch_size
        page.fact(f"without --data, every row is taken to have {length} tokens (--max-seq-length)")
    optimizer = build_optimizer(
        config.optimizer,
        config.learning_rate,
        config.lr_schedule,
        config.optimizer_config.get(config.optimizer) or {},
    )
    with page.console.status("measuring a few training steps"):
        found = plan(model, largest_batch(examples, config), config, optimizer, budget)
    first, *others = (line.removeprefix("memory: ") for line in found.lines())
    if found.fits:
        page.good(first)
    else:
        page.finding(f"{first}; what would fit: {'; or '.join(found.remedies())}")
    for line in others:
        page.fact(line)


def _disk(page: "Page", model: "nn.Module | None", config: RunConfig) -> None:
    """Say whether a run's files have room."""
    from nalora_mlx.core.storage import free_space

    output = Path(config.adapter_path or ".").expanduser()
    free = free_space(output)
    where = f"{free / 1e9:.1f} GB free where {output} is, or would be"
    if model is not None:
        from nalora_mlx.adapters.files import adapter_weights
        from nalora_mlx.runs.directory import check_space

        adapter = sum(array.nbytes for array in adapter_weights(model).values())
        state = 2 * adapter  # the moments of Adam
        saves = math.ceil(config.iters / config.save_every)
        shortage = check_space(output, adapter, state, saves, config.keep_last)
        if shortage is not None:
            page.finding(shortage)
            return
        where += f"; {saves} checkpoint{'s' * (saves > 1)} of {(2 * adapter + state) / 1e6:.0f} MB fit"
    elif free < LITTLE_DISK:
        page.finding(f"{where}; make room, or choose another --adapter-path")
        return
    page.good(where)


def _extras(page: "Page") -> None:
    """Say what is installed of what is not needed, and how to get the rest."""
    there = [extra for extra in EXTRAS if (names := _packages(extra)) and all(map(_is_installed, names))]
    missing = [extra for extra in EXTRAS if extra not in there]
    if there:
        page.good(f"installed: {', '.join(there)}")
    if missing:
        uses = ", ".join(f"{extra} ({EXTRAS[extra]})" for extra in missing)
        page.fact(f"not installed: {uses}; pip install 'nalora-mlx[{','.join(missing)}]'")


def _packages(extra: str) -> list[str]:
    """The packages of an extra; none if what is installed is older than the extra, or is run from its source."""
    try:
        wanted = importlib.metadata.requires("nalora-mlx") or []
    except importlib.metadata.PackageNotFoundError:
        wanted = []
    named = re.compile(rf"([\w.-]+).*; *extra == ['\"]{extra}['\"]")
    return [match[1] for line in wanted if (match := named.match(line))]


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    from nalora_mlx.__main__ import main

    sys.exit(main(["doctor", *sys.argv[1:]]))
