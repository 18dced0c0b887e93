"""`nalora doctor`: check the machine, the model and the data before a run, with a remedy for every finding."""

import argparse
import math
import os
import platform
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nalora_mlx import __version__
from nalora_mlx.cli import Parser, add_settings
from nalora_mlx.core import machine, optional_dependencies
from nalora_mlx.core.config import NALoRAConfig, NAParameters, RunConfig, load_run_config
from nalora_mlx.core.errors import merged
from nalora_mlx.core.settings_without_effect import without_effect
from nalora_mlx.core.versions import library_versions

if TYPE_CHECKING:
    import mlx.nn as nn

    from nalora_mlx.core.terminal import Page
    from nalora_mlx.data.checks import RunData
    from nalora_mlx.data.tokenization import Example, Split

DATA_SETTINGS = (
    "data",
    *("prompt_feature", "completion_feature", "chat_feature", "text_feature"),
    *("valid_fraction", "chunk", "mask_prompt", "last_turn_only"),
    *("max_seq_length", "show_masks"),
    *("chat_template", "chat_template_args"),
)
MEMORY_SETTINGS = ("batch_size", "grad_checkpoint", "memory_budget", "quantize", "num_layers")
MOST_PROBLEMS = 100  # to show, and places of each
SLOW_GFLOPS = 20  # of float32 matrix products on a CPU; slower means that no optimized BLAS is in use
LOW_DISK = 2e9  # bytes; about what a run of a small model writes


def build_parser(prog: str) -> Parser:
    """Build a parser for the model, the data, and the settings that decide which layers are adapted and memory use."""
    parser = Parser(
        prog=prog,
        description="Check the machine, and a run before it starts. The exit status is 0 if the run can start, 1 if "
        "a kernel is wrong on this machine, else 2.",
    )
    parser.add_argument("--model", help="local model directory or Hugging Face repo")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    parser.add_argument("-c", "--config", type=Path, help="YAML file of a run; flags override it")
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
    """Print one page of checks.

    Raises:
        RunError: a kernel is wrong on this machine.
        InputError: a finding prevents the run from starting.
    """
    from rich.console import Console

    from nalora_mlx.core.terminal import Page
    from nalora_mlx.training.chats import configure_run_chats

    given = vars(args)
    name, remote, path = given.pop("model"), given.pop("trust_remote_code"), given.pop("config")
    config = load_run_config(path, given)
    config.train = True
    config.check()
    if name is None and config.model != RunConfig.model:
        name = config.model  # from the YAML file
    page = Page(Console(highlight=False))
    if notices := without_effect(config):
        with page.section("Settings"):
            _print_all(page, [], notices)
    with page.section("Machine"):
        _check_machine(page)
    with page.section("Kernels"):
        _check_kernels(page)
    model = tokenizer = model_config = examples = None
    with page.section("Model"):
        if name is None:
            page.fact("none given; --model M shows what NA-LoRA would adapt")
        else:
            model, tokenizer, model_config = _check_model(page, name, remote, config)
    with page.section("Data"):
        if path is None and "data" not in given:
            page.fact("none given; --data D checks its rows")
        else:
            examples = []
            rows = _check_rows(page, config)
            if model_config is not None:
                configure_run_chats(config, tokenizer, None, page.finding)
                examples = _check_tokens(page, rows, tokenizer, model_config, config)
    with page.section("Memory"):
        _check_memory(page, model, examples, config)
    with page.section("Disk"):
        _check_disk(page, model, config)
    with page.section("Extras"):
        _check_extras(page)
    page.verdict()


# --- machine and kernels ------------------------------------------------------------------------------------


def _check_machine(page: "Page") -> None:
    """Report versions and device. On a CPU, check the speed of matrix products; on a GPU, their precision."""
    import mlx.core as mx

    versions = ", ".join(f"{name} {version}" for name, version in library_versions("mlx", "mlx-lm").items())
    page.fact(f"nalora {__version__}, {versions}, Python {platform.python_version()}, {platform.platform()}")
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    page.fact(f"{'CPU' if on_cpu else 'GPU'}: {machine.describe_device(mx.device_info())}")
    if not on_cpu:
        page.fact(machine.describe_float32_products())
        return
    speed = machine.matmul_gflops()
    if speed >= SLOW_GFLOPS:
        page.good(f"float32 matrix products: {speed:.0f} GFLOP/s")
    else:
        page.finding(
            f"float32 matrix products: {speed:.0f} GFLOP/s. No optimized BLAS is in use, which makes training about "
            "fifty times slower. Preload one: LD_PRELOAD=libopenblas.so.0 (package libopenblas0-pthread)"
        )
    if not machine.has_cpp_compiler():
        page.finding("no C++ compiler, without which mx.compile fuses no operations on the CPU. Install g++")


