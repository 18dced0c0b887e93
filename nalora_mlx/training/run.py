"""One training run: the loop around the training step, its reports, validations and saves."""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from nalora_mlx.adapters.attach import adapt_result
from nalora_mlx.adapters.files import adapter_config as config_of_adapter
from nalora_mlx.adapters.forward_pass import recompute_activations
from nalora_mlx.core import trees
from nalora_mlx.core.config import PLAIN_LORA, RunConfig, TrainingConfig
from nalora_mlx.core.errors import places
from nalora_mlx.data.batches import Batch, training_batches
from nalora_mlx.data.preferences import TokenizedRow
from nalora_mlx.runs.progress import Progress, TrainResult
from nalora_mlx.training.accumulation import Window, prefetch, windows
from nalora_mlx.training.device_memory import trim_cache
from nalora_mlx.training.diagnostics import measure_misalignment
from nalora_mlx.training.distributed import workers
from nalora_mlx.training.events import Events, Listener
from nalora_mlx.training.in_flight import InFlight, SkippedUpdate
from nalora_mlx.training.last_good import LastGoodWeights
from nalora_mlx.training.loss import Loss
from nalora_mlx.training.preferences.loss import PreferenceLoss
from nalora_mlx.training.preferences.run import PreferenceRun
from nalora_mlx.training.reports import training_metrics
from nalora_mlx.training.run_files import RunFiles
from nalora_mlx.training.schedules import run_iterations
from nalora_mlx.training.step import Accumulated, TrainingStep, recomputed_layers
from nalora_mlx.training.validation import Validation


