"""How much memory a run needs, what fits into a budget, and what to tell the user before the run starts."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import mlx.nn as nn
import mlx.optimizers as optim

from nalora_mlx.adapters.attach import adapt_result
from nalora_mlx.core.config import PLAIN_LORA, RunConfig, TrainingConfig
from nalora_mlx.core.errors import InputError, counted
from nalora_mlx.core.trees import nbytes
from nalora_mlx.data.answer_batches import are_preferences
from nalora_mlx.data.batches import collate, epoch_batches, pack_shapes, row_shapes
from nalora_mlx.data.media_batches import collate_media
from nalora_mlx.data.packing import epoch_packs
from nalora_mlx.data.padding import PAD_TO, padded_length, rounded_length
from nalora_mlx.data.tokenization import Example
from nalora_mlx.models.vision.model import trains_towers
from nalora_mlx.ops.device_memory import default_budget, device_memory
from nalora_mlx.ops.device_sizes import device_kind
from nalora_mlx.training.distributed import ALONE, Workers
from nalora_mlx.training.last_good import keeps_weights
from nalora_mlx.training.loss import Loss, SupervisedLoss
from nalora_mlx.training.memory_bound import bound_from_graph, bound_from_shapes
from nalora_mlx.training.memory_model import BatchShape, PeakMemory, PeakProfiler, no_progress
from nalora_mlx.training.step import TrainingStep, recomputed_layers

MOST_EXTRAPOLATED = 4  # times the measured length; no claim is made beyond
PATIENCE = 60  # seconds of trials, after which only those are made that the plan cannot do without


def largest_batch(examples: Sequence[Any], config: TrainingConfig, workers: Workers = ALONE) -> BatchShape:
    """Return the shape of the first epoch's largest batch: most tokens, then longest, then most supervised."""
    supervised = [example.supervised_tokens for example in examples]
    preferences = are_preferences(examples)
    lanes = len(examples[0].lanes)
    found = []
    if config.packing:
        length = padded_length(examples)
        batches = epoch_packs(examples, config.batch_size, config.seed, 0)
        shapes = pack_shapes(examples, [pack for packs in batches for pack in packs], length)
        for packs in batches:
            count = sum(supervised[row] for pack in packs for row in pack)
            capacity = shapes.loss_capacity(count, len(packs), length)
            per_sequence = math.ceil(sum(map(len, packs)) / len(packs))
            found.append(
                BatchShape(len(packs), length, capacity, packed=True, rows_per_sequence=per_sequence)
            )
    else:
        shapes = row_shapes(examples)
        for rows in epoch_batches(examples, config.batch_size, config.seed, 0):
            length = shapes.length_for(max(examples[row].inputs for row in rows))
            sequences = len(rows) * lanes
            capacity = shapes.loss_capacity(sum(supervised[row] for row in rows), sequences, length)
            found.append(BatchShape(sequences, length, capacity, lanes=lanes))
    largest = max(found, key=lambda shape: (shape.tokens, shape.length, shape.loss_positions))
    share = lanes * math.ceil(largest.rows / lanes / workers.size)
    largest = largest.with_shape(share, largest.length)
    if preferences:
        branched = any(lane.branches is not None for lane in examples[0].lanes)
        return replace(largest, answers=len(examples[0].answers), branched=branched)
    return replace(largest, media=_media_of_largest(examples))


def _media_of_largest(examples: Sequence[Example]) -> dict[str, Any] | None:
    """Return the media of the row with most image tokens, if features are computed before training."""
    with_images = [row for row in examples if row.media is not None and row.media.inputs is None]
    if not with_images:
        return None
    most = max(with_images, key=lambda row: len(row.media.positions) if row.media else 0)
    return collate_media([most.media], most.inputs)


