"""One training run: the loop around the training step, and all that it reports, saves and survives."""

import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten
from mlx_lm.utils import maybe_set_recommended_wired_limit

from nalora_mlx.adapters.attach import adapt_result
from nalora_mlx.adapters.files import adapter_config, adapter_weights
from nalora_mlx.adapters.forward_pass import recomputed
from nalora_mlx.core import storage
from nalora_mlx.core.config import PLAIN_LORA, RunConfig, TrainingConfig
from nalora_mlx.core.errors import first_line, places
from nalora_mlx.data.batches import Batch, batches_per_epoch, evaluation_batches, training_batches
from nalora_mlx.data.tokenization import Example
from nalora_mlx.runs import checkpoints
from nalora_mlx.runs.checkpoints import CHECKPOINTS, Saver
from nalora_mlx.runs.directory import (
    archive_previous_run,
    check_space,
    holds_run,
    remove_partial_files,
    rewind,
)
from nalora_mlx.runs.fingerprint import identity
from nalora_mlx.runs.progress import Progress, TrainResult
from nalora_mlx.runs.resume import adapter_files, checkpoint_files, restore
from nalora_mlx.training import distributed
from nalora_mlx.training.accumulation import prefetch, windows
from nalora_mlx.training.evaluation import evaluate
from nalora_mlx.training.step import TrainingStep

# What a run tells those who watch it: {"event": one of these, ...}:
# start, step, validating, metrics, notice, saving, saved, end
# One that raises is told no more, and the run goes on.
Listener = Callable[[dict[str, Any]], None]