class Run:
    """One run, with the arguments of `train`. Constructing it changes nothing; `run` does everything."""

    def __init__(
        self,
        model: nn.Module,
        train_set: Sequence[TokenizedRow],
        valid_set: Sequence[TokenizedRow],
        config: TrainingConfig,
        optimizer: optim.Optimizer | None = None,
        output: str | Path | None = None,
        listeners: Sequence[Listener] = (),
        adapter_config: dict[str, Any] | None = None,
        resume: str | Path | None = None,
        resume_anyway: bool = False,
        stop: Callable[[], bool] | None = None,
        loss: Loss | None = None,
    ):
        result = adapt_result(model)
        self.model, self.train_set, self.valid_set, self.config = model, train_set, valid_set, config
        self.workers = workers()
        leads = self.workers.rank == 0  # writes files and sends events
        self.events = Events(listeners if leads else ())
        self.optimizer = optimizer or optim.Adam(learning_rate=RunConfig.learning_rate)
        self.step = TrainingStep(
            model,
            self.optimizer,
            result.config if result else PLAIN_LORA,
            loss=loss,
            grad_clip=config.grad_clip,
            workers=self.workers,
        )
        self.preferences = (
            PreferenceRun(loss, config, self.workers) if isinstance(loss, PreferenceLoss) else None
        )
        self.good = LastGoodWeights(self.step, self.preferences.window_arrays if self.preferences else None)
        self.in_flight: InFlight | None = None
        self.window_arrays: list[dict[str, mx.array]] = []  # for each batch of the current window
        self.settled_at = 0.0  # when the last iteration was settled, in seconds
        self.accumulated: Accumulated | None = None  # of the current window
        self.skipped: SkippedUpdate | None = None  # why the current window's update is skipped
        self.skipped_before = 0  # skipped updates in a row before the last update that was applied
        self.has_files, self.resume_anyway, self.stop = bool(output or resume), resume_anyway, stop
        self.files = RunFiles(
            self.step,
            config,
            adapter_config or (config_of_adapter(model) if result else None),
            Path(output) if output is not None and leads else None,
            Path(resume) if resume is not None else None,
            self.events,
        )
        self.validation = Validation(self.step, valid_set, config, self.files, self.events, self.preferences)
        self.iterations = run_iterations(train_set, config)
        self.layers = recomputed_layers(model, config)
        self.notices: list[str] = []

    @property
    def progress(self) -> Progress:
        """How far the run has come."""
        return self.files.progress

    def run(self) -> TrainResult:
        """Train until all iterations are done, or until something ends the run early; see `train` for errors."""
        files = self.files
        self.notices += self.step.notices()
        if self.has_files:
            files.identify(self.train_set, self.valid_set)
            self.notices += files.restore(self.iterations, self.resume_anyway)
            self.good.save()
            self.notices += files.check_output(self.iterations)
        with files.locked():
            self.notices += files.prepare_output()
            return self.train()

    def prepare_rows(self) -> bool:
        """Compute what is computed once before training; return False if the run is to stop instead."""
        rows = self.validation.rows
        if self.preferences is not None:

            def go_on(done: int, count: int) -> bool:
                self.events.send("reference", batch=done, batches=count)
                return self.reason_to_stop() is None

            found = self.preferences.prepare(self.train_set, rows, self.files, go_on)
            if found is None:
                return False
            self.train_set, rows = found
        self.validation.prepare(rows)
        return True

    # --- the loop -------------------------------------------------------------------------------------------------

    def train(self) -> TrainResult:
        """Train, validate, report and save."""
        config, progress = self.config, self.progress
        self.events.send("start", iterations=self.iterations, done=progress.iteration)
        for text in self.notices:
            self.events.send("notice", text=text)
        ready = self.prepare_rows()
        self.began = time.perf_counter() - progress.seconds
        if progress.iteration == 0 and ready:
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
        stopped, started = self.reason_to_stop(), progress.iteration
        left = 0 if stopped else self.iterations - started
        with closing(prefetch(windows(batches, left, config.grad_accumulation_steps))) as prepared:
            for window in prepared:
                done = range(started + 1, started + 1 + len(window))
                self.update(window, done)
                started, last = done[-1], done[-1] == self.iterations
                if last or any(iteration % config.steps_per_eval == 0 for iteration in done):
                    self.validate()
                stopped = self.reason_to_stop()
                if last or stopped or any(iteration % config.save_every == 0 for iteration in done):
                    self.save()
                if stopped:
                    break
        progress.seconds = time.perf_counter() - self.began
        result = progress.result(stopped)
        self.events.send("end", result=result)
        self.files.finish()
        return result

    def update(self, window: Window, iterations: range) -> None:
        """Run the iterations of one accumulation window, which ends in an optimizer update.

        1. Start an iteration while the previous one runs, so that the device does not wait for Python.
        2. Wait for the previous one and record its results, which are therefore read one step late.
        3. If they show that the previous window's update is to be skipped or undone, discard the iteration that was
           started from it, and start it again.
        """
        for i, iteration in enumerate(iterations):
            before = trees.references(self.step.state) if i == 0 and self.in_flight else None
            following = self.start(window, i, iteration)
            if self.settle(before):
                following = self.start(window, i, iteration)
            self.in_flight = following
            if self.is_report_due(iteration):
                self.settle()

    def start(self, window: Window, position: int, iteration: int) -> InFlight:
        """Start the iteration at a position of a window; do not wait for it."""
        started, weights = time.perf_counter(), self.good.current()
        batch, update = window[position], position == len(window) - 1
        counts = [sum(of_term) for of_term in zip(*(one.loss_counts for one in window), strict=True)]
        if self.preferences is not None and position == 0:
            self.window_arrays = self.preferences.window_arrays(window)
        more = self.window_arrays[position] if self.preferences is not None else None
        with recompute_activations(self.layers) if self.layers else nullcontext():
            loss, self.accumulated = self.step(
                batch, counts, self.accumulated, update, (self.config.seed, iteration), more
            )
        mx.async_eval(self.step.state, loss, self.accumulated)
        step = self.step
        return InFlight(iteration, batch, update, weights, loss, step.measures, step.health.finite, started)

    def settle(self, before: Any = None) -> bool:
        """Wait for the iteration in flight, if there is one, and record its results.

        Args:
            before: the state from which the next iteration was started meanwhile. If the update of the iteration in
                flight is skipped, that next iteration is discarded and this state is restored.

        Returns:
            Whether the state was restored.
        """
        flight, self.in_flight = self.in_flight, None
        if flight is None:
            return False
        self.record(flight, float(flight.loss))
        restored = flight.updates and self.skipped is not None and before is not None
        if restored:
            trees.assign(self.step.state, before)
            self.accumulated = None
        if flight.updates:
            skipped, self.skipped = self.skipped, None
            self.finish_update(skipped)
        if self.is_report_due(flight.iteration):
            self.report()
        return restored

    def record(self, flight: InFlight, loss: float) -> None:
        """Record the loss of an iteration that has ended, and the update as skipped if a number is not finite."""
        progress, batch = self.progress, flight.batch
        if math.isfinite(loss) and batch.supervised_tokens:
            self.good.show(flight.weights, batch)
        if self.is_report_due(flight.iteration):
            measure_misalignment(self.step, batch)
        trim_cache(self.config.clear_cache_threshold)
        since, self.settled_at = max(self.settled_at, flight.started), time.perf_counter()
        count = batch.loss_counts[0]
        progress.record_batch(loss, batch.supervised_tokens, self.settled_at - since, count)
        if flight.measures is not None and math.isfinite(loss):
            sums = np.array(flight.measures).tolist()
            progress.record_measures(dict(zip(self.step.loss.measures, sums, strict=True)))
        if self.skipped is None and not flight.finite.item():
            self.skipped = SkippedUpdate(batch, loss)
        if math.isfinite(loss) and progress.record_loss(loss / max(count, 1)):
            self.events.send(
                "notice",
                text=f"iteration {flight.iteration}: the loss jumps repeatedly; lower the learning rate, "
                f"clip the gradient (--grad-clip 1), or check these rows: {self.rows_of(batch)}",
            )
        self.events.send("step", step=flight.iteration, iterations=self.iterations)

    def finish_update(self, skipped: SkippedUpdate | None) -> None:
        """Count an update as applied or skipped. Undo the previous update if the loss shows that it broke the weights.

        Raises:
            FloatingPointError: too many updates in a row were skipped or undone.
        """
        progress = self.progress
        if skipped is None:
            progress.updates += 1
            self.skipped_before, progress.skipped_in_a_row = progress.skipped_in_a_row, 0
            self.good.shown = False
            return
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        if not math.isfinite(skipped.loss) and self.good.are_at_fault(skipped.batch):
            self.undo_update(skipped.reason)
            return
        rows, at = self.rows_of(skipped.batch), f"iteration {progress.iteration}"
        self.events.send("notice", text=f"{at}: {skipped.reason}; the update is skipped; rows: {rows}")
        self.end_if_hopeless(
            f"{skipped.reason} (rows: {rows})",
            "lower the learning rate, clip the gradient, or look for broken rows",
        )

    def undo_update(self, reason: str) -> None:
        """Return to the weights before the last update, which broke them.

        Raises:
            FloatingPointError: too many updates in a row were skipped or undone, or the run does not keep weights.
        """
        progress, at = self.progress, f"iteration {self.progress.iteration}"
        why = f"{reason}, and the weights are at fault, not the rows"
        advice = "lower the learning rate, or clip the gradient"
        if not self.good.restore():
            saved = self.files.last_complete()
            raise FloatingPointError(f"{at}: {why}: the update broke them, and is not saved{saved}; {advice}")
        progress.updates -= 1
        progress.skipped += 1
        progress.skipped_in_a_row += 1 + self.skipped_before
        self.events.send("notice", text=f"{at}: {why}: an update broke them, and is undone; {advice}")
        self.end_if_hopeless(why, advice)

    def end_if_hopeless(self, why: str, advice: str) -> None:
        """Save and raise FloatingPointError if too many updates in a row were skipped or undone."""
        count, at = self.progress.skipped_in_a_row, f"iteration {self.progress.iteration}"
        if count < self.config.max_bad_steps:
            return
        self.progress.skipped_in_a_row = 0
        self.save(prune=False)
        raise FloatingPointError(
            f"{count} updates in a row were skipped, up to {at}: {why}{self.files.where_saved()}; {advice}"
        )

    def check_weights(self) -> None:
        """Undo the last update if it broke the weights, which no loss may have shown yet."""
        if not self.good.shown and not self.good.give_finite_loss():
            self.undo_update("the loss after the last update is not finite")

    def reason_to_stop(self) -> str | None:
        """Return why the run ends here, the same on all workers, or None."""
        if self.workers.any(self.stop is not None and self.stop()):
            return "stop was requested"
        patience, stale = self.config.early_stopping, self.progress.stale_validations
        if patience is not None and stale >= patience:
            measure = "accuracy" if self.config.prefers else "loss"
            return f"no better validation {measure} in {stale} validations"
        return None

    # --- reports, validation, saves -------------------------------------------------------------------------------

    def is_report_due(self, iteration: int) -> bool:
        """Return whether a report follows this iteration."""
        return iteration == self.iterations or iteration % self.config.steps_per_report == 0

    def report(self) -> None:
        """Send the metrics of training since the last report."""
        self.events.send("metrics", split="train", **training_metrics(self.step, self.progress))

    def validate(self) -> None:
        """Compute the validation loss, and save the adapter if it is the best so far."""
        if self.validation.batches:
            self.settle()
            self.check_weights()
            self.validation.run()

    def save(self, prune: bool = True) -> None:
        """Write a checkpoint, if this run writes files, of weights with a finite loss."""
        self.settle()
        mx.synchronize()  # raises if the GPU has failed; reading the arrays that it left would not
        self.check_weights()
        self.good.save()
        self.progress.seconds = time.perf_counter() - self.began
        self.files.save(prune)

    def rows_of(self, batch: Batch) -> str:
        """Return all rows of a batch as places in files."""
        return places([self.train_set[row].source for row in batch.rows], most=len(batch.rows))