@dataclass(frozen=True)
class Plan:
    """The memory that a run needs, in bytes, and what would fit.

    Attributes:
        shape: of its largest batch on one worker.
        peak: of its step.
        budget: to stay within.
        weights: of the model and its adapters.
        checkpointed: the peak with gradient checkpointing; None if the run uses it already, or if it was not measured.
        incomplete: whether trials were left out because they take long.
    """

    shape: BatchShape
    peak: PeakMemory
    budget: int
    weights: int
    checkpointed: PeakMemory | None
    incomplete: bool = False

    @property
    def needed(self) -> int:
        """Peak memory of the run."""
        return self.peak.at(self.shape.rows, self.shape.length)

    @property
    def longest(self) -> int:
        """Greatest padded length that fits with the same batch size, as far as the measurement reaches."""
        fitting = self.peak.length_within(self.budget, self.shape.rows)
        length = min(fitting, MOST_EXTRAPOLATED * self.shape.length)
        while rounded_length(max(length, 1)) > length > 0:  # rows of this length would be padded beyond it
            length -= PAD_TO
        return max(length, 0)

    @property
    def fits(self) -> bool:
        """Whether the run stays within the budget."""
        return self.needed <= self.budget

    def lines(self) -> list[str]:
        """Return what `--plan` prints."""
        rows, length = self.shape.rows, self.shape.length
        kind = "packed sequence" if self.shape.packed else "sequence" if self.shape.lanes > 1 else "row"
        at_least = " at least" if self.longest == MOST_EXTRAPOLATED * length else ""
        lines = [
            f"memory: about {_gb(self.needed)} for the largest batch, {counted(rows, kind)} of {length} tokens; "
            f"weights {_gb(self.weights)}, budget {_gb(self.budget)}: {'fits' if self.fits else 'does not fit'}",
            f"at {length} tokens: up to {counted(self.peak.rows_within(self.budget, length), kind)} per batch; "
            f"at {counted(rows, kind)}: up to {self.longest} tokens{at_least}",
        ]
        if self.checkpointed is not None:
            lines.append(
                f"with --grad-checkpoint: about {_gb(self.checkpointed.at(rows, length))}, "
                f"up to {counted(self.checkpointed.rows_within(self.budget, length), kind)} per batch"
            )
        if self.incomplete:
            lines.append(
                "note: some trials were left out, because they take long here; the numbers are less exact"
            )
        return lines

    def remedies(self) -> list[str]:
        """Return flags with which the run would fit, each by itself."""
        lanes, length, flags = self.shape.lanes, self.shape.length, list[str]()
        rows, answers = self.shape.rows // lanes, max(1, self.shape.answers // lanes)  # in a sequence
        if 0 < (fewer := self.peak.rows_within(self.budget, length) // lanes) < rows:
            windows = math.ceil(rows / fewer)
            flags.append(f"--batch-size {fewer} --grad-accumulation-steps {windows}")
        if self.checkpointed is not None and (
            most := self.checkpointed.rows_within(self.budget, length) // lanes
        ):
            flags.append("--grad-checkpoint" + (f" --batch-size {most}" if most < rows else ""))
        if PAD_TO <= self.longest < length:
            flags.append(f"--max-seq-length {self.longest // answers + 1}")
        return flags or ["--quantize 4, or a smaller model"]


def plan(
    model: nn.Module,
    shape: BatchShape,
    config: TrainingConfig,
    optimizer: optim.Optimizer,
    budget: int,
    loss: Loss | None = None,
    progress: Callable[[str], None] = no_progress,
) -> Plan:
    """Measure what a run needs. The model stays as it is.

    Args:
        model: as it will be trained.
        shape: of the largest batch, see `largest_batch`.
        config: the run's settings.
        optimizer: made like the run's optimizer, but another object.
        budget: bytes to stay within.
        loss: the model's loss; made here if None.
        progress: called with a line of text before each trial.
    """
    return measure(planning_step(model, config, optimizer, loss), shape, config, budget, progress)


def measure(
    step: TrainingStep,
    shape: BatchShape,
    config: TrainingConfig,
    budget: int,
    progress: Callable[[str], None] = no_progress,
) -> Plan:
    """Return the plan of a run whose step `planning_step` made; see `plan`."""
    began, model = time.perf_counter(), step.model

    def left() -> float:
        return PATIENCE - (time.perf_counter() - began)

    accumulating = config.grad_accumulation_steps > 1
    profiler = PeakProfiler(step, recomputed_layers(model, config), accumulating, progress)
    peak = profiler.profile(shape, budget // 2, left)
    checkpointed, incomplete = None, profiler.incomplete
    fits = peak.at(shape.rows, shape.length) <= budget
    if not config.grad_checkpoint and fits and left() <= 0:
        incomplete = True
    elif not config.grad_checkpoint:
        layers = recomputed_layers(model, replace(config, grad_checkpoint=True))
        step.graph_of_shape.cache_clear()  # these graphs do not recompute
        profiler = PeakProfiler(
            step, layers, accumulating, lambda text: progress(f"with --grad-checkpoint, {text}")
        )
        checkpointed = profiler.profile(shape)
    if keeps_weights(model):
        kept = _kept_weights(config) * nbytes(model.trainable_parameters())
        peak = peak.plus(kept)
        checkpointed = checkpointed and checkpointed.plus(kept)
    return Plan(shape, peak, budget, nbytes(model.parameters()), checkpointed, incomplete)


def planning_step(
    model: nn.Module, config: TrainingConfig, optimizer: optim.Optimizer, loss: Loss | None = None
) -> TrainingStep:
    """Return a training step like the run's. `optimizer` is made like the run's, but another object."""
    result = adapt_result(model)
    parameters = result.config if result else PLAIN_LORA
    return TrainingStep(model, optimizer, parameters, loss=loss, grad_clip=config.grad_clip)


def upper_bound_bytes(step: TrainingStep, shape: BatchShape, config: TrainingConfig) -> float:
    """Return bytes that the run stays below, from the traced graph of its step; infinite if it cannot be traced."""
    layers = recomputed_layers(step.model, config)
    bound = bound_from_graph(step, shape, layers, config.grad_accumulation_steps > 1)
    kept = _kept_weights(config) * nbytes(step.model.trainable_parameters())
    return bound + kept * keeps_weights(step.model)


def _kept_weights(config: TrainingConfig) -> int:
    """Return how many copies of adapters there are next to the current ones.

    These are the saved and the last good ones, those before the step in flight and, in preference training, those
    before training.
    """
    return 3 + config.prefers


class MemoryAdvice(NamedTuple):
    """What to say about a run's memory before it starts.

    Attributes:
        lines: to show.
        peak_bytes: the run's peak, measured, or an upper bound if nothing was measured.
    """

    lines: list[str]
    peak_bytes: float


def memory_advice(
    model: nn.Module,
    examples: Sequence[Example],
    config: RunConfig,
    new_optimizer: Callable[[RunConfig], optim.Optimizer],
    workers: Workers = ALONE,
    loss: Loss | None = None,
    progress: Callable[[str], None] = no_progress,
) -> MemoryAdvice:
    """Return what to say about a run's memory before it starts: everything with `--plan`, else only what does not fit.

    1. If a bound from shapes alone, which takes no time, is within the budget, the run fits. On Metal this is left
       out, because the peak decides how much memory is kept resident, and that bound is several times the peak.
    2. If a bound from the traced graph of a step is within the budget, the run fits.
    3. Otherwise, and with `--plan`, measure a few small steps.

    Args:
        model: as it will be trained.
        examples: of the training set.
        config: the run's settings.
        new_optimizer: makes an optimizer like the run's.
        workers: over whom batches are divided.
        loss: the model's loss; made here if None.
        progress: called with a line of text before each trial.

    Raises:
        InputError: the run needs more memory than the machine has, and more than the budget.
    """
    budget = config.memory_budget or default_budget()
    loss = loss or SupervisedLoss(model)
    if trains_towers(model):
        step = planning_step(model, config, new_optimizer(config), loss)
        return towers_advice(step, examples, config, budget, workers, progress)
    shape = largest_batch(examples, config, workers)
    if not config.plan and device_kind() != "metal":
        bound = bound_from_shapes(loss, shape)
        if bound <= budget:
            return MemoryAdvice([], bound)
    step = planning_step(model, config, new_optimizer(config), loss)
    if not config.plan:
        bound = upper_bound_bytes(step, shape, config)
        if bound <= budget:
            return MemoryAdvice([], bound)
    found = measure(step, shape, config, budget, progress)
    remedies = "what would fit: " + "; or ".join(found.remedies())
    if config.plan:
        notes = [f"note: {notice}" for notice in step.loss.notices()]
        return MemoryAdvice(notes + found.lines() + ([] if found.fits else [remedies]), found.needed)
    if found.needed > max(budget, device_memory()):  # on a CPU, MLX would crash without a message
        raise InputError(f"{found.lines()[0]}; {remedies}")
    return MemoryAdvice([] if found.fits else [f"note: {found.lines()[0]}; {remedies}"], found.needed)


def towers_advice(
    step: TrainingStep,
    examples: Sequence[Example],
    config: RunConfig,
    budget: int,
    workers: Workers = ALONE,
    progress: Callable[[str], None] = no_progress,
) -> MemoryAdvice:
    """Return what to say about the memory of a run that trains a vision tower or a projector.

    What a tower takes depends on its images, so the step runs on the row with most image tokens, and on two of it.
    Each further row is assumed to take as much as the second one.

    Raises:
        InputError: the run needs more memory than the machine has, and more than the budget.
    """
    layers, accumulating = recomputed_layers(step.model, config), config.grad_accumulation_steps > 1
    rows = math.ceil(min(config.batch_size, len(examples)) / workers.size)
    most = max(range(len(examples)), key=lambda i: (_image_tokens(examples[i]), examples[i].inputs))
    profiler = PeakProfiler(step, layers, accumulating, progress)
    one, *two = profiler.measure_batches(
        [collate(examples, [most] * n).with_media() for n in range(1, min(rows, 2) + 1)]
    )
    peak = one + (rows - 1) * max(two[0] - one, 0) if two else one
    peak += 3 * nbytes(step.model.trainable_parameters()) * keeps_weights(step.model)
    line = (
        f"memory: about {_gb(peak)} for {counted(rows, 'row')} like {examples[most].source}, which has "
        f"{counted(_image_tokens(examples[most]), 'image token')}; weights {_gb(nbytes(step.model.parameters()))}, "
        f"budget {_gb(budget)}: {'fits' if peak <= budget else 'does not fit'}"
    )
    remedies = (
        "lower --batch-size, resize the images, use --grad-checkpoint, or leave --vision and --projector out"
    )
    if peak > max(budget, device_memory()) and not config.plan:
        raise InputError(f"{line}; {remedies}")
    if config.plan:
        return MemoryAdvice([line] if peak <= budget else [line, f"what to try: {remedies}"], peak)
    return MemoryAdvice([] if peak <= budget else [f"note: {line}; {remedies}"], peak)


def _image_tokens(example: Example) -> int:
    return len(example.media.positions) if example.media is not None else 0


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"
