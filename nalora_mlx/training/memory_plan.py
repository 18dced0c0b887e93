"""How much memory a run will need, what fits into a budget, and what to say of it before the run starts."""

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
from nalora_mlx.data.batches import epoch_batches, pack_shapes, shapes_of
from nalora_mlx.data.packing import epoch_packs
from nalora_mlx.data.padding import PAD_TO, padded_length
from nalora_mlx.data.tokenization import Example
from nalora_mlx.ops.cross_entropy import TILE_BYTES
from nalora_mlx.training.distributed import ALONE, Workers
from nalora_mlx.training.memory_model import BatchShape, Peak, Planner, nbytes
from nalora_mlx.training.run import recomputed_layers
from nalora_mlx.training.step import TrainingStep

FAR = 4  # times the length that was measured: beyond it nothing is said
RAM_SHARE = 0.8  # of a machine without a recommended working set
CGROUPS = Path("/sys/fs/cgroup")


def largest_batch(
    examples: Sequence[Example], config: TrainingConfig, workers: Workers = ALONE
) -> BatchShape:
    """The size of the batch in the first epoch that needs most: most tokens, and of those most scored ones."""
    supervised = [int(example.loss_mask[1:].sum()) for example in examples]
    sizes = []
    if config.packing:
        length = padded_length(examples)
        batches = epoch_packs(examples, config.batch_size, config.seed, 0)
        shapes = pack_shapes(examples, [pack for packs in batches for pack in packs], length)
        for packs in batches:
            scored = sum(supervised[row] for pack in packs for row in pack)
            sizes.append(
                BatchShape(len(packs), length, shapes.loss_capacity(scored, len(packs), length), True)
            )
    else:
        shapes = shapes_of(examples)
        for rows in epoch_batches(examples, config.batch_size, config.seed, 0):
            length = shapes.length(max(examples[row].inputs for row in rows))
            scored = sum(supervised[row] for row in rows)
            sizes.append(BatchShape(len(rows), length, shapes.loss_capacity(scored, len(rows), length)))
    most = max(sizes, key=lambda size: (size.tokens, size.length, size.scored))
    return most.with_shape(math.ceil(most.rows / workers.size), most.length)


def upper_bound_bytes(model: nn.Module, size: BatchShape) -> float:
    """Bytes that a step surely stays below, from shapes alone; infinite where the model does not say its heads.

    Every layer is taken to keep eight times what its projections and norms put out, and its attention scores, and the
    head to make far more than a tile of logits: several times the truth, but enough to know that a small run fits.
    """
    args = getattr(model, "args", None)
    heads, chosen = (getattr(args, name, None) for name in ("num_attention_heads", "num_experts_per_tok"))
    if not isinstance(heads, int):
        return math.inf
    outputs = sum(
        _outputs(module.weight, chosen)
        for layer in model.layers
        for _, module in layer.named_modules()
        if isinstance(module.get("weight"), mx.array)
    )
    scores = len(model.layers) * heads * size.length
    weights, trained = nbytes(model.parameters()), nbytes(model.trainable_parameters())
    return weights + 8 * trained + 32 * size.tokens * (outputs + scores) + 64 * TILE_BYTES


def _outputs(weight: mx.array, experts_per_token: Any) -> int:
    """How many numbers a module makes of a token, from the shape of its weight."""
    if weight.ndim == 1:
        return weight.size
    if weight.ndim == 2:
        return weight.shape[0]
    return weight.shape[-2] * (experts_per_token if isinstance(experts_per_token, int) else weight.shape[0])


