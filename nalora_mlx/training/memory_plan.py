"""How much memory a run needs, what fits into a budget, and what to tell the user before the run starts."""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

from nalora_mlx.adapters.attach import adapt_result
from nalora_mlx.core.config import PLAIN_LORA, RunConfig, TrainingConfig
from nalora_mlx.core.errors import InputError
from nalora_mlx.core.trees import nbytes
from nalora_mlx.data.batches import epoch_batches, pack_shapes, row_shapes
from nalora_mlx.data.packing import epoch_packs
from nalora_mlx.data.padding import PAD_TO, padded_length, rounded_length
from nalora_mlx.data.tokenization import Example
from nalora_mlx.ops.cross_entropy import TILE_BYTES
from nalora_mlx.training.distributed import ALONE, Workers
from nalora_mlx.training.last_good import keeps_weights
from nalora_mlx.training.loss import SupervisedLoss
from nalora_mlx.training.memory_model import BatchShape, PeakMemory, PeakProfiler
from nalora_mlx.training.step import TrainingStep, recomputed_layers

MOST_EXTRAPOLATED = 4  # times the measured length; no claim is made beyond
RAM_SHARE = 0.8  # of the RAM, on a device without a recommended working set
CGROUPS = Path("/sys/fs/cgroup")


def largest_batch(
    examples: Sequence[Example], config: TrainingConfig, workers: Workers = ALONE
) -> BatchShape:
    """Return the shape of the first epoch's largest batch: most tokens, then longest, then most supervised."""
    supervised = [int(example.loss_mask[1:].sum()) for example in examples]
    found = []
    if config.packing:
        length = padded_length(examples)
        batches = epoch_packs(examples, config.batch_size, config.seed, 0)
        shapes = pack_shapes(examples, [pack for packs in batches for pack in packs], length)
        for packs in batches:
            count = sum(supervised[row] for pack in packs for row in pack)
            capacity = shapes.loss_capacity(count, len(packs), length)
            found.append(BatchShape(len(packs), length, capacity, packed=True))
    else:
        shapes = row_shapes(examples)
        for rows in epoch_batches(examples, config.batch_size, config.seed, 0):
            length = shapes.length_for(max(examples[row].inputs for row in rows))
            capacity = shapes.loss_capacity(sum(supervised[row] for row in rows), len(rows), length)
            found.append(BatchShape(len(rows), length, capacity))
    largest = max(found, key=lambda shape: (shape.tokens, shape.length, shape.loss_positions))
    return largest.with_shape(math.ceil(largest.rows / workers.size), largest.length)


def upper_bound_bytes(model: nn.Module, shape: BatchShape) -> float:
    """Return bytes that a step surely stays below, from shapes alone; infinite if the model's heads are unknown.

    Assumes that every layer keeps eight times the outputs of its projections and norms, and its attention scores, and
    that the output head computes far more than one tile of logits. The bound is several times the real peak, but enough
    to know that a small run fits.
    """
    args = getattr(model, "args", None)
    heads, experts_per_token = (
        getattr(args, name, None) for name in ("num_attention_heads", "num_experts_per_tok")
    )
    if not isinstance(heads, int):
        return math.inf
    outputs = sum(
        _outputs_per_token(module.weight, experts_per_token)
        for layer in model.layers
        for _, module in layer.named_modules()
        if isinstance(module.get("weight"), mx.array)
    )
    scores = len(model.layers) * heads * shape.length
    weights, trained = nbytes(model.parameters()), nbytes(model.trainable_parameters())
    return weights + 9 * trained + 32 * shape.tokens * (outputs + scores) + 64 * TILE_BYTES


def _outputs_per_token(weight: mx.array, experts_per_token: Any) -> int:
    """Return how many numbers a module outputs per token, from the shape of its weight."""
    if weight.ndim == 1:
        return weight.size
    if weight.ndim == 2:
        return weight.shape[0]
    return weight.shape[-2] * (experts_per_token if isinstance(experts_per_token, int) else weight.shape[0])


