"""A whole fine-tuning job, from settings to a trained and tested adapter: what `nalora lora` and `finetune` do."""

import json
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.utils import get_total_parameters
from rich.console import Console

from nalora_mlx.adapters.attach import adapt, adapt_dora, unfreeze_layers
from nalora_mlx.adapters.files import (
    adapter_config,
    adapter_weights,
    chat_entry,
    load_any_adapter,
    load_weights,
)
from nalora_mlx.adapters.merge_record import twice_notice
from nalora_mlx.core.background import in_background
from nalora_mlx.core.config import METHOD_LABELS, RunConfig
from nalora_mlx.core.errors import InputError, counted, listed
from nalora_mlx.core.machine import SLOW_GFLOPS, matmul_gflops
from nalora_mlx.data.checks import RunData, tokenize
from nalora_mlx.data.summary import histogram, mask_pieces, summary, titled_sequences
from nalora_mlx.data.tokenization import Split
from nalora_mlx.models.context_length import context_notices
from nalora_mlx.models.hub import model_description
from nalora_mlx.models.loading import (
    is_quantized,
    local_directory,
    slow_on_cpu_notice,
)
from nalora_mlx.ops.device_sizes import device_kind
from nalora_mlx.ops.kernels.healthcheck import compile_notices
from nalora_mlx.runs.checkpoints import REFERENCE_FILE
from nalora_mlx.runs.display import Display
from nalora_mlx.runs.loggers import reporters
from nalora_mlx.runs.metrics import METRICS_FILE, MetricsFile
from nalora_mlx.runs.preferences import describe_objective
from nalora_mlx.runs.progress import TrainResult
from nalora_mlx.runs.record import RECORD_FILE, RecordFile
from nalora_mlx.runs.resume import find_start
from nalora_mlx.runs.samples import choose_prompts
from nalora_mlx.training.chats import configure_run_chats
from nalora_mlx.training.device_faults import explain_device_faults
from nalora_mlx.training.device_memory import memory_limit
from nalora_mlx.training.distributed import workers
from nalora_mlx.training.events import Listener
from nalora_mlx.training.images import (
    encode_images,
    load_run_model,
    load_run_tokenizer,
    run_processor,
)
from nalora_mlx.training.interruption import interruptible
from nalora_mlx.training.loss import Loss
from nalora_mlx.training.memory_plan import default_budget, memory_advice
from nalora_mlx.training.optimizers import configured_optimizer
from nalora_mlx.training.preferences.layout import choose_layout
from nalora_mlx.training.preferences.loss import PreferenceLoss
from nalora_mlx.training.preferences.reference import Reference
from nalora_mlx.training.samples import write_samples
from nalora_mlx.training.schedules import length_notices
from nalora_mlx.training.test_set import describe_test, evaluate_test_set, rows_with_reference
from nalora_mlx.training.trainer import new_loss, train

REAL_MODEL = 20_000_000  # parameters from which on the speed of this machine is worth a look


def open_display(quiet: bool = False, phrase: Callable[[str], str] = str) -> Display:
    """Return the display of a job; it is silent on all workers but the first.

    Args:
        quiet: show nothing.
        phrase: rewrites what is shown.
    """
    return Display(Console(quiet=True) if quiet or workers().rank else None, phrase)


