"""Build mlx optimizers, and scale the steps they take: new = decayed old + scale * step.

Adam and its relatives divide a constant factor on the gradient out again, so the scale acts on the finished step, and
the optimizer's own state advances as if nothing were scaled. Decoupled weight decay is not part of the step: it acts on
every entry as usual. Coupled decay (L2, in SGD and Muon) is part of the gradient, and therefore of the step. A step of
Muon is no longer orthogonal once its columns are scaled.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten

from nalora_mlx.core.config import RunConfig
from nalora_mlx.core.errors import InputError, first_line
from nalora_mlx.core.parsing import reject_unknown
from nalora_mlx.training.schedules import build_schedule

OPTIMIZERS = {
    "adam": optim.Adam,
    "adamw": optim.AdamW,
    "muon": optim.Muon,
    "sgd": optim.SGD,
    "adafactor": optim.Adafactor,
}

# How an optimizer's step depends on the parameter that it is added to.
_INDEPENDENT = (optim.Adam, optim.Adamax, optim.RMSprop, optim.Adagrad, optim.AdaDelta)
_DECOUPLED_DECAY = (optim.AdamW, optim.Lion)
_COUPLED_DECAY = (optim.SGD, optim.Muon)


def build_optimizer(
    name: str, learning_rate: float, schedule: dict[str, Any] | None, settings: Mapping[str, Any]
) -> optim.Optimizer:
    """Build an optimizer with mlx-lm's names, arguments and schedules. Schedules count optimizer updates.

    Raises:
        InputError: the optimizer or the schedule does not accept a setting.
    """
    rate: Any = build_schedule(schedule) if schedule else learning_rate
    names = [key for key in inspect.signature(OPTIMIZERS[name]).parameters if key != "learning_rate"]
    reject_unknown(settings, names, f"optimizer_config.{name}")
    try:
        return OPTIMIZERS[name](learning_rate=rate, **settings)
    except (TypeError, ValueError) as error:
        raise InputError(f"optimizer_config.{name}: {error}") from None


def configured_optimizer(config: RunConfig) -> optim.Optimizer:
    """Build the optimizer of a run's settings, after one trial step: some settings fail only there.

    Raises:
        InputError: the optimizer or the schedule does not accept a setting.
    """
    settings = config.optimizer_config.get(config.optimizer) or {}
    trial, optimizer = (
        build_optimizer(config.optimizer, config.learning_rate, config.lr_schedule, settings)
        for _ in range(2)
    )
    one = {"one": mx.ones((1, 1))}
    try:
        mx.eval(trial.apply_gradients(one, one))
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"optimizer_config.{config.optimizer}: {first_line(error)}") from None
    return optimizer


def apply_scaled(
    optimizer: optim.Optimizer,
    gradients: Mapping[str, mx.array],
    parameters: Mapping[str, mx.array],
    scales: Mapping[str, mx.array],
) -> dict[str, mx.array]:
    """Take one optimizer step, scaled entry by entry: new = old (1 - decay) + scale * step.

    Args:
        optimizer: any mlx optimizer; its state advances once, exactly as in `apply_gradients`.
        gradients: name -> gradient.
        parameters: name -> parameter, a superset of the gradients.
        scales: name of a parameter -> factors that broadcast against it. An entry with factor 0 does not move
            (except for decay), even if its step is NaN. A factor of 1 gives the optimizer's own result, bit for bit.
            Parameters without factors take the optimizer's own step.

    Returns:
        The new parameters by name.
    """
    gradients, passed = dict(gradients), dict(parameters)  # what the optimizer is given
    for name in scales:
        if isinstance(optimizer, _COUPLED_DECAY) and optimizer.weight_decay:
            gradients[name] = gradients[name] + optimizer.weight_decay * parameters[name]
        if _step_is_independent(optimizer):
            # Starting from zero, the result is the step itself: no cancellation in a difference.
            passed[name] = mx.zeros_like(parameters[name])
    new: dict[str, mx.array]
    if isinstance(optimizer, optim.MultiOptimizer):  # it selects parameters in a tree like the model's
        trees = (tree_unflatten(list(arrays.items())) for arrays in (gradients, passed))
        new = dict(tree_flatten(optimizer.apply_gradients(*trees)))
    else:
        new = optimizer.apply_gradients(gradients, passed)
    for name, scale in scales.items():
        kept = _decayed(optimizer, parameters[name])
        step = new[name] if _step_is_independent(optimizer) else new[name] - kept
        new[name] = kept + mx.where(scale == 0, 0, scale * step).astype(kept.dtype)
    return new


def _step_is_independent(optimizer: optim.Optimizer) -> bool:
    return isinstance(optimizer, _INDEPENDENT + _DECOUPLED_DECAY + _COUPLED_DECAY)


def _decayed(optimizer: optim.Optimizer, parameter: mx.array) -> mx.array:
    """Return the parameter after decoupled weight decay alone, as the optimizer itself computes it."""
    if isinstance(optimizer, _DECOUPLED_DECAY) and optimizer.weight_decay:
        rate = optimizer.learning_rate.astype(parameter.dtype)
        return parameter * (1 - rate * optimizer.weight_decay)
    if isinstance(optimizer, optim.Adafactor) and optimizer.weight_decay:
        # Adafactor's rate depends on the parameter's RMS; only these two methods compute it.
        rate = optimizer._compute_learning_rate(optimizer.step, optimizer._compute_rms(parameter))
        return parameter + parameter * (-optimizer.weight_decay * rate)
    return parameter