@dataclass(frozen=True)
class Plan:
    """The memory that a run needs, in bytes, and what would fit.

    Attributes:
        shape: of its largest batch on one worker.
        peak: of its step.
        budget: to stay within.
        weights: of the model and its adapters.
        checkpointed: the peak with gradient checkpointing; None if the run uses it already.
    """

    shape: BatchShape
    peak: PeakMemory
    budget: int
    weights: int
    checkpointed: PeakMemory | None

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
        kind = "packed sequences" if self.shape.packed else "rows"
        at_least = " at least" if self.longest == MOST_EXTRAPOLATED * length else ""
        lines = [
            f"memory: about {_gb(self.needed)} for the largest batch, {rows} {kind} of {length} tokens; "
            f"weights {_gb(self.weights)}, budget {_gb(self.budget)}: {'fits' if self.fits else 'does not fit'}",
            f"at {length} tokens: up to {self.peak.rows_within(self.budget, length)} {kind} per batch; "
            f"at {rows} {kind}: up to {self.longest} tokens{at_least}",
        ]
        if self.checkpointed is not None:
            lines.append(
                f"with --grad-checkpoint: about {_gb(self.checkpointed.at(rows, length))}, "
                f"up to {self.checkpointed.rows_within(self.budget, length)} {kind} per batch"
            )
        return lines

    def remedies(self) -> list[str]:
        """Return flags with which the run would fit, each by itself."""
        rows, length = self.shape.rows, self.shape.length
        flags = []
        if 0 < (fewer := self.peak.rows_within(self.budget, length)) < rows:
            windows = math.ceil(rows / fewer)
            flags.append(f"--batch-size {fewer} --grad-accumulation-steps {windows}")
        if self.checkpointed is not None and (most := self.checkpointed.rows_within(self.budget, length)):
            flags.append("--grad-checkpoint" + (f" --batch-size {most}" if most < rows else ""))
        if PAD_TO <= self.longest < length:
            flags.append(f"--max-seq-length {self.longest + 1}")
        return flags or ["--quantize 4, or a smaller model"]


def plan(
    model: nn.Module,
    shape: BatchShape,
    config: TrainingConfig,
    optimizer: optim.Optimizer,
    budget: int,
    loss: SupervisedLoss | None = None,
) -> Plan:
    """Measure what a run needs. The model stays as it is.

    Args:
        model: as it will be trained.
        shape: of the largest batch, see `largest_batch`.
        config: the run's settings.
        optimizer: made like the run's optimizer, but another object.
        budget: bytes to stay within.
        loss: the model's loss; made here if None.
    """
    result = adapt_result(model)
    parameters = result.config if result else PLAIN_LORA
    step = TrainingStep(model, optimizer, parameters, loss=loss, grad_clip=config.grad_clip)
    accumulating = config.grad_accumulation_steps > 1
    peak = PeakProfiler(step, recomputed_layers(model, config), accumulating).profile(shape, budget // 2)
    checkpointed = None
    if not config.grad_checkpoint:
        layers = recomputed_layers(model, replace(config, grad_checkpoint=True))
        step.graph_of_shape.cache_clear()  # these graphs do not recompute
        checkpointed = PeakProfiler(step, layers, accumulating).profile(shape, budget // 2)
    if keeps_weights(model):  # the last good and the saved weights, next to the current ones
        kept = 2 * nbytes(model.trainable_parameters())
        peak = peak.plus(kept)
        checkpointed = checkpointed and checkpointed.plus(kept)
    return Plan(shape, peak, budget, nbytes(model.parameters()), checkpointed)


def memory_advice(
    model: nn.Module,
    examples: Sequence[Example],
    config: RunConfig,
    new_optimizer: Callable[[], optim.Optimizer],
    workers: Workers = ALONE,
    loss: SupervisedLoss | None = None,
) -> list[str]:
    """Return what to say about a run's memory before it starts: everything with `--plan`, else only what does not fit.

    A run that surely fits by shapes alone is not measured.

    Raises:
        InputError: the run needs more memory than the machine has, and more than the budget.
    """
    loss = loss or SupervisedLoss(model)
    budget = config.memory_budget or default_budget()
    shape = largest_batch(examples, config, workers)
    if not config.plan and upper_bound_bytes(model, shape) <= budget:
        return []
    found = plan(model, shape, config, new_optimizer(), budget, loss)
    remedies = "what would fit: " + "; or ".join(found.remedies())
    if config.plan:
        notes = [f"note: {notice}" for notice in loss.notices()]
        return notes + found.lines() + ([] if found.fits else [remedies])
    if found.needed > max(budget, machine_memory()):  # on a CPU, MLX would crash without a message
        raise InputError(f"{found.lines()[0]}; {remedies}")
    return [] if found.fits else [f"note: {found.lines()[0]}; {remedies}"]


def default_budget() -> int:
    """Return the bytes that a run should stay within: the device's recommended working set, or a share of the RAM."""
    recommended = mx.device_info().get("max_recommended_working_set_size")
    if mx.default_device() != mx.Device(mx.cpu) and isinstance(recommended, int):
        return recommended
    return int(RAM_SHARE * machine_memory())


def machine_memory() -> float:
    """Return the bytes of RAM of the machine, or of the container in which this process runs."""
    memory: float = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # cgroups 2 and 1
        try:
            return min(memory, int((CGROUPS / name).read_text()))
        except (OSError, ValueError):  # missing, or the word max
            continue
    return memory


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"