class Run:
    """One run, with the arguments of `train`. Making it refuses what cannot work and touches nothing; `run` runs it."""

    def __init__(
        self,
        model: nn.Module,
        train_set: Sequence[Example],
        valid_set: Sequence[Example],
        config: TrainingConfig,
        optimizer: optim.Optimizer | None = None,
        output: str | Path | None = None,
        listeners: Sequence[Listener] = (),
        description: dict[str, Any] | None = None,
        resume: str | Path | None = None,
        resume_anyway: bool = False,
        stop: Callable[[], bool] | None = None,
    ):
        report = adapt_result(model)
        self.model, self.config, self.stop = model, config, stop
        self.workers = distributed.workers()
        speaks = self.workers.rank == 0
        self.listeners = list(listeners) if speaks else []
        self.train_set = train_set
        self.valid_batches = evaluation_batches(
            valid_set, config.batch_size, config.val_batches, config.seed, self.workers.share
        )
        self.optimizer = optimizer or optim.Adam(learning_rate=RunConfig.learning_rate)
        self.step = TrainingStep(
            model,
            self.optimizer,
            report.config if report else PLAIN_LORA,
            grad_clip=config.grad_clip,
            workers=self.workers,
        )
        self.iterations = config.iters
        if config.epochs is not None:
            per_epoch = batches_per_epoch(train_set, config.batch_size, config.packing)
            self.iterations = math.ceil(round(config.epochs * per_epoch, 6))
        self.progress, self.notices = Progress(), _head_notices(self.step)
        self.source = Path(resume) if resume is not None else None
        self.saver: Saver | None = None
        if output is None and resume is None:
            return
        description = description or (adapter_config(model) if report else None)
        known = identity(model, self.optimizer, description, config, train_set, valid_set, self.workers.size)
        trees = {"optimizer": self.optimizer.state, "importance": self.step.importance}
        if self.source is not None:
            self.progress, notices = restore(
                self.source, known, self.model, trees, self.iterations, resume_anyway
            )
            self.notices += notices
            if self.progress.iteration % config.grad_accumulation_steps:
                self.notices.append(
                    "the checkpoint follows a last, shorter accumulation window; what comes now is not what a run "
                    "that had not ended there would have done"
                )
        if output is not None and speaks:
            storage.check_writable(Path(output))
            holds_run(Path(output))
            self.saver = Saver(
                Path(output),
                config.keep_last,
                lambda: adapter_files(model, description),
                lambda best: checkpoint_files(model, description, trees, self.progress, known, config, best),
                self.tell,
            )
            saves = math.ceil((self.iterations - self.progress.iteration) / config.save_every)
            shortage = check_space(
                Path(output), _size(adapter_weights(model)), _size(trees), saves, config.keep_last
            )
            if shortage:
                self.notices.append(shortage)

    def tell(self, event: str, **content: Any) -> None:
        """Tell all listeners; one that raises is left out from then on: no watcher ends a run."""
        for listener in list(self.listeners):
            try:
                listener({"event": event, **content})
            except Exception as error:
                self.listeners.remove(listener)
                name = getattr(listener, "name", None) or getattr(
                    listener, "__name__", type(listener).__name__
                )
                # Not an event: it may be the display that fails.
                print(
                    f"note: {name} failed ({type(error).__name__}: {first_line(error)}); the run goes on without it",
                    file=sys.stderr,
                )

    def run(self) -> TrainResult:
        """Train until the iterations are done, or something ends the run before.

        Raises:
            InputError: another run is writing into the output directory.
        """
        with storage.lock_directory(self.saver.output) if self.saver is not None else nullcontext():
            if self.saver is not None:
                self.prepare_output(self.saver)
            return self.train()

    def prepare_output(self, saver: Saver) -> None:
        """Make the output directory this run's; what was in it is moved aside, not lost."""
        remove_partial_files(saver.output)
        if self.source is None:
            aside = archive_previous_run(saver.output)
            if aside is not None:
                self.notices.append(f"moved the run that was in {saver.output} to {aside}")
            return
        iteration = self.progress.iteration
        aside = rewind(saver.output, self.source, iteration)
        if iteration in checkpoints.steps(saver.output / CHECKPOINTS):
            saver.saved = iteration
        if aside is not None:
            self.notices.append(f"moved what came after iteration {iteration} to {aside}")

    def train(self) -> TrainResult:
        """Train, report and save."""
        config, progress = self.config, self.progress
        maybe_set_recommended_wired_limit()
        self.tell("start", iterations=self.iterations, done=progress.iteration)
        for text in self.notices:
            self.tell("notice", text=text)
        self.layers = recomputed_layers(self.model, config)
        self.began = time.perf_counter() - progress.seconds
        if progress.iteration == 0:
            self.validate()
        self.model.train()
        batches = training_batches(
            self.train_set,
            config.batch_size,
            config.seed,
            config.packing,
            self.workers.share,
            start=progress.iteration,
        )
        stopped = self.reason_to_stop()
        left = 0 if stopped else self.iterations - progress.iteration
        with closing(prefetch(windows(batches, left, config.grad_accumulation_steps))) as made:
            for window in made:
                first = progress.iteration + 1
                self.update(window)
                done, last = range(first, progress.iteration + 1), progress.iteration == self.iterations
                if last or any(iteration % config.steps_per_eval == 0 for iteration in done):
                    self.validate()
                stopped = self.reason_to_stop()
                if last or stopped or any(iteration % config.save_every == 0 for iteration in done):
                    self.save()
                if stopped:
                    break
        progress.seconds = time.perf_counter() - self.began
        result = progress.result(stopped)
        self.tell("end", result=result)
        if self.saver is not None:
            self.saver.finish()
        return result

    def reason_to_stop(self) -> str | None:
        """Why the run ends here, the same on all workers; None if it goes on."""
        asked = mx.array(float(self.stop is not None and self.stop()))
        if self.workers.sum(asked).item():
            return "it was asked to stop"
        patience, stale = self.config.early_stopping, self.progress.stale_validations
        if patience is not None and stale >= patience:
            return f"{stale} validations brought no better loss"
        return None

    def update(self, window: list[Batch]) -> None:
        """Run the iterations of one accumulation window, and with them one update."""
        config, progress = self.config, self.progress
        window_tokens = sum(batch.tokens for batch in window)
        carry, suspect = None, None
        for position, batch in enumerate(window, 1):
            iteration = progress.iteration + 1
            tic = time.perf_counter()
            with recomputed(self.layers) if self.layers else nullcontext():
                total, carry = self.step(
                    batch, window_tokens, carry, position == len(window), (config.seed, iteration)
                )
            mx.eval(self.step.state, total, carry)
            if self.reports(iteration):
                self.step.measure(batch)
            if mx.get_cache_memory() > config.clear_cache_threshold:
                mx.clear_cache()
            loss = float(total)
            progress.count(loss, batch.tokens, time.perf_counter() - tic)
            if suspect is None and not self.step.health["finite"].item():
                suspect = (batch, loss)
            if math.isfinite(loss) and progress.record_loss(loss / max(batch.tokens, 1)):
                self.notice_spikes(batch)
            self.tell("step", step=iteration, iterations=self.iterations)
            if position == len(window):
                self.finish_update(suspect)
            if self.reports(iteration):
                self.report()

    def finish_update(self, suspect: tuple[Batch, float] | None) -> None:
        """Count an update that was applied, or one that was not, because of a batch and its loss.

        Raises:
            FloatingPointError: too many in a row were not.
        """
        progress = self.progress
        if suspect is None:
            progress.updates += 1
            progress.skipped_in_a_row = 0
            return
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        batch, loss = suspect
        rows = self.rows_of(batch)
        what = (
            "the gradient or the new weights are not finite" if math.isfinite(loss) else f"the loss is {loss}"
        )
        self.tell(
            "notice", text=f"iteration {progress.iteration}: {what}; the update is not applied; rows: {rows}"
        )
        if progress.skipped_in_a_row < self.config.max_bad_steps:
            return
        count, progress.skipped_in_a_row = progress.skipped_in_a_row, 0
        self.save(prune=False)
        raise FloatingPointError(
            f"{count} updates in a row were not applied, up to iteration {progress.iteration}: {what} (rows: {rows})"
            f"{self.whereabouts()}; lower the learning rate, clip the gradient, or look for broken rows"
        )

    def whereabouts(self) -> str:
        """Where the state before bad updates is, as the end of a sentence."""
        if self.saver is None:
            return ""
        if self.saver.failure is None:
            return f", and the state before them is in {self.saver.output}"
        return f"; the state before them could not be saved ({self.saver.failure}), {self.saver.kept()}"

    def notice_spikes(self, batch: Batch) -> None:
        """Say that the loss jumped repeatedly, last at this batch."""
        self.tell(
            "notice",
            text=f"iteration {self.progress.iteration}: the loss jumps again and again; lower the learning rate, clip "
            f"the gradient (--grad-clip 1), or look at these rows: {self.rows_of(batch)}",
        )

    def rows_of(self, batch: Batch) -> str:
        """All rows of a batch, as places in files."""
        return places([self.train_set[row].source for row in batch.rows], most=len(batch.rows))

    def reports(self, iteration: int) -> bool:
        """Whether there is a report after this iteration."""
        return iteration == self.iterations or iteration % self.config.steps_per_report == 0

    def report(self) -> None:
        """Tell what training came to since the last report."""
        p = self.progress
        speeds = {
            "tokens_per_second": p.loss_tokens / p.loss_seconds,
            "iterations_per_second": p.loss_steps / p.loss_seconds,
        }
        p.start_interval()
        self.tell(
            "metrics",
            split="train",
            step=p.iteration,
            loss=math.nan if p.train_loss is None else p.train_loss,
            tokens=p.tokens,
            **speeds,
            learning_rate=self.learning_rate(),
            gradient_norm=self.step.health["norm"].item(),
            skipped=p.skipped,
            peak_memory_gb=mx.get_peak_memory() / 1e9,
            layers=self.step.describe(),
        )

    def learning_rate(self) -> float | None:
        """The rate of the last update."""
        try:
            return float(self.optimizer.learning_rate)
        except KeyError:  # Adafactor may have none of its own
            return None

    def validate(self) -> None:
        """Take the validation loss, and keep the adapter if it is the best."""
        if not self.valid_batches:
            return
        tic, count, progress = time.perf_counter(), len(self.valid_batches), self.progress
        loss, tokens = evaluate(
            self.model,
            self.valid_batches,
            lambda done: self.tell("validating", batch=done, batches=count),
            self.step.loss,
            self.workers,
        )
        before = (progress.best_valid_loss, progress.best_iteration)
        if progress.record_validation(loss) and self.saver is not None and not self.saver.best():
            progress.best_valid_loss, progress.best_iteration = before  # it says what is on the disk
        if not math.isfinite(loss):
            self.tell("notice", text=f"iteration {progress.iteration}: the validation loss is {loss}")
        self.tell(
            "metrics",
            split="valid",
            step=progress.iteration,
            loss=loss,
            tokens=tokens,
            seconds=time.perf_counter() - tic,
            best_loss=progress.best_valid_loss,
        )

    def save(self, prune: bool = True) -> None:
        """Write a checkpoint, if this run writes any."""
        self.progress.seconds = time.perf_counter() - self.began
        if self.saver is not None:
            self.saver.save(self.progress.iteration, prune)


def _head_notices(step: TrainingStep) -> list[str]:
    """What a person should know of the model's head, if it takes memory that it need not take."""
    if step.loss.head is None:
        return [
            "the model's head cannot be told from its body, so that logits are made for every token of a batch; "
            "they take memory: a small --batch-size helps"
        ]
    if not step.loss.head_is_frozen:
        return [
            "the model's head is trained, so that the logits of a batch are made all at once; they take memory: "
            "a small --batch-size helps"
        ]
    if step.loss.head.projection is None:
        return [
            "the model's head cannot be run in parts, so that the logits of a batch are made all at once; they take "
            "memory: a small --batch-size helps"
        ]
    return []


def _size(tree: Any) -> int:
    """Bytes of all arrays of a tree."""
    return sum(array.nbytes for _, array in tree_flatten(tree))


def recomputed_layers(model: nn.Module, config: TrainingConfig) -> list[nn.Module]:
    """The layers whose activations are recomputed: every k-th of those that the backward pass goes through."""
    layers = list(model.layers)
    while layers and not tree_flatten(layers[0].trainable_parameters()):
        layers.pop(0)
    return layers[:: config.grad_checkpoint_every] if config.grad_checkpoint else []
