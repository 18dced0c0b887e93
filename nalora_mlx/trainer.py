"""The compiled training step, evaluation, and the loop around them: the one place that wires the rooms together."""

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
import numpy as np
from mlx.utils import tree_map
from mlx_lm.utils import maybe_set_recommended_wired_limit

from nalora_mlx import checkpoint, importance
from nalora_mlx.adapters import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    adapter_description,
    adapter_weights,
    dropout_count,
    gated_mlps,
    report_of,
)
from nalora_mlx.config import PLAIN_LORA, NAParameters, RunConfig, TrainingConfig
from nalora_mlx.data import Batch, Example, batches_per_epoch, evaluation_batches, training_batches
from nalora_mlx.errors import InputError
from nalora_mlx.losses import cross_entropy_sum
from nalora_mlx.modules import ForwardPass, forward_pass, recomputed
from nalora_mlx.optim import apply_scaled

# What a run tells those who watch it: {"event": "start" | "step" | "validating" | "metrics" | "saved", ...}
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


class TrainingStep:
    """One iteration: forward, backward, and at the end of an accumulation window the scaled optimizer update.

    All mutable state is in `state`, one visible list that goes in and out of mx.compile.

    Args:
        model: an adapted (or unfrozen) model.
        optimizer: any mlx optimizer.
        parameters: the NA settings; with both mechanisms off the update is the optimizer's own.
        compiled: False runs the same step eagerly: for models that look at values on the way, and for debugging.
        forward: token ids [B, L] -> logits [B, L, V]; the model itself if None.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: optim.Optimizer,
        parameters: NAParameters = PLAIN_LORA,
        compiled: bool = True,
        forward: Callable[[mx.array], mx.array] | None = None,
    ):
        self.model = model
        self.forward = forward or model
        self.optimizer = optimizer
        self.parameters = parameters
        self.gated = {mlp.path: mlp for mlp in gated_mlps(model)} if parameters.active else {}
        self.dropouts = dropout_count(model)
        self.importance: dict[str, Any] = {
            "step": mx.array(0),
            "layers": {
                path: importance.init(
                    mlp.shape,
                    len(mlp.activation.regions),
                    self_gated=mlp.activation.selection is not None,
                )
                for path, mlp in self.gated.items()
            },
        }
        optimizer.init(model.trainable_parameters())
        self.state = [model.state, optimizer.state, self.importance, mx.random.state]
        self._loss_and_gradients = nn.value_and_grad(model, self._loss)
        run = partial(mx.compile, inputs=self.state, outputs=self.state)(self._run) if compiled else self._run
        self._step = run

    def __call__(
        self, batch: Batch, window_tokens: int, carry: Any, update: bool, seed: tuple[int, int] = (0, 0)
    ) -> tuple[mx.array, Any]:
        """Run one iteration.

        Args:
            batch: rows.
            window_tokens: supervised tokens in the whole accumulation window; every token weighs 1 / this.
            carry: what the previous iteration of the window returned, None at its start.
            update: whether this iteration ends the window.
            seed: (run seed, iteration), from which dropout draws.

        Returns:
            The summed loss of the batch, lazy, and the carry for the next iteration of the window.
        """
        word = int(np.random.SeedSequence(seed).generate_state(1)[0])
        arrays = [mx.array(a) for a in (batch.inputs, batch.targets, batch.supervised, batch.real)]
        return self._step(arrays, mx.array(1 / max(window_tokens, 1)), mx.random.key(word), carry, update)

    def _loss(self, arrays: list[mx.array], weight: mx.array, this: ForwardPass) -> tuple[mx.array, Any]:
        inputs, targets, supervised, real = arrays
        total = cross_entropy_sum(self.forward(inputs), targets, supervised)
        # A copy, because a checkpointed layer writes again while the backward recomputes it. The token count is one
        # for all layers: the same sum once per layer would be outputs that are equal, on which mx.compile fails.
        return total * weight, (total, {"layers": dict(this.seen), "tokens": mx.sum(real)})

    def _run(self, arrays, weight, key, carry, update):
        routes = {}
        if self.parameters.route:
            # The mask as it stood after the previous update: the backward comes before this step's statistics.
            routes = {path: state["mask"] for path, state in self.importance["layers"].items()}
        this = ForwardPass(
            weights=arrays[3] if self.gated else None,
            routes=routes,
            dropout_keys=mx.random.split(key, self.dropouts) if self.dropouts else None,
        )
        with forward_pass(this):
            (_, (total, seen)), gradients = self._loss_and_gradients(arrays, weight, this)
        if carry is not None:
            gradients = tree_map(mx.add, gradients, carry[0])
            seen = _add_seen(seen, carry[1])
        if not update:
            return total, (gradients, seen)
        self._update(gradients, seen)
        return total, None

    def _update(self, gradients: Any, seen: dict[str, Any]) -> None:
        scales = {}
        if self.gated:
            self.importance["step"] = self.importance["step"] + 1
            layers = self.importance["layers"]
            for path, mlp in self.gated.items():
                if path not in seen["layers"]:
                    continue  # an expert of its own module, to which no token went
                layer = {"tokens": seen["tokens"], **seen["layers"][path]}
                state = importance.observe(layers[path], layer, self.parameters.beta)
                layers[path] = importance.refresh(state, self.importance["step"], self.parameters)
                q = importance.multiplier(layers[path], self.parameters)
                scales.update(mlp.step_factors(q))
        new = apply_scaled(self.optimizer, gradients, self.model.trainable_parameters(), scales)
        self.model.update(new)

    def describe(self) -> dict[str, dict[str, Any]]:
        """Per layer: selection misalignment of the last step, mask and multiplier statistics, region occupancy."""
        described = {}
        for path, state in self.importance["layers"].items():
            q = np.array(importance.multiplier(state, self.parameters))
            row: dict[str, Any] = {
                "mask": _spread(np.array(state["mask"])),
                "multiplier": _spread(q),
                "importance": _spread(np.array(importance.importance(state, self.parameters.beta))),
            }
            if "beyond" in state:
                occupancy = np.array(importance.occupancy(state, self.parameters.beta))
                names = self.gated[path].activation.regions
                row["occupancy"] = dict(zip(names, occupancy.mean(axis=-1).tolist(), strict=True))
            if "misalignment" in state:
                row["misalignment"] = importance.misalignment(state).item()
            described[path] = row
        return described


def _add_seen(new: dict[str, Any], old: dict[str, Any]) -> dict[str, Any]:
    """Add what two micro-batches saw; a module may have run in one of them only."""
    layers = dict(old["layers"])
    for path, sums in new["layers"].items():
        layers[path] = tree_map(mx.add, sums, layers[path]) if path in layers else sums
    return {"layers": layers, "tokens": new["tokens"] + old["tokens"]}


def _spread(values: np.ndarray) -> dict[str, float]:
    low, median, high = np.quantile(values, (0.1, 0.5, 0.9)).tolist()
    return {"mean": float(values.mean()), "p10": low, "p50": median, "p90": high}


def evaluate(
    model: nn.Module, batches: Sequence[Batch], on_batch: Callable[[int], None] | None = None
) -> tuple[float, int]:
    """Mean cross entropy over all supervised tokens of the batches, and their number.

    Args:
        model: any model; it is put into evaluation mode and back.
        batches: a fixed set, see `evaluation_batches`.
        on_batch: called with the number of batches done.
    """
    training = model.training
    model.eval()

    @partial(mx.compile, inputs=model.state)
    def batch_loss(inputs: mx.array, targets: mx.array, supervised: mx.array) -> mx.array:
        return cross_entropy_sum(model(inputs), targets, supervised)

    total, tokens = 0.0, 0
    try:
        for done, batch in enumerate(batches, 1):
            total += float(batch_loss(*map(mx.array, (batch.inputs, batch.targets, batch.supervised))))
            tokens += batch.tokens
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
    if problems := TrainingConfig.problems(config):
        raise InputError("; ".join(problems))
    if not train_set:
        raise InputError("the training set is empty")
    if mx.distributed.init().size() > 1:
        raise InputError("training on several workers is not supported; start it without mlx.launch")
    if output is not None and description is None and report_of(model) is None:
        raise InputError(
            "the model was not adapted here; give the content of adapter_config.json as description"
        )
    if not adapter_weights(model):
        raise InputError("nothing to train: the model is frozen; call adapt first")
    return _Run(model, train_set, valid_set, config, optimizer, output, listeners, description).run()


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
            self.iterations = math.ceil(config.epochs * batches_per_epoch(train_set, config.batch_size))
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
            carry = None
            for position, batch in enumerate(window, 1):
                iteration += 1
                tic = time.perf_counter()
                with recomputed(layers) if layers else nullcontext():
                    total, carry = self.step(
                        batch, window_tokens, carry, position == len(window), (config.seed, iteration)
                    )
                mx.eval(self.step.state, total, carry)
                if mx.get_cache_memory() > config.clear_cache_threshold:
                    mx.clear_cache()
                self.count(total, batch.tokens, time.perf_counter() - tic)
                self.tell("step", step=iteration, iterations=self.iterations)
                last = iteration == self.iterations
                if last or iteration % config.steps_per_report == 0:
                    self.report(iteration)
                if last or iteration % config.steps_per_eval == 0:
                    self.validate(iteration)
                if last or iteration % config.save_every == 0:
                    self.save(iteration, last)
            result.updates += 1
        result.seconds = time.perf_counter() - start
        self.tell("end", result=result)
        return result

    def reset_report(self) -> None:
        self.loss_sum, self.loss_tokens, self.loss_steps, self.loss_seconds = 0.0, 0, 0, 0.0

    def count(self, total: mx.array, tokens: int, seconds: float) -> None:
        self.loss_sum += float(total)
        self.loss_tokens += tokens
        self.loss_steps += 1
        self.loss_seconds += seconds
        self.result.tokens += tokens

    def report(self, iteration: int) -> None:
        loss = self.loss_sum / max(self.loss_tokens, 1)
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss} at iteration {iteration}; lower the learning rate, or look for broken rows"
            )
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
            self.model, self.valid_batches, lambda done: self.tell("validating", batch=done, batches=count)
        )
        result = self.result
        result.valid_loss = loss
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
