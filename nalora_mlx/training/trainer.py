"""Train a model: all that is checked before a run begins, and the run."""

from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from nalora_mlx.adapters.attach import adapt_result
from nalora_mlx.adapters.files import adapter_weights
from nalora_mlx.core.config import TrainingConfig
from nalora_mlx.core.errors import InputError
from nalora_mlx.data.padding import padded_length
from nalora_mlx.data.tokenization import Example
from nalora_mlx.models import packed_attention
from nalora_mlx.models.output_head import find_output_head
from nalora_mlx.runs.progress import TrainResult
from nalora_mlx.training import distributed
from nalora_mlx.training.run import Listener, Run


def train(
    model: nn.Module,
    train_set: Sequence[Example],
    valid_set: Sequence[Example] = (),
    config: TrainingConfig | None = None,
    optimizer: optim.Optimizer | None = None,
    output: str | Path | None = None,
    listeners: Sequence[Listener] = (),
    description: dict[str, Any] | None = None,
    resume: str | Path | None = None,
    resume_anyway: bool = False,
    stop: Callable[[], bool] | None = None,
) -> TrainResult:
    """Train a model's adapters (or whatever of it is not frozen).

    Each token weighs the same within an optimizer update, however rows fall into batches; every row is used in
    every epoch, the last partial batch and accumulation window included; validation is always on the same rows.

    Args:
        model: adapted by `adapt`, whose report has the NA settings; another model trains without mechanisms.
        train_set: tokenized rows, see `nalora_mlx.data.tokenization.tokenize_split`.
        valid_set: rows for validation; none skips it.
        config: settings; the defaults if None.
        optimizer: any mlx optimizer; Adam with the default learning rate if None.
        output: directory for adapters.safetensors, best/, checkpoints/; None saves nothing. A run that is there is
            moved to previous/N when nothing can be refused any more.
        listeners: called with each event, see `Listener`.
        description: content of adapter_config.json; that of the adapted model if None.
        resume: a checkpoint to go on from, bit for bit, with the same model, data and settings; `output` is
            brought back to it.
        resume_anyway: go on even if something differs.
        stop: asked after each update; True ends the run there, saved.

    Raises:
        InputError: bad settings, an empty training set, a model with nothing to train, no room on the disk, an
            output directory in use, or a checkpoint of another run.
        FloatingPointError: too many updates in a row had a loss or gradient that is not finite.
        RunError: the end of the run could not be saved.
    """
    config = config or TrainingConfig()
    check(model, train_set, valid_set, config)
    if output is not None and description is None and adapt_result(model) is None:
        raise InputError(
            "the model was not adapted here; give the content of adapter_config.json as description"
        )
    return Run(
        model,
        train_set,
        valid_set,
        config,
        optimizer,
        output,
        listeners,
        description,
        resume,
        resume_anyway,
        stop,
    ).run()


def check(
    model: nn.Module, train_set: Sequence[Example], valid_set: Sequence[Example], config: TrainingConfig
) -> None:
    """Raise InputError for what `train` would refuse, before anything is touched."""
    if problems := TrainingConfig.problems(config):
        raise InputError("; ".join(problems))
    if not train_set:
        raise InputError("the training set is empty")
    if config.early_stopping is not None and not valid_set:
        raise InputError("early_stopping needs a validation set")
    weights = adapter_weights(model)
    if not weights:
        raise InputError("nothing to train: the model is frozen; call adapt first")
    distributed.workers().agree(
        {
            "data": (array for row in train_set for array in (row.tokens, row.loss_mask)),
            "weights": (np.array(array.astype(mx.float32)) for array in weights.values()),
            "settings": (repr(getattr(config, f.name)).encode() for f in fields(TrainingConfig)),
        }
    )
    if config.packing:
        head = find_output_head(model)
        reason = packed_attention.packing_error(
            model, head.hidden if head else model, padded_length(train_set)
        )
        if reason:
            raise InputError(f"packing would mix rows with this model: {reason}; leave it out")
