"""Learning rate schedules: built as mlx-lm builds them, and compared with the length of the run that uses them."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from nalora_mlx.core.config import RunConfig, TrainingConfig
from nalora_mlx.core.errors import InputError, first_line
from nalora_mlx.core.parsing import nearest, reject_unknown
from nalora_mlx.core.settings_without_effect import without_effect_in_length
from nalora_mlx.data.batches import batches_per_epoch
from nalora_mlx.data.preferences import TokenizedRow
from nalora_mlx.data.tokenization import Split

Schedule = Callable[[mx.array], mx.array]
SCHEDULES = ("cosine_decay", "exponential_decay", "linear_schedule", "step_decay")  # of mlx.optimizers
DECAY_STEPS = {"cosine_decay": 1, "linear_schedule": 2}  # which argument is the number of updates
MOST_CHECKED = 10_000  # updates whose learning rate is computed before a run
IDLE_PART = 0.05  # of the run, at learning rate 0 after the decay, above which a notice says so


def build_schedule(settings: dict[str, Any]) -> Schedule:
    """Build a schedule from mlx-lm's settings: name, arguments, warmup and warmup_init. It counts optimizer updates.

    Raises:
        InputError: a setting is unknown, missing or of the wrong type.
    """
    from mlx_lm.tuner.utils import build_schedule as build

    reject_unknown(settings, ("name", "arguments", "warmup", "warmup_init"), "lr_schedule")
    for key in ("warmup", "warmup_init"):
        value = settings.get(key, 0)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise InputError(f"lr_schedule: {key} is {value!r}; it must be a number, and not negative")
    name, arguments = settings.get("name"), settings.get("arguments")
    if name not in SCHEDULES:
        raise InputError(f"lr_schedule: name is {name!r}{nearest(str(name), SCHEDULES)}")
    numbers = isinstance(arguments, list | tuple) and all(type(value) in (int, float) for value in arguments)
    if not numbers or not arguments:
        raise InputError(f"lr_schedule: arguments is {arguments!r}; it takes a list of numbers")
    try:
        schedule: Schedule = build(settings)
        mx.eval(schedule(mx.array(0, mx.uint64)))
    except (TypeError, ValueError, ArithmeticError) as error:
        raise InputError(
            f"lr_schedule: {first_line(error).rstrip('.')}; check the arguments of {name}"
        ) from None
    return schedule


def run_iterations(train_set: Sequence[TokenizedRow], config: TrainingConfig) -> int:
    """Return the number of iterations of a run: iters, or as many as epochs says, at least one."""
    if config.epochs is None:
        return config.iters
    per_epoch = batches_per_epoch(train_set, config.batch_size, config.packing)
    return max(1, math.ceil(round(config.epochs * per_epoch, 6)))


def length_notices(config: RunConfig, splits: Mapping[str, Split]) -> list[str]:
    """Return notices of settings that have no effect in a run of this length, or another than was probably meant.

    Raises:
        InputError: the learning rate becomes negative, NaN or infinite.
    """
    if not splits["train"].sequences:
        return []
    iterations = run_iterations(splits["train"].sequences, config)
    notices = without_effect_in_length(config, iterations, bool(splits["valid"].sequences))
    if config.lr_schedule:
        notices += schedule_notices(config.lr_schedule, iterations, config.grad_accumulation_steps)
    return notices


def schedule_notices(settings: dict[str, Any], iterations: int, accumulation: int = 1) -> list[str]:
    """Compare a schedule with the run's number of optimizer updates, each of `accumulation` iterations.

    Raises:
        InputError: the learning rate becomes negative, NaN or infinite.
    """
    updates = math.ceil(iterations / accumulation)
    counted = sorted({round(i * (updates - 1) / MOST_CHECKED) for i in range(MOST_CHECKED + 1)})
    rates = build_schedule(settings)(mx.array(counted, mx.uint64)) * mx.ones(len(counted))
    rates_of = dict(zip(counted, map(float, np.array(rates)), strict=True))
    wrong = next((u for u, rate in rates_of.items() if not 0 <= rate < math.inf), None)
    if wrong is not None:
        raise InputError(
            f"lr_schedule: the learning rate is {rates_of[wrong]:g} at optimizer update {wrong + 1} of {updates}; "
            "change the arguments"
        )
    warmup, last = settings.get("warmup", 0), rates_of[updates - 1]
    length = f"and the run has {updates}"
    if accumulation > 1:
        length += f" ({iterations} iterations, {accumulation} per update)"
    if not any(rates_of.values()):
        reason = f": warmup takes {warmup:g} optimizer updates, {length}" if warmup >= updates else ""
        return [f"lr_schedule: the learning rate is 0 throughout{reason}"]
    if warmup >= updates:
        return [
            f"lr_schedule: warmup takes {warmup:g} optimizer updates, {length}: the learning rate ends at {last:g}"
        ]
    position = DECAY_STEPS.get(settings["name"])
    if position is None:
        return []
    decay = settings["arguments"][position]
    end = math.ceil(decay + (warmup + 1 if warmup else 0))  # the first update at the final rate, from 0
    if last == 0 and updates - end > max(1, IDLE_PART * updates):
        return [
            f"lr_schedule: the learning rate is 0 from optimizer update {end + 1} on, {length}: "
            f"the last {updates - end} change nothing"
        ]
    if end < updates / 2:
        return [
            f"lr_schedule: the learning rate stays at {last:g} from optimizer update {end + 1} on, {length}"
        ]
    if end > 2 * updates:
        return [
            f"lr_schedule: {settings['name']} takes {end} optimizer updates, {length}: it ends at {last:g}"
        ]
    return []
