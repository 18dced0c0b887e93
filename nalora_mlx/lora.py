"""`nalora lora`: fine-tune a model with NA-LoRA (or LoRA, DoRA, all weights) and evaluate it."""

import argparse
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nalora_mlx.cli import Parser, add_settings
from nalora_mlx.config import NALoRAConfig, NAParameters, RunConfig, load_run_config
from nalora_mlx.errors import InputError

if TYPE_CHECKING:
    import mlx.nn as nn

    from nalora_mlx.data import Split
    from nalora_mlx.display import Display

RUN_FILES = ("adapters.safetensors", "adapter_config.json", "metrics.jsonl", "best", "checkpoints")


def build_parser(prog: str) -> Parser:
    """Make a flag of every setting; the YAML-only ones are those of mlx_lm.lora."""
    parser = Parser(prog=prog, description="Fine-tune a model with NA-LoRA, and evaluate it.")
    parser.add_argument(
        "-c", "--config", type=Path, help="YAML file of settings, as of mlx_lm.lora; flags win"
    )
    add_settings(parser.add_argument_group("run"), RunConfig)
    lora = parser.add_argument_group("adapter (lora_parameters in YAML)")
    na_names = tuple(NAParameters.__dataclass_fields__)
    add_settings(lora, NALoRAConfig, skip=(*na_names, "num_layers"))
    na = parser.add_argument_group("NA-LoRA (na_parameters in YAML)")
    add_settings(na, NAParameters)
    return parser


def run(args: argparse.Namespace) -> None:
    """Read, check, load, train, test."""
    flags = vars(args)
    config = load_run_config(flags.pop("config"), flags)
    config.check()
    from nalora_mlx.data import SPLITS

    names = [n for n in SPLITS if (n == "test" and config.test) or (n != "test" and config.train)]
    rows = _read(config, names)
    resume = _resume_file(config)
    from nalora_mlx.display import Display
    from nalora_mlx.models import load_model

    with Display() as display, _awake():
        display.note(f"loading {config.model}")
        model, tokenizer, _ = load_model(config.model, config.trust_remote_code, config.quantize)
        if _slow_on_cpu(model):
            display.note(
                "note: half-precision weights are some fifty times slower than float32 on a CPU; "
                "mlx_lm.convert --dtype float32 makes a float32 copy"
            )
        splits = _tokenize(config, rows, tokenizer, display)
        if config.train:
            _train(config, model, splits, display, resume)
        elif config.adapter_path:
            from nalora_mlx.adapters import load_any_adapter

            load_any_adapter(model, Path(config.adapter_path).expanduser())
        if config.test:
            _test(config, model, splits["test"], display)


def _slow_on_cpu(model: "nn.Module") -> bool:
    import mlx.core as mx
    from mlx.utils import tree_flatten

    half = (mx.float16, mx.bfloat16)
    return mx.default_device() == mx.Device(mx.cpu) and any(
        array.dtype in half for _, array in tree_flatten(model.parameters())
    )


# --- data ---------------------------------------------------------------------------------------------------


def _read(config: RunConfig, names: list[str]) -> list[tuple[Any, dict[str, Any]]]:
    """Rows of each source with the features that they go by, before anything slow is loaded."""
    from nalora_mlx import data

    def features(entry: Any) -> data.Features:
        return data.Features(
            prompt=entry("prompt_feature"),
            completion=entry("completion_feature"),
            chat=entry("chat_feature"),
            text=entry("text_feature"),
            mask_prompt=config.mask_prompt,
        )

    sources: list[tuple[Any, dict[str, Any]]]
    if config.hf_dataset:
        entries = config.hf_dataset if isinstance(config.hf_dataset, list) else [config.hf_dataset]
        sources = [
            (
                features(lambda key, e=entry: e.get(key, getattr(config, key))),
                data.load_hub_entry(entry, names),
            )
            for entry in entries
        ]
    else:
        directory = Path(config.data).expanduser()
        if directory.is_dir():
            rows = data.load_local(directory, names)
        elif directory.exists() or config.data.startswith((".", "/", "~")) or config.data.count("/") > 1:
            raise InputError(
                f"--data {config.data}: no such directory; give one with train.jsonl (and valid, test)"
            )
        else:
            rows = data.load_hub(config.data, names)
        sources = [(features(lambda key: getattr(config, key)), rows)]
    for name in names:
        if name != "valid" and not any(rows[name] for _, rows in sources):
            raise InputError(
                f"--data {config.data}: no rows for {name}; add a {name}.jsonl that is not empty"
            )
    return sources


