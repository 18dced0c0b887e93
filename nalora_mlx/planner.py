"""How much memory a run will need: measured on small trials of its own step, carried over to its batches.

The peak of a training step of B rows of L tokens, T = B L of them, has the form

    peak = base + per token * T + per square * T L

base: weights, adapters, gradients. Per token: what the layers keep for the backward pass, and what the head makes.
Per square: attention scores and masks, whose number grows with the length. The three are not computed from a model's
architecture but found on the model itself: its own step, with its own checkpointing and kernels, on this device, runs
on few rows of half the length, on twice as many, and on few of the whole length (of one row: on parts of it), and the
three peaks are solved for them. The tiles of the head and the scored positions shrink with the number of tokens, so
that each part keeps its share of the peak; which one makes the peak then does not depend on the number of rows. The
update at the end of a step does not grow with tokens; it is measured by itself.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map

from nalora_mlx.adapters import report_of
from nalora_mlx.batches import (
    PAD_TO,
    Batch,
    epoch_batches,
    epoch_packs,
    padded_length,
    rounded_scored,
)
from nalora_mlx.config import PLAIN_LORA, RunConfig, TrainingConfig
from nalora_mlx.data import Example
from nalora_mlx.distributed import ALONE, Workers
from nalora_mlx.errors import InputError
from nalora_mlx.forward import recomputed
from nalora_mlx.losses import TILE_BYTES
from nalora_mlx.run import recomputed_layers
from nalora_mlx.step import TrainingStep

ENOUGH = 512  # tokens of the smallest trial, if the run's batches have twice as many
MARGIN = 1.1  # how much more than an update alone the smallest trial must need beside what is there
FAR = 4  # times the length that was measured: beyond it nothing is said
MOST = 2**20  # rows, or tokens: as good as without limit
RAM_SHARE = 0.8  # of a machine without a recommended working set
CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Size:
    """What a batch is to memory: rows, tokens in each, scored positions in all, and whether rows are packed."""

    rows: int
    length: int
    scored: int
    packed: bool = False

    @property
    def tokens(self) -> int:
        """Positions in the batch, padding included."""
        return self.rows * self.length

    def with_shape(self, rows: int, length: int) -> "Size":
        """As many scored positions per token in another shape."""
        return replace(
            self, rows=rows, length=length, scored=round(self.scored * rows * length / self.tokens)
        )


def heaviest(examples: Sequence[Example], config: TrainingConfig, workers: Workers = ALONE) -> Size:
    """The size of the batch in the first epoch that needs most: most tokens, and of those most scored ones."""
    supervised = [int(example.supervised[1:].sum()) for example in examples]
    sizes = []
    if config.packing:
        length = padded_length(examples)
        for packs in epoch_packs(examples, config.batch_size, config.seed, 0):
            sizes.append(
                Size(len(packs), length, sum(supervised[row] for pack in packs for row in pack), True)
            )
    else:
        for rows in epoch_batches(examples, config.batch_size, config.seed, 0):
            length = padded_length(examples[row] for row in rows)
            scored = sum(supervised[row] for row in rows)
            sizes.append(Size(len(rows), length, rounded_scored(scored, len(rows) * length)))
    most = max(sizes, key=lambda size: (size.tokens, size.length, size.scored))
    return most.with_shape(math.ceil(most.rows / workers.size), most.length)


@dataclass(frozen=True)
class Peak:
    """The peak of one step as a function of the batch, in bytes; see the module."""

    base: float
    per_token: float
    per_square: float
    update: float

    def of(self, rows: int, length: int) -> int:
        """The peak with another number of rows, or rows not much longer or shorter than those it was found for."""
        tokens = rows * length
        return round(
            max(self.update, self.base + self.per_token * tokens + self.per_square * tokens * length)
        )

    def rows_within(self, budget: int, length: int) -> int:
        """The most rows of this length that stay within a budget; 0 if not even one does."""
        if self.of(1, length) > budget:
            return 0
        each = length * (self.per_token + self.per_square * length)
        return int((budget - self.base) // each) if each > 0 else MOST

    def length_within(self, budget: int, rows: int) -> int:
        """The longest rows, so many in a batch, that stay within a budget; 0 if none do."""
        if self.of(rows, PAD_TO) > budget:
            return 0
        a, b, spare = self.per_square * rows, self.per_token * rows, budget - self.base  # a L^2 + b L = spare
        if a + b == 0:
            return MOST
        length = 2 * spare / (b + math.sqrt(b * b + 4 * a * spare))
        return int(min(length, MOST)) // PAD_TO * PAD_TO


class Planner:
    """Measures a step that nothing else uses; parameters, optimizer and random state are afterwards what they were.

    Args:
        step: the training step of the run, or one that is made as it is.
        layers: whose activations are recomputed.
        accumulating: whether gradients of several batches are added up.
    """

    def __init__(self, step: TrainingStep, layers: Sequence[nn.Module] = (), accumulating: bool = False):
        self.step, self.layers, self.accumulating = step, list(layers), accumulating
        self.kept = 0  # bytes that are there for no other reason than to be put back

    def peak(self, size: Size) -> Peak:
        """Find the peak's parts for batches of about this size."""
        with self._untouched():
            there = mx.get_active_memory()
            update = self._measure(size.with_shape(1, PAD_TO), size, update=True)
            enough = there + MARGIN * (update - there)  # below it, what a step peaks at may be its update
            trials, updates = _trials(size), not self.accumulating
            smallest = self._measure(trials[0], size, updates)
            while smallest < enough and 4 * trials[0].rows <= size.rows:
                trials = [trial.with_shape(2 * trial.rows, trial.length) for trial in trials]
                smallest = self._measure(trials[0], size, updates)
            if (
                updates and smallest < enough
            ):  # without its update a step peaks at activations, if a little higher
                updates = False
                smallest = self._measure(trials[0], size, updates)
            peaks = [smallest, *(self._measure(trial, size, updates) for trial in trials[1:])]
        base, per_token, per_square = _solved(trials, peaks)
        if self.accumulating:
            base += _nbytes(self.step.model.trainable_parameters())
        return Peak(base, per_token, per_square, update)

    def _measure(self, trial: Size, real: Size, update: bool) -> int:
        """Peak memory of a step of a trial, in bytes: of the larger of two, as the first is held up by compiling."""
        step, loss, peaks = self.step, self.step.loss, []
        rows, loss.rows = loss.rows, max(1, round(loss.rows * min(1, trial.tokens / real.tokens)))
        try:
            with recomputed(self.layers) if self.layers else nullcontext():
                for _ in range(2):
                    mx.synchronize()
                    mx.clear_cache()
                    mx.reset_peak_memory()
                    total, carry = step(_trial(trial), trial.scored, None, update, diagnose=True)
                    mx.eval(step.state, total, carry)
                    del total, carry
                    peaks.append(mx.get_peak_memory() - self.kept)
                    if update:  # what it replaces is kept until the end, which no run does
                        changed = [step.model.trainable_parameters(), step.optimizer.state, step.importance]
                        self.kept = _nbytes(changed)
            return max(peaks)
        finally:
            loss.rows = rows

    @contextmanager
    def _untouched(self) -> Iterator[None]:
        model, state = self.step.model, self.step.state
        before = tree_map(lambda array: array, state)
        training = model.training
        model.train()
        try:
            yield
        finally:
            _put_back(state, before)
            model.train(training)
            self.kept = 0
            mx.clear_cache()
            mx.reset_peak_memory()


