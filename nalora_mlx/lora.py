"""`nalora lora`: fine-tune a model with NA-LoRA, LoRA, DoRA or all of its weights, and evaluate it."""

import argparse
import json
import math
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nalora_mlx.cli import Parser, add_settings, note_merged
from nalora_mlx.core.background import in_background
from nalora_mlx.core.config import METHOD_LABELS, NALoRAConfig, NAParameters, RunConfig, load_run_config
from nalora_mlx.core.errors import InputError, listed
from nalora_mlx.core.power import keep_awake
from nalora_mlx.core.settings_without_effect import without_effect
from nalora_mlx.export.upload import uploading

if TYPE_CHECKING:
    import mlx.nn as nn

    from nalora_mlx.core.signals import StopRequest
    from nalora_mlx.data.checks import RunData
    from nalora_mlx.data.tokenization import Split
    from nalora_mlx.models.chat_templates import ChatSettings
    from nalora_mlx.runs.display import Display
    from nalora_mlx.runs.progress import TrainResult
    from nalora_mlx.training.events import Listener
    from nalora_mlx.training.loss import SupervisedLoss

CONTINUE = "the same command with --resume continues from there"


def build_parser(prog: str) -> Parser:
    """Add a flag for every setting; the YAML-only ones are those of mlx_lm.lora."""
    parser = Parser(prog=prog, description="Fine-tune a model with NA-LoRA, and evaluate it.")
    parser.add_argument(
        "-c", "--config", type=Path, help="YAML file of settings, as for mlx_lm.lora; flags override it"
    )
    add_settings(parser.add_argument_group("run"), RunConfig)
    lora = parser.add_argument_group("adapter (lora_parameters in YAML)")
    na_names = tuple(NAParameters.__dataclass_fields__)
    add_settings(lora, NALoRAConfig, skip=(*na_names, "num_layers"))
    na = parser.add_argument_group("NA-LoRA (na_parameters in YAML)")
    add_settings(na, NAParameters)
    return parser


def run(args: argparse.Namespace) -> None:
    """Read and check everything, load the model, then plan, train and test."""
    flags = vars(args)
    config = load_run_config(flags.pop("config"), flags)
    config.check()
    if config.plan:
        config.train, config.test = True, False  # --plan does all that precedes training, and nothing else
    with keep_awake(), uploading(config), open_display() as display:
        display.notices(without_effect(config))
        rows = read_data(config, display)
        from nalora_mlx.adapters.files import load_any_adapter
        from nalora_mlx.data.checks import tokenize
        from nalora_mlx.models.context_length import context_notices
        from nalora_mlx.models.loading import is_quantized, is_slow_on_cpu, load_module, load_tokenizer
        from nalora_mlx.runs.resume import find_start
        from nalora_mlx.training.chats import configure_run_chats
        from nalora_mlx.training.device_faults import explain_device_faults
        from nalora_mlx.training.optimizers import configured_optimizer

        def notify(text: str) -> None:
            display.notices([text])

        if config.train:
            configured_optimizer(config)  # what it refuses, it refuses before the model is loaded
        start = find_start(config, output_directory(config)) if config.train else None
        display.note(f"loading {config.model}")
        tokenizer = load_tokenizer(config.model, config.trust_remote_code)
        chat = configure_run_chats(config, tokenizer, start, notify)
        tokenized = in_background(lambda: tokenize(rows, tokenizer, config.max_seq_length))
        model, model_config = load_module(config.model, config.trust_remote_code, config.quantize, notify)
        note_merged(config.model, start if config.train else config.adapter_path)
        if is_slow_on_cpu(model):
            notify(
                "half-precision weights are about fifty times slower than float32 on a CPU; "
                "mlx_lm.convert --dtype float32 makes a float32 copy"
            )
        splits = check_splits(config, tokenized(), tokenizer, display)
        display.notices(context_notices(splits, model_config))
        quantized, started = is_quantized(model_config), threading.Event()
        with explain_device_faults(config, output_directory(config), quantized, start, started):
            loss = None
            if config.train:
                loss = train_model(config, model, splits, display, start, started, chat)
            elif config.adapter_path:
                load_any_adapter(model, Path(config.adapter_path).expanduser())
            if config.test:
                test_model(config, model, splits["test"], display, loss)


def open_display() -> "Display":
    """Return the display of the run; it is silent on all workers but the first."""
    from rich.console import Console

    from nalora_mlx.runs.display import Display
    from nalora_mlx.training.distributed import workers

    return Display(Console(quiet=True)) if workers().rank else Display()


# --- data ---------------------------------------------------------------------------------------------------


