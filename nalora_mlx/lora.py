"""`nalora lora`: fine-tune a model with NA-LoRA (or LoRA, DoRA, all weights) and evaluate it."""

import argparse
import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from nalora_mlx.cli import Parser, add_settings
from nalora_mlx.core.config import NALoRAConfig, NAParameters, RunConfig, load_run_config
from nalora_mlx.core.errors import InputError, first_line, listed

if TYPE_CHECKING:
    import mlx.nn as nn

    from nalora_mlx.data.checks import Rows
    from nalora_mlx.data.tokenization import Split
    from nalora_mlx.runs.display import Display

T = TypeVar("T")
AGAIN = "the same command with --resume goes on from there"


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
    if config.plan:
        config.train, config.test = True, False  # all that comes before training, and no test
    from nalora_mlx.data.sources import SPLITS

    names = [n for n in SPLITS if (n == "test" and config.test) or (n != "test" and config.train)]
    with _display() as display, _awake():
        rows = _read(config, names, display)
        start = _start(config)
        from nalora_mlx.data.checks import tokenize
        from nalora_mlx.models.loading import is_quantized, load_module, load_tokenizer
        from nalora_mlx.training.out_of_memory import memory_advice

        display.note(f"loading {config.model}")
        tokenizer = load_tokenizer(config.model, config.trust_remote_code)
        tokenized = _in_background(lambda: tokenize(rows, tokenizer, config.max_seq_length))
        model, description = load_module(config.model, config.trust_remote_code, config.quantize)
        if _slow_on_cpu(model):
            display.note(
                "note: half-precision weights are some fifty times slower than float32 on a CPU; "
                "mlx_lm.convert --dtype float32 makes a float32 copy"
            )
        splits = _checked(config, tokenized(), tokenizer, display)
        begun = threading.Event()
        with memory_advice(config, _output(config), is_quantized(description), start, begun):
            if config.train:
                _train(config, model, splits, display, start, begun)
            elif config.adapter_path:
                from nalora_mlx.adapters.files import load_any_adapter

                load_any_adapter(model, Path(config.adapter_path).expanduser())
            if config.test:
                _test(config, model, splits["test"], display)


def _in_background(work: Callable[[], T]) -> Callable[[], T]:
    """Start work in a thread, for which a process that ends does not wait; its result or exception when asked."""
    future: Future[T] = Future()

    def thread() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=thread, daemon=True).start()
    return future.result


def _display() -> "Display":
    """What shows the run: only on the first of several workers."""
    from rich.console import Console

    from nalora_mlx.runs.display import Display
    from nalora_mlx.training.distributed import workers

    return Display(Console(quiet=True)) if workers().rank else Display()


def _slow_on_cpu(model: "nn.Module") -> bool:
    import mlx.core as mx
    from mlx.utils import tree_flatten

    half = (mx.float16, mx.bfloat16)
    return mx.default_device() == mx.Device(mx.cpu) and any(
        array.dtype in half for _, array in tree_flatten(model.parameters())
    )


# --- data ---------------------------------------------------------------------------------------------------


def _read(config: RunConfig, names: list[str], display: "Display") -> "Rows":
    """The rows of the splits that are needed, before anything slow is loaded; notices of what is odd in them.

    Raises:
        InputError: lists the rows that cannot be used.
    """
    from nalora_mlx.data.checks import read_rows

    rows = read_rows(config, names, compare_with_test=config.train)
    if rows.problems:
        raise InputError(listed(rows.problems))
    for notice in rows.notices:
        display.note(f"note: {notice}")
    return rows


def _checked(
    config: RunConfig, splits: "dict[str, Split]", tokenizer: Any, display: "Display"
) -> "dict[str, Split]":
    """The tokenized splits, when a person was told of them.

    Raises:
        InputError: lists the rows that cannot be used.
    """
    from nalora_mlx.data.summary import histogram, marked, summary

    if errors := [error for split in splits.values() for error in split.errors]:
        raise InputError(listed(errors))
    for name, split in splits.items():
        if split.examples:
            display.note(summary(name, split))
            if name == "train":
                display.note("\n".join(histogram(split.examples)))
        for notice in split.notices:
            display.note(f"note: {notice}")
    if config.train and not splits["valid"].examples:
        display.note("note: no validation set (valid.jsonl), so there is no validation and no best adapter")
    for example in next(iter(splits.values())).examples[: config.show_masks]:
        display.masks(example.source, marked(example, tokenizer))
    return splits


# --- train and test -----------------------------------------------------------------------------------------


def _output(config: RunConfig) -> Path:
    return Path(config.adapter_path or ".").expanduser()


def _start(config: RunConfig) -> Path | None:
    """What training starts from: a checkpoint, or adapter weights of a file or of an adapter's directory.

    Raises:
        InputError: it is not there, or the adapter's directory cannot take a run.
    """
    if not config.train:
        return None
    from nalora_mlx.core.storage import check_writable
    from nalora_mlx.runs.directory import holds_run
    from nalora_mlx.runs.resume import find, read_state

    output = _output(config)
    check_writable(output)
    holds_run(output)
    if config.resume is not None:
        checkpoint = find(config.resume, output)
        read_state(checkpoint)
        return checkpoint
    if config.resume_adapter_file is None:
        return None
    path = Path(config.resume_adapter_file).expanduser()
    if path.is_dir():
        path = path / "adapters.safetensors"
    if not path.exists():
        raise InputError(f"--resume-adapter-file {config.resume_adapter_file}: no adapters.safetensors there")
    return path