def _trials(size: Size) -> list[Size]:
    """Three shapes that tell tokens from squares, the largest last, of half the tokens if there are enough."""
    if size.rows == 1:
        parts = (0.125, 0.25, 0.5) if size.length >= 2 * ENOUGH else (0.25, 0.5, 0.75)
        return [size.with_shape(1, max(PAD_TO, int(size.length * part))) for part in parts]
    half = max(PAD_TO, size.length // 2)
    rows = min(max(1, ENOUGH // half), size.rows // 2)
    return [size.with_shape(rows, half), size.with_shape(2 * rows, half), size.with_shape(rows, 2 * half)]


def _solved(trials: Sequence[Size], peaks: Sequence[int]) -> tuple[float, float, float]:
    """The base, the part per token and the part per square, none of them negative."""
    features = np.array([[1, trial.tokens, trial.tokens * trial.length] for trial in trials], np.float64)
    kept = [0, 1, 2]
    while True:
        parts = np.zeros(3)
        parts[kept] = np.linalg.lstsq(features[:, kept], np.array(peaks, np.float64), rcond=None)[0]
        negative = [i for i in kept[1:] if parts[i] < 0]  # by rounding: then there is none of it
        if not negative:
            return float(parts[0]), float(parts[1]), float(parts[2])
        kept.remove(negative[-1])


class _Trial(Batch):
    """A batch whose scored positions are as many as there are, and not rounded once more."""

    def scored(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        positions = np.flatnonzero(self.supervised).astype(np.int32)
        return positions, np.ones_like(positions), np.ones(positions.size, np.float32)


def _trial(size: Size) -> Batch:
    """A batch of a size, of tokens that do not matter."""
    shape = (size.rows, size.length)
    supervised = np.zeros(size.tokens, np.float32)
    supervised[np.linspace(0, size.tokens - 1, min(max(1, size.scored), size.tokens)).astype(int)] = 1
    tokens = np.ones(shape, np.int32)
    segments = tokens if size.packed else None
    return _Trial(tokens, tokens, supervised.reshape(shape), np.ones(shape, np.float32), (), segments)


def _put_back(tree: Any, before: Any) -> None:
    """Give a tree of dicts and lists the arrays that it had before."""
    for key in before if isinstance(before, dict) else range(len(before)):
        if isinstance(before[key], dict | list):
            _put_back(tree[key], before[key])
        else:
            tree[key] = before[key]


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


def _nbytes(tree: Any) -> int:
    return sum(array.nbytes for _, array in tree_flatten(tree))


# --- a run's plan -------------------------------------------------------------------------------------------


def at_most(model: nn.Module, size: Size) -> float:
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
    weights, trained = _nbytes(model.parameters()), _nbytes(model.trainable_parameters())
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

    size: Size
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
    model: nn.Module, size: Size, config: TrainingConfig, optimizer: optim.Optimizer, budget: int
) -> Plan:
    """Find out what a run will need; the model stays as it is.

    Args:
        model: as it will be trained.
        size: of the largest batch, see `heaviest`.
        config: the run's settings.
        optimizer: one like the run's, not that itself.
        budget: bytes to stay within.
    """
    report = report_of(model)
    step = TrainingStep(model, optimizer, report.config if report else PLAIN_LORA, grad_clip=config.grad_clip)
    accumulating = config.grad_accumulation_steps > 1
    peak = Planner(step, recomputed_layers(model, config), accumulating).peak(size)
    checkpointed = None
    if not config.grad_checkpoint:
        layers = recomputed_layers(model, replace(config, grad_checkpoint=True))
        # A graph that was made without recomputation is not the one to measure.
        step.graphs.clear()
        checkpointed = Planner(step, layers, accumulating).peak(size)
    return Plan(size, peak, budget, _nbytes(model.parameters()), checkpointed)


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
    size = heaviest(examples, config, workers)
    if not config.plan and at_most(model, size) <= budget:
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