def _tokenize(
    config: RunConfig, sources: list[tuple[Any, dict[str, Any]]], tokenizer: Any, display: "Display"
) -> "dict[str, Split]":
    from nalora_mlx.data import Split, tokenize_split

    splits: dict[str, Split] = {}
    for features, rows in sources:
        for name, part in rows.items():
            split = splits.setdefault(name, Split([]))
            done = tokenize_split(part, tokenizer, features, config.max_seq_length, name)
            split.examples.extend(done.examples)
            split.notices.extend(done.notices)
    for name, split in splits.items():
        supervised = sum(int(e.supervised.sum()) for e in split.examples)
        total = sum(len(e.tokens) for e in split.examples)
        if total:
            share = supervised / total
            display.note(f"{name}: {len(split)} rows, {total} tokens, {share:.0%} of them supervised")
        for notice in split.notices:
            display.note(f"note: {notice}")
    if config.train and not splits["valid"].examples:
        display.note("note: no validation set (valid.jsonl), so there is no validation and no best adapter")
    return splits


# --- train and test -----------------------------------------------------------------------------------------


def _resume_file(config: RunConfig) -> Path | None:
    """The adapter weights to start from, of a file or of an adapter's directory."""
    if config.resume_adapter_file is None:
        return None
    path = Path(config.resume_adapter_file).expanduser()
    if path.is_dir():
        path = path / "adapters.safetensors"
    if not path.exists():
        raise InputError(f"--resume-adapter-file {config.resume_adapter_file}: no adapters.safetensors there")
    return path


def _train(
    config: RunConfig, model: "nn.Module", splits: "dict[str, Split]", display: "Display", resume: Path | None
) -> None:
    import mlx.core as mx

    from nalora_mlx.adapters import adapter_weights, load_weights
    from nalora_mlx.checkpoint import json_writer, set_aside
    from nalora_mlx.metrics import MetricsFile
    from nalora_mlx.optim import build_optimizer
    from nalora_mlx.trainer import check, train

    output = Path(config.adapter_path or ".").expanduser()
    if output.exists() and not output.is_dir():
        raise InputError(f"--adapter-path {output}: is a file; give a directory")
    mx.random.seed(config.seed)
    settings = config.optimizer_config.get(config.optimizer) or {}
    optimizer = build_optimizer(config.optimizer, config.learning_rate, config.lr_schedule, settings)
    description = _prepare(config, model, display)
    if resume is not None:
        load_weights(model, resume)
        mx.eval(model.parameters())  # read now: the file may be set aside next
        display.note(f"starting from {resume}")
    check(model, splits["train"].examples, config)
    reporters = _reporters(config)
    json_writer(description)  # fails here, not after an hour, if it holds what JSON cannot
    trainable = sum(array.size for array in adapter_weights(model).values())
    display.note(f"{trainable:,} trainable parameters, optimizer {config.optimizer}")
    # Nothing can be refused from here on: only now is an earlier run moved out of the way.
    # A run that was stopped early may have left a best adapter and metrics only.
    is_run = any((output / name).exists() for name in (*RUN_FILES[:3], "best/adapters.safetensors"))
    if is_run and (aside := set_aside(output, RUN_FILES)):
        display.note(f"note: moved the run that was in {output} to {aside}")
    listeners = [display, MetricsFile(output / "metrics.jsonl"), *reporters]
    result = train(
        model,
        splits["train"].examples,
        splits["valid"].examples,
        config,
        optimizer,
        output,
        listeners,
        description,
    )
    if result.best_valid_loss is not None:
        display.note(
            f"validation loss {result.first_valid_loss:.4f} before, {result.valid_loss:.4f} after, "
            f"best {result.best_valid_loss:.4f} at iteration {result.best_iteration} ({output / 'best'})"
        )
    display.note(f"done in {result.seconds:.0f} s: adapter in {output}")