class Job:
    """One job. Constructing it changes nothing; `run` does everything.

    Args:
        config: settings, which have been checked.
        data: the rows of the job.
        display: shows what happens.
        listeners: called with each event of the training, in addition to the display and the files.
        stop: asked while each update runs; True ends the training after that update, saved.

    Attributes:
        output: the run's directory.
        model, tokenizer: loaded by `run`; the model has the trained adapter at the end.
        splits: the tokenized rows by split.
        result: of the training; None without one.
        signal: the number of the signal that ended the training; None without one.
    """

    def __init__(
        self,
        config: RunConfig,
        data: RunData,
        display: Display,
        listeners: Sequence[Listener] = (),
        stop: Callable[[], bool] | None = None,
    ):
        self.config, self.data, self.display = config, data, display
        self.listeners, self.stop = listeners, stop
        self.prompts = choose_prompts(data)
        self.output = Path(config.adapter_path or ".").expanduser()
        self.start: Path | None = None  # checkpoint or adapter to start from
        self.started = threading.Event()  # set once the output directory is this run's own
        self.reference: Reference | None = None  # of a preference run
        self.test_rows: list[Any] | None = None  # of a preference run, see `rows_with_reference`
        self.result: TrainResult | None = None
        self.signal: int | None = None

    def run(self) -> None:
        """Load the model, check everything, then plan, train and test.

        Raises:
            InputError: bad rows, a model or settings that do not fit, or a checkpoint of another run.
            RunError: the device failed, or the end of the run could not be saved.
            FloatingPointError: too many updates in a row had a NaN or infinite loss or gradient.
        """
        config = self.config
        if config.train:
            configured_optimizer(config)  # what it refuses, it refuses before the model is loaded
            self.start = find_start(config, self.output)
        if config.resume is not None:
            self.display.note(f"resuming from {self.start}")
        self.load()
        with explain_device_faults(config, self.output, self.quantized, self.start, self.started):
            loss = None
            if config.train:
                loss = self.train()
            elif config.adapter_path:
                self.test_rows = rows_with_reference(self.model, self.splits["test"], config, workers())
                load_any_adapter(self.model, self.output)
                self.model.freeze()
                self.encode_images()
            if config.test and self.signal is None:
                self.test(loss)

    # --- data and model ---------------------------------------------------------------------------------------

    def load(self) -> None:
        """Load model and tokenizer, and tokenize the rows in the background.

        Raises:
            InputError: the model cannot be loaded, or rows cannot be used.
        """
        config, display = self.config, self.display
        display.note(f"loading {config.model}")
        if slow := slow_on_cpu_notice(config.model, config.quantize):
            self.notify(slow)
        self.processor = run_processor(config, self.data, self.notify)
        self.tokenizer = load_run_tokenizer(config, self.processor)
        self.chat = configure_run_chats(config, self.tokenizer, self.start, self.notify)
        tokenized = in_background(
            lambda: tokenize(self.data, self.tokenizer, config.max_seq_length, self.processor)
        )
        self.model, model_config = load_run_model(config, self.processor, self.notify)
        self.quantized = is_quantized(model_config)
        size = get_total_parameters(self.model)
        if size > REAL_MODEL and device_kind() == "cpu" and matmul_gflops() < SLOW_GFLOPS:
            self.notify(
                "matrix products are slow here, because no optimized BLAS is in use: training takes about fifty times "
                "as long; start with bash scripts/environment.sh, or preload OpenBLAS"
            )
        self.description = model_description(config.model, local_directory(config.model), model_config, size)
        adapter = self.start if config.train else self.output if config.adapter_path else None
        if adapter is not None and (
            twice := twice_notice(config.model, local_directory(config.model), adapter)
        ):
            self.notify(twice)
        self.splits = self.checked(tokenized())
        display.notices(context_notices(self.splits, model_config))

    def checked(self, splits: dict[str, Split]) -> dict[str, Split]:
        """Show what the tokenized splits hold, and return them.

        Raises:
            InputError: lists the rows that cannot be used.
        """
        config, display = self.config, self.display
        if errors := [error for split in splits.values() for error in split.errors]:
            raise InputError(listed(errors))
        for name, split in splits.items():
            if split.sequences:
                display.note(summary(name, split))
                for line in histogram(split.sequences) if name == "train" else ():
                    display.note(line)
        display.notices(notice for split in splits.values() for notice in split.notices)
        if config.train and not splits["valid"].sequences:
            display.note("note: no validation set (valid.jsonl): no validation, and no best adapter")
        for example in next(iter(splits.values())).sequences[: config.show_masks]:
            for title, shown in titled_sequences(example).items():
                display.masks(title, mask_pieces(shown, self.tokenizer))
        return splits

    def encode_images(self) -> None:
        """Compute the features of the rows' images, unless the run trains on text alone."""
        if self.processor is not None:
            directory = self.output
            if not self.config.adapter_path:
                self.temporary = tempfile.TemporaryDirectory()
                directory = Path(self.temporary.name)
            text = "reading the images"
            with self.display.waiting(text) as update:
                encode_images(
                    self.model,
                    self.processor,
                    self.splits,
                    directory,
                    lambda done, of: update(f"{text} ({done} of {of})"),
                )

    def notify(self, text: str) -> None:
        """Show a notice."""
        self.display.notices([text])

    # --- training -----------------------------------------------------------------------------------------------

    def train(self) -> Loss:
        """Attach adapters, plan the memory and train; with --plan only plan. Return the model's loss."""
        config, model, display = self.config, self.model, self.display
        mx.random.seed(config.seed)
        optimizer = configured_optimizer(config)
        display.notices(length_notices(config, self.splits) + compile_notices())
        content = self.attach_adapters()
        if self.start is not None and config.resume is None:
            load_weights(model, self.start)
            mx.eval(model.parameters())  # read now: the file may be moved aside next
            display.note(f"starting from {self.start}")
        trainable = sum(array.size for array in adapter_weights(model).values())
        display.note(f"{trainable:,} trainable parameters, optimizer {config.optimizer}")
        self.encode_images()
        display.status.memory_limit = default_budget()
        loss, examples = new_loss(model, config), self.splits["train"].sequences
        if isinstance(loss, PreferenceLoss):
            display.note(f"objective: {describe_objective(vars(config))}")
            examples = choose_layout(loss, examples, config)
            self.reference = Reference(loss, config, workers())
            if config.resume is not None and self.start is not None:
                self.reference.load(self.start / REFERENCE_FILE)
            display.notices(self.reference.notices(examples))
        with display.trials() as show:
            advice = memory_advice(model, examples, config, configured_optimizer, workers(), loss, show)
        for line in advice.lines:
            display.note(line)
        if config.plan:
            return loss
        if config.test and self.reference is not None and self.reference.start is None:  # of the whole model
            self.test_rows = rows_with_reference(model, self.splits["test"], config, workers())
        with memory_limit(config.memory_budget), interruptible(self.output, display) as request:
            self.result = train(
                model,
                examples,
                self.splits["valid"].sequences,
                config,
                optimizer,
                self.output,
                self.all_listeners(),
                content,
                self.start if config.resume is not None else None,
                config.resume_anyway,
                lambda: request() or (self.stop is not None and self.stop()),
                loss,
                advice.peak_bytes,
            )
            if not self.result.stopped or request.number is None:
                for line in self.result.lines(self.output, display.preparation):
                    display.note(line)
                self.keep_samples(self.result, request)
        self.signal = request.number
        return loss

    def keep_samples(self, result: TrainResult, stop: Callable[[], bool]) -> None:
        """Answer a few prompts with the base and the tuned model, keep the answers, and show one of them."""
        if not self.config.samples or workers().rank:
            return
        with self.display.waiting("answering a few prompts, before and after training"):
            samples = write_samples(
                self.model,
                self.tokenizer,
                self.prompts,
                self.output,
                self.notify,
                result.seconds,
                stop,
                self.processor,
            )
        if samples:
            self.display.sample(samples[0])

    def attach_adapters(self) -> dict[str, Any]:
        """Make the model trainable as the fine-tune type says; return the content of adapter_config.json."""
        config, model, display = self.config, self.model, self.display
        if config.fine_tune_type == "full":
            count = unfreeze_layers(model, config.num_layers)
            display.note(f"full fine-tuning of {counted(count, 'layer')}")
            return {"fine_tune_type": "full", "num_layers": count, **chat_entry(self.chat)}
        attach = adapt_dora if config.fine_tune_type == "dora" else adapt
        result = attach(model, config.lora_config())
        display.notices(result.notices)
        for skipped in result.skipped:
            display.note(f"note: {skipped.path}: {skipped.reason}")
        activations = ", ".join(sorted({mlp.activation for mlp in result.gated}))
        display.note(
            f"{METHOD_LABELS[config.fine_tune_type]} of rank {result.config.rank} on "
            f"{counted(result.config.num_layers, 'layer')}: {counted(len(result.gated), 'gated MLP')}"
            f"{f' ({activations})' if activations else ''}, {counted(len(result.plain), 'other module')}"
        )
        if config.fine_tune_type == "lora":
            display.note("note: plain LoRA, as requested; fine_tune_type na-lora (the default) gives NA-LoRA")
        content = adapter_config(model, self.chat)
        json.dumps(content)  # fails here, not after an hour, if JSON cannot hold it
        return content

    def all_listeners(self) -> list[Listener]:
        """Return the listeners of the run; none on workers other than the first."""
        if workers().rank:
            return []
        config, warn = self.config, self.display.note
        return [
            lambda _: self.started.set(),
            self.display,
            RecordFile(self.output / RECORD_FILE, config, self.splits, warn, self.prompts, self.description),
            MetricsFile(self.output / METRICS_FILE, warn),
            *reporters(config, warn),
            *self.listeners,
        ]

    # --- test -------------------------------------------------------------------------------------------------

    def test(self, loss: Loss | None) -> None:
        """Compute the loss on the test set, show it, and add it to the metrics."""
        config, world = self.config, workers()
        found = evaluate_test_set(
            self.model, self.splits["test"].sequences, config, loss, self.reference, world, self.test_rows
        )
        self.display.note(describe_test(found))
        if config.adapter_path and self.output.is_dir() and world.rank == 0:
            event = {"event": "metrics", "split": "test", "loss": found.loss, "tokens": found.tokens}
            MetricsFile(self.output / METRICS_FILE)(event | found.measures)