@dataclass(frozen=True)
class Plan:
    """What a run will need, in bytes, and what would fit.

    Attributes:
        size: of its largest batch on one worker.
        peak: of its step.
        budget: what it should stay within.
        weights: of the model and its adapters.
        checkpointed: the peak with gradient checkpointing, None if that is on.
    """

    size: BatchShape
    peak: Peak
    budget: int
    weights: int
    checkpointed: Peak | None

    @property
    def needed(self) -> int:
        """Peak memory of the run."""
        return self.peak.of(self.size.rows, self.size.length)

    @property
    def longest(self) -> int:
        """Tokens of the longest rows that fit, with as many in a batch; what was measured says so much and no more."""
        return min(self.peak.length_within(self.budget, self.size.rows), FAR * self.size.length)

    @property
    def fits(self) -> bool:
        """Whether the run stays within the budget."""
        return self.needed <= self.budget

    def lines(self) -> list[str]:
        """What `--plan` says."""
        rows, length = self.size.rows, self.size.length
        kind = "packed sequences" if self.size.packed else "rows"
        found = [
            f"memory: about {_gb(self.needed)} at the largest batch, {rows} {kind} of {length} tokens; "
            f"weights {_gb(self.weights)}, budget {_gb(self.budget)}: {'fits' if self.fits else 'does not fit'}",
            f"at {length} tokens: up to {self.peak.rows_within(self.budget, length)} {kind} in a batch; "
            f"at {rows} {kind}: up to {self.longest} tokens{' at least' if self.longest == FAR * length else ''}",
        ]
        if self.checkpointed is not None:
            found.append(
                f"with --grad-checkpoint: about {_gb(self.checkpointed.of(rows, length))}, "
                f"up to {self.checkpointed.rows_within(self.budget, length)} {kind} in a batch"
            )
        return found

    def remedies(self) -> list[str]:
        """The flags with which it would fit, each by itself."""
        rows, length = self.size.rows, self.size.length
        found = []
        if 0 < (fewer := self.peak.rows_within(self.budget, length)) < rows:
            windows = math.ceil(rows / fewer)
            found.append(f"--batch-size {fewer} --grad-accumulation-steps {windows}")
        if self.checkpointed is not None and (most := self.checkpointed.rows_within(self.budget, length)):
            found.append("--grad-checkpoint" + (f" --batch-size {most}" if most < rows else ""))
        if PAD_TO <= self.longest < length:
            found.append(f"--max-seq-length {self.longest + 1}")
        return found or ["--quantize 4, or a smaller model"]


def plan(
    model: nn.Module, size: BatchShape, config: TrainingConfig, optimizer: optim.Optimizer, budget: int
) -> Plan:
    """Find out what a run will need; the model stays as it is.

    Args:
        model: as it will be trained.
        size: of the largest batch, see `largest_batch`.
        config: the run's settings.
        optimizer: one like the run's, not that itself.
        budget: bytes to stay within.
    """
    report = adapt_result(model)
    step = TrainingStep(model, optimizer, report.config if report else PLAIN_LORA, grad_clip=config.grad_clip)
    accumulating = config.grad_accumulation_steps > 1
    peak = Planner(step, recomputed_layers(model, config), accumulating).peak(size, budget // 2)
    checkpointed = None
    if not config.grad_checkpoint:
        layers = recomputed_layers(model, replace(config, grad_checkpoint=True))
        # A graph that was made without recomputation is not the one to measure.
        step.graphs.clear()
        checkpointed = Planner(step, layers, accumulating).peak(size, budget // 2)
    return Plan(size, peak, budget, nbytes(model.parameters()), checkpointed)


def advice(
    model: nn.Module,
    examples: Sequence[Example],
    config: RunConfig,
    new_optimizer: Callable[[], optim.Optimizer],
    workers: Workers = ALONE,
) -> list[str]:
    """What to say of a run's memory before it starts: all with `--plan`; else only that it will not fit.

    A run that is sure to fit by shapes alone is not looked at further.

    Raises:
        InputError: it needs more memory than the machine has, and more than the budget that was given.
    """
    budget = config.memory_budget or default_budget()
    size = largest_batch(examples, config, workers)
    if not config.plan and upper_bound_bytes(model, size) <= budget:
        return []
    found = plan(model, size, config, new_optimizer(), budget)
    remedies = "what would fit: " + "; or ".join(found.remedies())
    if config.plan:
        return found.lines() + ([] if found.fits else [remedies])
    if found.needed > max(budget, _machine_memory()):  # on a CPU MLX would crash, and say nothing
        raise InputError(f"{found.lines()[0]}; {remedies}")
    return [] if found.fits else [f"note: {found.lines()[0]}; {remedies}"]


def default_budget() -> int:
    """Bytes that a run should stay within: the device's recommended working set, or a share of the memory."""
    recommended = mx.device_info().get("max_recommended_working_set_size")
    if mx.default_device() != mx.Device(mx.cpu) and isinstance(recommended, int):
        return recommended
    return int(RAM_SHARE * _machine_memory())


def _machine_memory() -> float:
    """Bytes that the machine has, or that the container may use in which this process runs."""
    memory: float = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # of cgroups 2 and 1
        try:
            return min(memory, int((CGROUPS / name).read_text()))
        except (OSError, ValueError):  # not there, or the word max
            continue
    return memory


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"