def _prepare(config: RunConfig, model: "nn.Module", display: "Display") -> dict[str, Any]:
    """Make the model trainable as the fine-tune type says; returns the content of adapter_config.json."""
    from nalora_mlx.adapters import adapt, adapt_dora, adapter_description

    if config.fine_tune_type == "full":
        if any("scales" in module for _, module in model.named_modules()):
            raise InputError("--fine-tune-type full: the model is quantized, and only adapters train on it")
        model.freeze()
        count = min(config.num_layers, len(model.layers)) if config.num_layers > 0 else len(model.layers)
        for layer in model.layers[len(model.layers) - count :]:
            layer.unfreeze()
        display.note(f"full fine-tuning of {count} layers")
        return {"fine_tune_type": "full", "num_layers": count}
    attach = adapt_dora if config.fine_tune_type == "dora" else adapt
    report = attach(model, config.adapter_config())
    for notice in report.notices:
        display.note(f"note: {notice}")
    for skipped in report.skipped:
        display.note(f"note: {skipped.path}: {skipped.reason}")
    names = {"na-lora": "NA-LoRA", "lora": "LoRA", "dora": "DoRA"}
    display.note(
        f"{names[config.fine_tune_type]} of rank {report.config.rank} on {report.config.num_layers} layers: "
        f"{len(report.gated)} gated MLPs"
        + (f" ({', '.join(sorted({g.activation for g in report.gated}))})" if report.gated else "")
        + f", {len(report.plain)} other modules"
    )
    if config.fine_tune_type == "lora":
        display.note("note: plain LoRA, as asked; fine_tune_type na-lora (the default) gives NA-LoRA")
    return adapter_description(model)


def _reporters(config: RunConfig) -> list[Any]:
    """Listeners for the services named in report_to, through mlx-lm's callbacks."""
    if not config.report_to:
        return []
    from mlx_lm.tuner.callbacks import get_reporting_callbacks

    try:
        callback = get_reporting_callbacks(
            config.report_to,
            project_name=config.project_name,
            log_dir=config.adapter_path,
            config={k: v for k, v in vars(config).items() if not isinstance(v, Path)},
        )
    except (ImportError, ValueError) as error:
        raise InputError(f"--report-to {config.report_to}: {error}") from None

    def listen(event: dict[str, Any]) -> None:
        if event.get("split") == "train":
            callback.on_train_loss_report(
                {
                    "iteration": event["step"],
                    "train_loss": event["loss"],
                    "learning_rate": event["learning_rate"],
                    "iterations_per_second": event["iterations_per_second"],
                    "tokens_per_second": event["tokens_per_second"],
                    "trained_tokens": event["tokens"],
                    "peak_memory": event["peak_memory_gb"],
                }
            )
        elif event.get("split") == "valid":
            callback.on_val_loss_report(
                {"iteration": event["step"], "val_loss": event["loss"], "val_time": event["seconds"]}
            )

    return [listen]


def _test(config: RunConfig, model: "nn.Module", split: "Split", display: "Display") -> None:
    from nalora_mlx.batches import evaluation_batches
    from nalora_mlx.metrics import MetricsFile
    from nalora_mlx.trainer import evaluate

    batches = evaluation_batches(split.examples, config.batch_size, config.test_batches, config.seed)
    loss, tokens = evaluate(model, batches)
    display.note(f"test loss {loss:.4f}, perplexity {math.exp(min(loss, 700)):.3f}, over {tokens} tokens")
    output = Path(config.adapter_path).expanduser()
    if config.adapter_path and output.is_dir():
        record = {"event": "metrics", "split": "test", "loss": loss, "tokens": tokens}
        MetricsFile(output / "metrics.jsonl")(record)


@contextmanager
def _awake() -> Iterator[None]:
    """Keep a Mac from sleeping while the run goes on."""
    if sys.platform != "darwin":
        yield
        return
    try:
        process = subprocess.Popen(["caffeinate", "-i", "-w", str(os.getpid())])
    except OSError:
        yield
        return
    try:
        yield
    finally:
        process.terminate()


if __name__ == "__main__":
    from nalora_mlx.__main__ import main

    sys.exit(main(["lora", *sys.argv[1:]]))