def _check_kernels(page: "Page") -> None:
    """Compare every kernel of the gated residual with its reference, and time the forward kernel."""
    from nalora_mlx.ops.kernels.backend import ENVIRONMENT, REFERENCE, backend

    chosen = backend()
    if chosen == REFERENCE:
        why = f"{ENVIRONMENT}={REFERENCE}" if os.environ.get(ENVIRONMENT) == REFERENCE else "no GPU in use"
        page.fact(f"gated residual: MLX's own operations ({why})")
        return
    from nalora_mlx.ops.kernels.healthcheck import check_kernels, kinds, measure_bandwidth

    page.fact(f"compiling {2 * len(list(kinds(chosen)))} kernels, which takes longer the first time")
    found = dict(check_kernels(chosen))
    wrong = {kind: why for kind, why in found.items() if why is not None}
    agree = f"gated residual: {len(found) - len(wrong)} of {len(found)} {chosen} kernels agree with MLX"
    (page.fact if wrong else page.good)(agree)
    for kind, why in wrong.items():
        page.failure(
            f"the {chosen} kernel of {kind} is not used, since {why}. Training is correct "
            "without it, but slower; please report this page"
        )
    if not wrong:
        copied, reached = measure_bandwidth(chosen)
        page.fact(
            f"gated residual: {reached:.0f} GB/s, {reached / copied:.0%} of the {copied:.0f} GB/s of a copy"
        )


# --- model and data -----------------------------------------------------------------------------------------


def _check_model(
    page: "Page", name: str, trust_remote_code: bool, config: RunConfig
) -> tuple["nn.Module", Any, dict[str, Any]]:
    """Load and adapt a model, and report what is adapted; return it, its tokenizer and its config."""
    from nalora_mlx.adapters.attach import adapt, adapt_dora
    from nalora_mlx.adapters.descriptions import group_layers, group_reasons
    from nalora_mlx.core.trees import nbytes
    from nalora_mlx.models.loading import load_model

    model, tokenizer, model_config = load_model(name, trust_remote_code, config.quantize, page.finding)
    size = nbytes(model.parameters())
    page.good(f"loaded: {len(model.layers)} layers, {size / 1e9:.2f} GB of weights")
    wanted = config.lora_config()
    layers = min(wanted.num_layers, len(model.layers))  # a larger number means all
    attach = adapt_dora if config.fine_tune_type == "dora" else adapt
    result = attach(model, replace(wanted, num_layers=layers))
    for path, (layout, activation, experts) in group_layers(
        (g.path, (g.layout, g.activation, g.experts)) for g in result.gated
    ):
        of = f", {experts} experts" if experts else ""
        page.good(f"{path}: {activation} ({layout}{of}): NA-LoRA")
    for path, reason in group_layers((s.path, s.reason) for s in result.skipped):
        page.fact(f"{path}: {reason}")
    for notice in result.notices:
        page.finding(notice)
    if not result.gated and not result.skipped:
        page.finding("no gated MLP: NA-LoRA has nothing to act on, and training would be plain LoRA")
    keys = ", ".join(result.config.keys or ())
    adapted = layers if layers > 0 else len(model.layers)
    page.fact(f"{adapted} layers adapted, {len(result.plain)} other modules; keys: {keys}")
    if result.left_out:
        page.fact(f"left out by default: {group_reasons(result.left_out)}")
    return model, tokenizer, model_config


def _check_rows(page: "Page", config: RunConfig) -> "RunData":
    """Read the rows, and report everything that is wrong with them."""
    from nalora_mlx.data.checks import read_rows
    from nalora_mlx.data.sources.loading import SPLITS

    rows = read_rows(
        config, [name for name in SPLITS if name != "test" or not config.hf_dataset], all_needed=False
    )
    _print_all(page, rows.problems, rows.notices)
    return rows