def read_data(config: RunConfig, display: "Display") -> "RunData":
    """Read the splits that the run needs and show notices, before anything slow is loaded.

    Raises:
        InputError: lists the rows that cannot be used.
    """
    from nalora_mlx.data.checks import read_rows
    from nalora_mlx.data.sources.loading import SPLITS

    names = [name for name in SPLITS if (config.test if name == "test" else config.train)]
    rows = read_rows(config, names, compare_with_test=config.train)
    if rows.problems:
        raise InputError(listed(rows.problems))
    display.notices(rows.notices)
    return rows


def check_splits(
    config: RunConfig, splits: "dict[str, Split]", tokenizer: Any, display: "Display"
) -> "dict[str, Split]":
    """Show what the tokenized splits hold, and return them.

    Raises:
        InputError: lists the rows that cannot be used.
    """
    from nalora_mlx.data.summary import histogram, mask_pieces, summary

    if errors := [error for split in splits.values() for error in split.errors]:
        raise InputError(listed(errors))
    for name, split in splits.items():
        if split.sequences:
            display.note(summary(name, split))
            if name == "train":
                display.note("\n".join(histogram(split.sequences)))
        display.notices(split.notices)
    if config.train and not splits["valid"].sequences:
        display.note("note: no validation set (valid.jsonl): no validation, and no best adapter")
    for example in next(iter(splits.values())).sequences[: config.show_masks]:
        display.masks(example.source, mask_pieces(example, tokenizer))
    return splits


# --- training -----------------------------------------------------------------------------------------------


def output_directory(config: RunConfig) -> Path:
    """Return the run's directory."""
    return Path(config.adapter_path or ".").expanduser()


def train_model(
    config: RunConfig,
    model: "nn.Module",
    splits: "dict[str, Split]",
    display: "Display",
    start: Path | None,
    started: threading.Event,
    chat: "ChatSettings",
) -> "SupervisedLoss":
    """Attach adapters, plan the memory and train; with --plan only plan. Return the model's loss.

    `started` is set once the output directory is this run's own. `chat` is saved with the adapter.
    """
    import mlx.core as mx

    from nalora_mlx.adapters.files import adapter_weights, load_weights
    from nalora_mlx.ops.kernels.healthcheck import compile_notices
    from nalora_mlx.training.distributed import workers
    from nalora_mlx.training.loss import SupervisedLoss
    from nalora_mlx.training.memory_plan import default_budget, memory_advice
    from nalora_mlx.training.optimizers import configured_optimizer
    from nalora_mlx.training.schedules import length_notices
    from nalora_mlx.training.trainer import train

    mx.random.seed(config.seed)
    optimizer = configured_optimizer(config)
    display.notices(length_notices(config, splits) + compile_notices())
    adapter_config = attach_adapters(config, model, display, chat)
    if start is not None and config.resume is None:
        load_weights(model, start)
        mx.eval(model.parameters())  # read now: the file may be moved aside next
        display.note(f"starting from {start}")
    trainable = sum(array.size for array in adapter_weights(model).values())
    display.note(f"{trainable:,} trainable parameters, optimizer {config.optimizer}")
    display.status.memory_limit = default_budget()
    loss, examples = SupervisedLoss(model), splits["train"].sequences
    with display.trials() as show:
        advice = memory_advice(model, examples, config, configured_optimizer, workers(), loss, show)
    for line in advice.lines:
        display.note(line)
    if config.plan:
        return loss
    if config.memory_budget is not None:
        mx.set_memory_limit(config.memory_budget)  # near it, MLX waits for running work and frees memory
    if config.resume is not None:
        display.note(f"resuming from {start}")
    with interruptible(output_directory(config), display) as stop:
        result = train(
            model,
            examples,
            splits["valid"].sequences,
            config,
            optimizer,
            output_directory(config),
            make_listeners(config, splits, display, started),
            adapter_config,
            start if config.resume is not None else None,
            config.resume_anyway,
            stop,
            loss,
            advice.peak_bytes,
        )
    show_result(config, result, stop, display)
    return loss


