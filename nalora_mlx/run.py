"""One training run: the loop around the training step, and all that it reports, saves and survives."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten
from mlx_lm.utils import maybe_set_recommended_wired_limit

from nalora_mlx import checkpoint, distributed
from nalora_mlx.adapters import adapter_description, adapter_weights, report_of
from nalora_mlx.batches import Batch, batches_per_epoch, evaluation_batches, training_batches
from nalora_mlx.config import PLAIN_LORA, RunConfig, TrainingConfig
from nalora_mlx.data import Example
from nalora_mlx.errors import places
from nalora_mlx.evaluation import evaluate
from nalora_mlx.forward import recomputed
from nalora_mlx.identity import identity
from nalora_mlx.progress import Progress
from nalora_mlx.resume import adapter_files, checkpoint_files, restore
from nalora_mlx.run_directory import check_space, rewind
from nalora_mlx.saver import CHECKPOINTS, Saver
from nalora_mlx.step import TrainingStep

# What a run tells those who watch it: {"event": one of these, ...}:
# start, step, validating, metrics, notice, saving, saved, end
Listener = Callable[[dict[str, Any]], None]


@dataclass
class TrainResult:
    """What came of a run, over all its parts if it was resumed.

    Losses are means over supervised tokens, None without a validation set; `skipped` counts updates that were not
    applied; `stopped` says why the run ended early, None if it did not.
    """

    iterations: int
    updates: int
    tokens: int
    seconds: float
    train_loss: float
    first_valid_loss: float | None = None
    valid_loss: float | None = None
    best_valid_loss: float | None = None
    best_iteration: int | None = None
    skipped: int = 0
    stopped: str | None = None


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
        report = report_of(model)
        self.model, self.config, self.stop = model, config, stop
        self.workers = distributed.workers()
        speaks = self.workers.rank == 0
        self.listeners = listeners if speaks else ()
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
        self.progress, self.notices = Progress(), list[str]()
        self.source = Path(resume) if resume is not None else None
        self.saver: Saver | None = None
        if output is None and resume is None:
            return
        description = description or (adapter_description(model) if report else None)
        known = identity(model, self.optimizer, description, config, train_set, valid_set)
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
        """Tell all listeners."""
        for listener in self.listeners:
            listener({"event": event, **content})

    def run(self) -> TrainResult:
        """Train until the iterations are done, or something ends the run before."""
        config, progress = self.config, self.progress
        maybe_set_recommended_wired_limit()
        if self.source is not None and self.saver is not None:
            aside = rewind(self.saver.output, self.source, progress.iteration)
            if progress.iteration in checkpoint.steps(self.saver.output / CHECKPOINTS):
                self.saver.saved = progress.iteration
            if aside is not None:
                self.notices.append(f"moved what came after iteration {progress.iteration} to {aside}")
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
        for window in _windows(batches, left, config.grad_accumulation_steps):
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
        result = self.result(stopped)
        self.tell("end", result=result)
        if self.saver is not None:
            self.saver.finish()
        return result

    def result(self, stopped: str | None) -> TrainResult:
        """What came of the run."""
        p = self.progress
        return TrainResult(
            iterations=p.iteration,
            updates=p.updates,
            tokens=p.tokens,
            seconds=p.seconds,
            train_loss=math.nan if p.train_loss is None else p.train_loss,
            first_valid_loss=p.first_valid_loss,
            valid_loss=p.valid_loss,
            best_valid_loss=p.best_valid_loss,
            best_iteration=p.best_iteration,
            skipped=p.skipped,
            stopped=stopped,
        )

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
        diagnose = any(self.reports(progress.iteration + i) for i in range(1, len(window) + 1))
        carry, suspect = None, None
        for position, batch in enumerate(window, 1):
            iteration = progress.iteration + 1
            tic = time.perf_counter()
            with recomputed(self.layers) if self.layers else nullcontext():
                total, carry = self.step(
                    batch, window_tokens, carry, position == len(window), (config.seed, iteration), diagnose
                )
            mx.eval(self.step.state, total, carry)
            if mx.get_cache_memory() > config.clear_cache_threshold:
                mx.clear_cache()
            loss = float(total)
            progress.count(loss, batch.tokens, time.perf_counter() - tic)
            if suspect is None and not self.step.health["finite"].item():
                suspect = (batch, loss)
            if math.isfinite(loss) and progress.spiked(loss / max(batch.tokens, 1)):
                self.notice_spikes(batch)
            self.tell("step", step=iteration, iterations=self.iterations)
            if position == len(window):
                self.settle(suspect)
            if self.reports(iteration):
                self.report()

    def settle(self, suspect: tuple[Batch, float] | None) -> None:
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
        rows = places([self.train_set[row].source for row in batch.rows])
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
        kept = f", and the state before them is in {self.saver.output}" if self.saver is not None else ""
        raise FloatingPointError(
            f"{count} updates in a row were not applied, up to iteration {progress.iteration}: {what} (rows: {rows})"
            f"{kept}; lower the learning rate, clip the gradient, or look for broken rows"
        )

    def notice_spikes(self, batch: Batch) -> None:
        """Say that the loss jumped repeatedly, last at this batch."""
        rows = places([self.train_set[row].source for row in batch.rows])
        self.tell(
            "notice",
            text=f"iteration {self.progress.iteration}: the loss jumps again and again; lower the learning rate, clip "
            f"the gradient (--grad-clip 1), or look at these rows: {rows}",
        )

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
        p.reported()
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
        if progress.validated(loss) and self.saver is not None and not self.saver.best():
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


def _size(tree: Any) -> int:
    """Bytes of all arrays of a tree."""
    return sum(array.nbytes for _, array in tree_flatten(tree))


def _windows(batches: Iterator[Batch], iterations: int, size: int) -> Iterator[list[Batch]]:
    """Cut the batches of a run into accumulation windows; the last one may be shorter."""
    done = 0
    while done < iterations:
        window = list(islice(batches, min(size, iterations - done)))
        done += len(window)
        yield window


def recomputed_layers(model: nn.Module, config: TrainingConfig) -> list[nn.Module]:
    """The layers whose activations are recomputed: every k-th of those that the backward pass goes through."""
    layers = list(model.layers)
    while layers and not tree_flatten(layers[0].trainable_parameters()):
        layers.pop(0)
    return layers[:: config.grad_checkpoint_every] if config.grad_checkpoint else []