def _train(
    config: RunConfig,
    model: "nn.Module",
    splits: "dict[str, Split]",
    display: "Display",
    start: Path | None,
    begun: threading.Event,
) -> None:
    """Plan and train; sets `begun` when the output directory is this run's."""
    import mlx.core as mx

    from nalora_mlx.adapters.files import adapter_weights, load_weights
    from nalora_mlx.core import storage
    from nalora_mlx.core.signals import SIGNALS, Stopped, stoppable
    from nalora_mlx.runs import checkpoints
    from nalora_mlx.runs.loggers import reporters
    from nalora_mlx.runs.metrics import METRICS_FILE, MetricsFile
    from nalora_mlx.runs.record import RECORD_FILE, RecordFile
    from nalora_mlx.training import distributed
    from nalora_mlx.training.memory_plan import advice, default_budget
    from nalora_mlx.training.optimizers import build_optimizer
    from nalora_mlx.training.run import Listener
    from nalora_mlx.training.trainer import train

    output = _output(config)
    mx.random.seed(config.seed)
    settings = config.optimizer_config.get(config.optimizer) or {}

    def new_optimizer() -> Any:
        return build_optimizer(config.optimizer, config.learning_rate, config.lr_schedule, settings)

    try:  # some settings fail in a step only
        one = {"one": mx.ones((1, 1))}
        mx.eval(new_optimizer().apply_gradients(one, one))
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"optimizer_config.{config.optimizer}: {first_line(error)}") from None
    optimizer = new_optimizer()
    description = _prepare(config, model, display)
    if start is not None and config.resume is None:
        load_weights(model, start)
        mx.eval(model.parameters())  # read now: the file may be set aside next
        display.note(f"starting from {start}")
    display.status.memory_limit = default_budget()
    storage.json_writer(description)  # fails here, not after an hour, if it holds what JSON cannot
    trainable = sum(array.size for array in adapter_weights(model).values())
    display.note(f"{trainable:,} trainable parameters, optimizer {config.optimizer}")
    for line in advice(model, splits["train"].examples, config, new_optimizer, distributed.workers()):
        display.note(line)
    if config.plan:
        return
    if config.memory_budget is not None:
        mx.set_memory_limit(config.memory_budget)  # near it MLX waits for what is under way and frees it

    if config.resume is not None:
        display.note(f"resuming from {start}")
    listeners: list[Listener] = []
    if distributed.workers().rank == 0:
        record = RecordFile(output / RECORD_FILE, config, splits, display.note)
        metrics = MetricsFile(output / METRICS_FILE, display.note)
        listeners = [lambda _: begun.set(), display, record, metrics, *reporters(config, display.note)]

    def first(number: int) -> None:
        display.note(f"{SIGNALS[number]}: finishing this update and saving; once more ends the run at once")

    def second(number: int) -> None:
        found = list(checkpoints.steps(output / "checkpoints"))
        kept = f"the checkpoint of iteration {found[-1]} is whole; {AGAIN}" if found else "nothing was saved"
        print(f"nalora lora: {SIGNALS[number]}: ended at once; {kept}", file=sys.stderr)

    with stoppable(first, second) as stop:
        result = train(
            model,
            splits["train"].examples,
            splits["valid"].examples,
            config,
            optimizer,
            output,
            listeners,
            description,
            start if config.resume is not None else None,
            config.resume_anyway,
            stop,
        )
    if stop.number is not None and result.stopped:
        done = f"at iteration {result.iterations}, saved in {output}; {AGAIN}"
        raise Stopped(stop.number, f"stopped {done if result.iterations else 'before the first update'}")
    if result.stopped:
        display.note(f"stopped at iteration {result.iterations}: {result.stopped}")
    if result.skipped:
        display.note(f"note: {result.skipped} updates were not applied, see above")
    if result.best_valid_loss is not None:
        before, after = (
            "no number" if loss is None else f"{loss:.4f}"
            for loss in (result.first_valid_loss, result.valid_loss)
        )
        display.note(
            f"validation loss {before} before, {after} after, best {result.best_valid_loss:.4f} at iteration "
            f"{result.best_iteration} ({output / 'best'})"
        )
    display.note(f"done in {result.seconds:.0f} s: adapter in {output}")


def _prepare(config: RunConfig, model: "nn.Module", display: "Display") -> dict[str, Any]:
    """Make the model trainable as the fine-tune type says; returns the content of adapter_config.json."""
    from nalora_mlx.adapters.attach import adapt, adapt_dora
    from nalora_mlx.adapters.files import adapter_config

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
    report = attach(model, config.lora_config())
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
    return adapter_config(model)


def _test(config: RunConfig, model: "nn.Module", split: "Split", display: "Display") -> None:
    from nalora_mlx.data.batches import evaluation_batches
    from nalora_mlx.runs.metrics import MetricsFile
    from nalora_mlx.training import distributed
    from nalora_mlx.training.evaluation import evaluate

    workers = distributed.workers()
    batches = evaluation_batches(
        split.examples, config.batch_size, config.test_batches, config.seed, workers.share
    )
    loss, tokens = evaluate(model, batches, workers=workers)
    display.note(f"test loss {loss:.4f}, perplexity {math.exp(min(loss, 700)):.3f}, over {tokens} tokens")
    output = Path(config.adapter_path).expanduser()
    if config.adapter_path and output.is_dir() and workers.rank == 0:
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
