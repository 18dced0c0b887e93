"""Train and evaluate: the loop around the training step, and the one place that wires the rooms together."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx_lm.utils import maybe_set_recommended_wired_limit

from nalora_mlx import checkpoint
from nalora_mlx.adapters import ADAPTER_CONFIG, ADAPTER_FILE, adapter_description, adapter_weights, report_of
from nalora_mlx.batches import Batch, batches_per_epoch, evaluation_batches, training_batches
from nalora_mlx.config import PLAIN_LORA, RunConfig, TrainingConfig
from nalora_mlx.data import Example
from nalora_mlx.errors import InputError
from nalora_mlx.forward import recomputed
from nalora_mlx.step import ScoredLoss, TrainingStep

# What a run tells those who watch it: {"event": "start" | "step" | "validating" | "metrics" | "saved" | "end", ...}
Listener = Callable[[dict[str, Any]], None]


@dataclass
class TrainResult:
    """What came of a run; losses are means over supervised tokens, None without a validation set."""

    iterations: int
    updates: int
    tokens: int
    seconds: float
    train_loss: float
    first_valid_loss: float | None = None
    valid_loss: float | None = None
    best_valid_loss: float | None = None
    best_iteration: int | None = None


def evaluate(
    model: nn.Module,
    batches: Sequence[Batch],
    on_batch: Callable[[int], None] | None = None,
    loss: ScoredLoss | None = None,
) -> tuple[float, int]:
    """Mean cross entropy over all supervised tokens of the batches, and their number.

    Args:
        model: any model; it is put into evaluation mode and back.
        batches: a fixed set, see `evaluation_batches`.
        on_batch: called with the number of batches done.
        loss: the model's loss, if there is one already.
    """
    training = model.training
    model.eval()
    batch_loss = partial(mx.compile, inputs=model.state)(loss or ScoredLoss(model))
    total, tokens = 0.0, 0
    try:
        for done, batch in enumerate(batches, 1):
            total += float(batch_loss(*map(mx.array, (batch.inputs, *batch.scored()))))
            tokens += batch.tokens
            mx.clear_cache()
            if on_batch is not None:
                on_batch(done)
    finally:
        model.train(training)
    return total / max(tokens, 1), tokens


def _windows(batches: Iterator[Batch], iterations: int, size: int) -> Iterator[list[Batch]]:
    """Cut the batches of a run into accumulation windows; the last one may be shorter."""
    done = 0
    while done < iterations:
        window = list(islice(batches, min(size, iterations - done)))
        done += len(window)
        yield window


def check(model: nn.Module, train_set: Sequence[Example], config: TrainingConfig) -> None:
    """Raise InputError for what `train` would refuse, before anything is touched."""
    if problems := TrainingConfig.problems(config):
        raise InputError("; ".join(problems))
    if not train_set:
        raise InputError("the training set is empty")
    if mx.distributed.init().size() > 1:
        raise InputError("training on several workers is not supported; start it without mlx.launch")
    if not adapter_weights(model):
        raise InputError("nothing to train: the model is frozen; call adapt first")


def train(
    model: nn.Module,
    train_set: Sequence[Example],
    valid_set: Sequence[Example] = (),
    config: TrainingConfig | None = None,
    optimizer: optim.Optimizer | None = None,
    output: str | Path | None = None,
    listeners: Sequence[Listener] = (),
    description: dict[str, Any] | None = None,
) -> TrainResult:
    """Train a model's adapters (or whatever of it is not frozen).

    Each token weighs the same within an optimizer update, however rows fall into batches; every row is used in
    every epoch, the last partial batch and accumulation window included; validation is always on the same rows.

    Args:
        model: adapted by `adapt`, whose report has the NA settings; another model trains without mechanisms.
        train_set: tokenized rows, see `nalora_mlx.data.tokenize_split`.
        valid_set: rows for validation; none skips it.
        config: settings; the defaults if None.
        optimizer: any mlx optimizer; Adam with the default learning rate if None.
        output: directory for adapters.safetensors, best/, checkpoints/; None saves nothing.
        listeners: called with each event, see `Listener`.
        description: content of adapter_config.json; that of the adapted model if None.

    Raises:
        InputError: bad settings, an empty training set, or a model with nothing to train.
        FloatingPointError: the loss is not finite any more.
    """
    config = config or TrainingConfig()
    check(model, train_set, config)
    if output is not None and description is None and report_of(model) is None:
        raise InputError(
            "the model was not adapted here; give the content of adapter_config.json as description"
        )
    return _Run(model, train_set, valid_set, config, optimizer, output, listeners, description).run()


def _finite(loss: float, iteration: int) -> float:
    if math.isfinite(loss):
        return loss
    raise FloatingPointError(
        f"the loss is {loss} at iteration {iteration}; lower the learning rate, or look for broken rows"
    )


class _Run:
    """The state of one call of `train`."""

    def __init__(self, model, train_set, valid_set, config, optimizer, output, listeners, description):
        report = report_of(model)
        self.model, self.config, self.listeners = model, config, listeners
        self.output = Path(output) if output is not None else None
        self.description = description or (adapter_description(model) if report and self.output else None)
        self.train_set = train_set
        self.valid_batches = evaluation_batches(valid_set, config.batch_size, config.val_batches, config.seed)
        self.optimizer = optimizer or optim.Adam(learning_rate=RunConfig.learning_rate)
        self.step = TrainingStep(model, self.optimizer, report.config if report else PLAIN_LORA)
        self.iterations = config.iters
        if config.epochs is not None:
            self.iterations = math.ceil(
                round(config.epochs * batches_per_epoch(train_set, config.batch_size), 6)
            )
        self.result = TrainResult(self.iterations, 0, 0, 0.0, math.nan)

    def tell(self, event: str, **content: Any) -> None:
        for listener in self.listeners:
            listener({"event": event, **content})

    def run(self) -> TrainResult:
        config, result = self.config, self.result
        maybe_set_recommended_wired_limit()
        self.tell("start", iterations=self.iterations)
        layers = list(self.model.layers) if config.grad_checkpoint else []
        start = time.perf_counter()
        self.validate(0)
        self.model.train()
        batches = training_batches(self.train_set, config.batch_size, config.seed)
        iteration = 0
        self.reset_report()
        for window in _windows(batches, self.iterations, config.grad_accumulation_steps):
            window_tokens = sum(batch.tokens for batch in window)
            diagnose = any(self.reports(iteration + i) for i in range(1, len(window) + 1))
            carry = None
            for position, batch in enumerate(window, 1):
                iteration += 1
                tic = time.perf_counter()
                with recomputed(layers) if layers else nullcontext():
                    total, carry = self.step(
                        batch,
                        window_tokens,
                        carry,
                        position == len(window),
                        (config.seed, iteration),
                        diagnose,
                    )
                mx.eval(self.step.state, total, carry)
                if mx.get_cache_memory() > config.clear_cache_threshold:
                    mx.clear_cache()
                self.count(iteration, total, batch.tokens, time.perf_counter() - tic)
                self.tell("step", step=iteration, iterations=self.iterations)
                last = iteration == self.iterations
                if self.reports(iteration):
                    self.report(iteration)
                if last or iteration % config.steps_per_eval == 0:
                    self.validate(iteration)
                if last or iteration % config.save_every == 0:
                    self.save(iteration, last)
            result.updates += 1
        result.seconds = time.perf_counter() - start
        self.tell("end", result=result)
        return result

    def reports(self, iteration: int) -> bool:
        return iteration == self.iterations or iteration % self.config.steps_per_report == 0

    def reset_report(self) -> None:
        self.loss_sum, self.loss_tokens, self.loss_steps, self.loss_seconds = 0.0, 0, 0, 0.0

    def count(self, iteration: int, total: mx.array, tokens: int, seconds: float) -> None:
        # At once, before anything of this iteration is written over what was good.
        self.loss_sum += _finite(float(total), iteration)
        self.loss_tokens += tokens
        self.loss_steps += 1
        self.loss_seconds += seconds
        self.result.tokens += tokens

    def report(self, iteration: int) -> None:
        loss = self.loss_sum / max(self.loss_tokens, 1)
        self.result.train_loss = loss
        self.tell(
            "metrics",
            split="train",
            step=iteration,
            loss=loss,
            tokens=self.result.tokens,
            tokens_per_second=self.loss_tokens / self.loss_seconds,
            iterations_per_second=self.loss_steps / self.loss_seconds,
            learning_rate=self.learning_rate(),
            peak_memory_gb=mx.get_peak_memory() / 1e9,
            layers=self.step.describe(),
        )
        self.reset_report()

    def learning_rate(self) -> float | None:
        try:
            return float(self.optimizer.learning_rate)
        except KeyError:  # Adafactor may have none of its own
            return None

    def validate(self, iteration: int) -> None:
        if not self.valid_batches:
            return
        tic = time.perf_counter()
        count = len(self.valid_batches)
        loss, tokens = evaluate(
            self.model,
            self.valid_batches,
            lambda done: self.tell("validating", batch=done, batches=count),
            self.step.loss,
        )
        result = self.result
        result.valid_loss = _finite(loss, iteration)
        if iteration == 0:
            result.first_valid_loss = loss
        elif result.best_valid_loss is None or loss < result.best_valid_loss:
            result.best_valid_loss, result.best_iteration = loss, iteration
            if self.output is not None:
                self.write(self.output / "best")
        seconds = time.perf_counter() - tic
        self.tell(
            "metrics",
            split="valid",
            step=iteration,
            loss=loss,
            tokens=tokens,
            seconds=seconds,
            best_loss=result.best_valid_loss,
        )

    def save(self, iteration: int, last: bool) -> None:
        if self.output is None:
            return
        if not last or iteration % self.config.save_every == 0:
            self.write(self.output / "checkpoints" / f"step-{iteration:07d}")
        for name, writer in self.files().items():
            checkpoint.write_file(self.output / name, writer)
        self.tell("saved", path=str(self.output), step=iteration)

    def write(self, directory: Path) -> None:
        checkpoint.write_directory(directory, self.files())

    def files(self) -> dict[str, checkpoint.Writer]:
        return {
            ADAPTER_FILE: checkpoint.arrays_writer(adapter_weights(self.model)),
            ADAPTER_CONFIG: checkpoint.json_writer(self.description),
        }
