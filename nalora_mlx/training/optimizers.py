"""Build mlx optimizers, and scale the steps that they take: new = decayed old + scale * step.

A constant factor on a gradient is divided out again by Adam and its kin, so the scale acts on the finished step.
The optimizer's own state advances as if nothing were scaled. Decoupled weight decay is no part of the step: it
acts on every entry as it would without us; coupled decay (L2, in SGD and Muon) is part of the gradient and so of
the step. A step of Muon is no longer orthogonal once its columns are scaled.
"""

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten

from nalora_mlx.core.errors import InputError
from nalora_mlx.core.parsing import reject_unknown

OPTIMIZERS = {
    "adam": optim.Adam,
    "adamw": optim.AdamW,
    "muon": optim.Muon,
    "sgd": optim.SGD,
    "adafactor": optim.Adafactor,
}

# How an optimizer's step depends on the parameter, beyond adding to it.
_INDEPENDENT = (optim.Adam, optim.Adamax, optim.RMSprop, optim.Adagrad, optim.AdaDelta)
_DECOUPLED_DECAY = (optim.AdamW, optim.Lion)
_COUPLED_DECAY = (optim.SGD, optim.Muon)


def build_optimizer(
    name: str, learning_rate: float, schedule: dict[str, Any] | None, settings: Mapping[str, Any]
) -> optim.Optimizer:
    """Build an optimizer with mlx-lm's names, arguments and schedules, which count optimizer updates.

    Raises:
        InputError: a setting that the optimizer or the schedule does not take.
    """
    from mlx_lm.tuner.utils import build_schedule

    rate: Any = learning_rate
    if schedule:
        reject_unknown(schedule, ("name", "arguments", "warmup", "warmup_init"), "lr_schedule")
        try:
            rate = build_schedule(schedule)
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
            raise InputError(
                f"lr_schedule: {error}; give name (a schedule of mlx.optimizers.schedulers) and arguments"
            ) from None
    try:
        return OPTIMIZERS[name](learning_rate=rate, **settings)
    except (TypeError, ValueError) as error:
        raise InputError(f"optimizer_config.{name}: {error}") from None


def apply_scaled(
    optimizer: optim.Optimizer, gradients: Any, parameters: Any, scales: Mapping[str, mx.array]
) -> Any:
    """Take one optimizer step whose entries are scaled where `scales` says so.

        new = old (1 - decay) + scale * step

    Args:
        optimizer: any mlx optimizer; its state advances once, exactly as by `apply_gradients`.
        gradients: tree of gradients.
        parameters: tree of parameters, a superset of the gradients.
        scales: dotted path of a parameter -> factors that broadcast against it. Where a factor is 0 the entry does
            not move (but for decay), even if the step is NaN; a factor of 1 gives the optimizer's own result to
            the last bit. Other parameters are the optimizer's alone.

    Returns:
        A tree of the new parameters, of the structure of the gradients.
    """
    if not scales:
        return optimizer.apply_gradients(gradients, parameters)
    flat_gradients = dict(tree_flatten(gradients))
    old = dict(tree_flatten(parameters))
    handed = dict(old)  # the parameters that the optimizer gets to see
    for path in scales:
        if isinstance(optimizer, _COUPLED_DECAY) and optimizer.weight_decay:
            flat_gradients[path] = flat_gradients[path] + optimizer.weight_decay * old[path]
        if _step_is_independent(optimizer):
            # From zero the result *is* the step: no digits are lost in a difference of nearly equal numbers.
            handed[path] = mx.zeros_like(old[path])
    new = dict(
        tree_flatten(
            optimizer.apply_gradients(
                tree_unflatten(list(flat_gradients.items())), tree_unflatten(list(handed.items()))
            )
        )
    )
    for path, scale in scales.items():
        kept = _decayed(optimizer, old[path])
        step = new[path] if _step_is_independent(optimizer) else new[path] - kept
        new[path] = kept + mx.where(scale == 0, 0, scale * step).astype(kept.dtype)
    return tree_unflatten(list(new.items()))


def _step_is_independent(optimizer: optim.Optimizer) -> bool:
    return isinstance(optimizer, _INDEPENDENT + _DECOUPLED_DECAY + _COUPLED_DECAY)


def _decayed(optimizer: optim.Optimizer, parameter: mx.array) -> mx.array:
    """The parameter after decoupled weight decay alone, as the optimizer itself would compute it."""
    if isinstance(optimizer, _DECOUPLED_DECAY) and optimizer.weight_decay:
        rate = optimizer.learning_rate.astype(parameter.dtype)
        return parameter * (1 - rate * optimizer.weight_decay)
    if isinstance(optimizer, optim.Adafactor) and optimizer.weight_decay:
        # Adafactor's rate depends on the parameter's size; mlx has it in these two methods only.
        rate = optimizer._compute_learning_rate(optimizer.step, optimizer._compute_rms(parameter))
        return parameter + parameter * (-optimizer.weight_decay * rate)
    return parameter