def attach_adapters(
    config: RunConfig, model: "nn.Module", display: "Display", chat: "ChatSettings"
) -> dict[str, Any]:
    """Make the model trainable as the fine-tune type says; return the content of adapter_config.json."""
    from nalora_mlx.adapters.attach import adapt, adapt_dora, unfreeze_layers
    from nalora_mlx.adapters.files import adapter_config, chat_entry

    if config.fine_tune_type == "full":
        count = unfreeze_layers(model, config.num_layers)
        display.note(f"full fine-tuning of {count} layers")
        return {"fine_tune_type": "full", "num_layers": count, **chat_entry(chat)}
    attach = adapt_dora if config.fine_tune_type == "dora" else adapt
    result = attach(model, config.lora_config())
    display.notices(result.notices)
    for skipped in result.skipped:
        display.note(f"note: {skipped.path}: {skipped.reason}")
    activations = ", ".join(sorted({mlp.activation for mlp in result.gated}))
    display.note(
        f"{METHOD_LABELS[config.fine_tune_type]} of rank {result.config.rank} on {result.config.num_layers} layers: "
        f"{len(result.gated)} gated MLPs{f' ({activations})' if activations else ''}, "
        f"{len(result.plain)} other modules"
    )
    if config.fine_tune_type == "lora":
        display.note("note: plain LoRA, as requested; fine_tune_type na-lora (the default) gives NA-LoRA")
    content = adapter_config(model, chat)
    json.dumps(content)  # fails here, not after an hour, if JSON cannot hold it
    return content


def make_listeners(
    config: RunConfig, splits: "dict[str, Split]", display: "Display", started: threading.Event
) -> "list[Listener]":
    """Return the listeners of the run; none on workers other than the first."""
    from nalora_mlx.runs.loggers import reporters
    from nalora_mlx.runs.metrics import METRICS_FILE, MetricsFile
    from nalora_mlx.runs.record import RECORD_FILE, RecordFile
    from nalora_mlx.training.distributed import workers

    if workers().rank:
        return []
    output = output_directory(config)
    record = RecordFile(output / RECORD_FILE, config, splits, display.note)
    metrics = MetricsFile(output / METRICS_FILE, display.note)
    return [lambda _: started.set(), display, record, metrics, *reporters(config, display.note)]


@contextmanager
def interruptible(output: Path, display: "Display") -> "Iterator[StopRequest]":
    """Let a first signal finish the update and save, and a second one end the process at once."""
    from nalora_mlx.core.signals import SIGNALS, stoppable
    from nalora_mlx.runs.checkpoints import CHECKPOINTS, steps

    def first(number: int) -> None:
        display.note(f"{SIGNALS[number]}: finishing this update and saving; once more ends the run at once")

    def second(number: int) -> None:
        found = list(steps(output / CHECKPOINTS))
        saved = "nothing was saved"
        if found:
            saved = f"the checkpoint of iteration {found[-1]} is complete; {CONTINUE}"
        print(f"nalora lora: {SIGNALS[number]}: ended at once; {saved}", file=sys.stderr)

    with stoppable(first, second) as stop:
        yield stop


def show_result(config: RunConfig, result: "TrainResult", stop: "StopRequest", display: "Display") -> None:
    """Show how the run ended.

    Raises:
        Stopped: a signal ended it.
    """
    from nalora_mlx.core.signals import Stopped

    output = output_directory(config)
    if stop.number is not None and result.stopped:
        done = f"at iteration {result.iterations}, saved in {output}; {CONTINUE}"
        raise Stopped(stop.number, f"stopped {done if result.iterations else 'before the first update'}")
    if result.stopped:
        display.note(f"stopped at iteration {result.iterations}: {result.stopped}")
    if result.skipped:
        none = "" if result.updates else "; none was applied, so the weights are as they were"
        display.note(f"note: {result.skipped} updates were skipped, see above{none}")
    for line in result.describe_validation(output / "best"):
        display.note(line)
    took = f"{result.seconds:.0f} s, after {display.preparation:.0f} s of preparation"
    display.note(f"done in {took}: adapter in {output}")


# --- test ---------------------------------------------------------------------------------------------------


def test_model(
    config: RunConfig,
    model: "nn.Module",
    split: "Split",
    display: "Display",
    loss: "SupervisedLoss | None",
) -> None:
    """Compute the loss on the test set, show it, and add it to the metrics."""
    from nalora_mlx.data.batches import evaluation_batches
    from nalora_mlx.runs.metrics import METRICS_FILE, MetricsFile
    from nalora_mlx.training.distributed import workers
    from nalora_mlx.training.evaluation import evaluate

    world = workers()
    batches = evaluation_batches(
        split.sequences, config.batch_size, config.test_batches, config.seed, world.share
    )
    value, tokens = evaluate(model, batches, loss=loss, workers=world)
    display.note(f"test loss {value:.4f}, perplexity {math.exp(min(value, 700)):.3f}, over {tokens} tokens")
    output = Path(config.adapter_path).expanduser()
    if config.adapter_path and output.is_dir() and world.rank == 0:
        MetricsFile(output / METRICS_FILE)(
            {"event": "metrics", "split": "test", "loss": value, "tokens": tokens}
        )


if __name__ == "__main__":
    from nalora_mlx.__main__ import main

    sys.exit(main(["lora", *sys.argv[1:]]))