def _check_tokens(
    page: "Page", rows: "RunData", tokenizer: Any, model_config: dict[str, Any], config: RunConfig
) -> "list[Example]":
    """Tokenize the rows; report truncated and omitted rows, lengths and masks. Return the training examples."""
    from nalora_mlx.core.terminal import has_colors, marked_text
    from nalora_mlx.data.checks import tokenize
    from nalora_mlx.data.summary import histogram, mask_pieces, summary
    from nalora_mlx.models.context_length import context_notices
    from nalora_mlx.training.schedules import length_notices

    splits: dict[str, Split] = tokenize(rows, tokenizer, config.max_seq_length)
    for name, split in splits.items():
        _print_all(page, split.errors, split.notices)
        if split.sequences:
            page.good(summary(name, split))
        if name == "train" and split.sequences:
            for line in histogram(split.sequences):
                page.console.print(f"  {line}", markup=False, soft_wrap=True)
    _print_all(page, [], context_notices(splits, model_config) + length_notices(config, splits))
    for example in splits["train"].sequences[: config.show_masks]:
        text = marked_text(example.source, mask_pieces(example, tokenizer), has_colors(page.console))
        page.console.print(text, soft_wrap=not page.console.is_terminal)
    return list(splits["train"].sequences)


def _print_all(page: "Page", problems: list[str], notices: list[str]) -> None:
    for problem in merged(problems, MOST_PROBLEMS):
        page.problem(problem)
    for notice in notices:
        page.finding(notice)


# --- memory, disk, extras -----------------------------------------------------------------------------------


def _check_memory(
    page: "Page", model: "nn.Module | None", examples: "list[Example] | None", config: RunConfig
) -> None:
    """Report the machine's memory and what the run needs of it: an upper bound, or else measured on a few steps."""
    import numpy as np

    from nalora_mlx.data.tokenization import Example
    from nalora_mlx.training.memory_plan import (
        default_budget,
        device_memory,
        largest_batch,
        measure,
        planning_step,
        upper_bound_bytes,
    )
    from nalora_mlx.training.optimizers import build_optimizer

    budget = config.memory_budget or default_budget()
    page.fact(
        f"this machine has {device_memory() / 1e9:.1f} GB; a run should stay within {budget / 1e9:.1f} GB"
    )
    if model is None:
        return
    unusable = examples == []
    if unusable or config.fine_tune_type == "full":
        page.fact(f"not measured: {'no row can be trained on' if unusable else 'use nalora lora --plan'}")
        return
    if examples is None:
        length = config.max_seq_length
        row = Example(np.ones(length, np.int32), np.ones(length, bool), "a full row")
        examples = [row] * config.batch_size
        page.fact(f"without --data, all rows are assumed to have {length} tokens (--max-seq-length)")
    optimizer = build_optimizer(
        config.optimizer,
        config.learning_rate,
        config.lr_schedule,
        config.optimizer_config.get(config.optimizer) or {},
    )
    step, shape = planning_step(model, config, optimizer), largest_batch(examples, config)
    bound = upper_bound_bytes(step, shape, config)
    if bound <= budget:
        page.good(
            f"at most {bound / 1e9:.2f} GB for the largest batch, {shape.rows} x {shape.length} tokens: fits; "
            "nalora lora --plan measures it"
        )
        return
    with page.console.status("measuring memory on a few training steps"):
        found = measure(step, shape, config, budget)
    first, *others = (line.removeprefix("memory: ") for line in found.lines())
    if found.fits:
        page.good(first)
    else:
        page.finding(f"{first}; what would fit: {'; or '.join(found.remedies())}")
    for line in others:
        page.fact(line)


def _check_disk(page: "Page", model: "nn.Module | None", config: RunConfig) -> None:
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
            page.finding(shortage)
            return
        space += f"; {saves} checkpoint{'s' * (saves > 1)} of {(2 * adapter + state) / 1e6:.0f} MB fit"
    elif free < LOW_DISK:
        page.finding(f"{space}; free some space, or choose another --adapter-path")
        return
    page.good(space)


def _check_extras(page: "Page") -> None:
    """Report which optional dependencies are installed, and how to install the others."""
    installed = optional_dependencies.installed_extras()
    missing = [extra for extra in optional_dependencies.EXTRAS if extra not in installed]
    if installed:
        page.good(f"installed: {', '.join(installed)}")
    if missing:
        uses = ", ".join(f"{extra} ({optional_dependencies.EXTRAS[extra]})" for extra in missing)
        page.fact(f"not installed: {uses}; pip install 'nalora-mlx[{','.join(missing)}]'")


if __name__ == "__main__":
    from nalora_mlx.__main__ import main

    sys.exit(main(["doctor", *sys.argv[1:]]))
