"""Train a model: check everything that can be refused, then run."""

from collections.abc import Callable, Mapping, Sequence
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
from nalora_mlx.core.errors import InputError, listed
from nalora_mlx.data.padding import padded_length
from nalora_mlx.data.preference_tokenization import fits, tokenize_preference_rows
from nalora_mlx.data.preferences import PreferenceExample, TokenizedRow
from nalora_mlx.data.rows.formats import Features
from nalora_mlx.data.tokenization import Example, Split, tokenize_split
from nalora_mlx.models import packed_rows
from nalora_mlx.runs.progress import TrainResult
from nalora_mlx.training.device_memory import wired_memory
from nalora_mlx.training.distributed import workers
from nalora_mlx.training.events import Listener
from nalora_mlx.training.loss import Loss, SupervisedLoss
from nalora_mlx.training.memory_bound import bound_from_shapes
from nalora_mlx.training.memory_plan import largest_batch
from nalora_mlx.training.preferences.layout import choose_layout, in_layout_of
from nalora_mlx.training.preferences.loss import PreferenceLoss
from nalora_mlx.training.run import Run

Rows = Split | Sequence[TokenizedRow] | Sequence[Mapping[str, Any]]


def train(
    model: nn.Module,
    train_set: Rows,
    valid_set: Rows = (),
    config: TrainingConfig | None = None,
    optimizer: optim.Optimizer | None = None,
    output: str | Path | None = None,
    listeners: Sequence[Listener] = (),
    adapter_config: dict[str, Any] | None = None,
    resume: str | Path | None = None,
    resume_anyway: bool = False,
    stop: Callable[[], bool] | None = None,
    loss: Loss | None = None,
    peak_bytes: float | None = None,
    tokenizer: Any = None,
    mask_prompt: bool = False,
) -> TrainResult:
    """Train a model's adapters, or whatever else of it is not frozen.

    Every supervised token has the same weight within an optimizer update, however rows fall into batches. Every row is
    used in every epoch, including the last partial batch and accumulation window. Validation always uses the same rows.

    Args:
        model: adapted by `adapt`, whose result holds the NA settings; other models train without the mechanisms.
        train_set: what `preview` or `tokenize_split` return, their `sequences`, or rows as dicts in any supported
            format, with `tokenizer`.
        valid_set: the same for validation; empty skips it.
        config: settings; the defaults if None.
        optimizer: any mlx optimizer; Adam with the default learning rate if None.
        output: directory for adapters.safetensors, best/ and checkpoints/; None saves nothing. A previous run there is
            moved to previous/N once nothing can be refused any more.
        listeners: called with each event, see `nalora_mlx.training.events`.
        adapter_config: content of adapter_config.json; the adapted model's own if None.
        resume: checkpoint to continue from, given the same model, data and settings: bit for bit, except for experts on
            a GPU, which agree up to rounding. `output` is brought back to it.
        resume_anyway: continue even if something differs.
        stop: asked while each update runs; True ends the run after that update, saved.
        loss: the model's loss, if one was made after adapting it; made here if None.
        peak_bytes: the run's planned peak memory, which Metal keeps resident; None for an upper bound.
        tokenizer: tokenizer wrapper of mlx-lm, for rows as dicts.
        mask_prompt: supervise only the assistant turns of rows that are dicts.

    Raises:
        InputError: bad settings, an empty training set, nothing to train, no disk space, an output directory in use, or
            a checkpoint of another run.
        FloatingPointError: too many updates in a row had a NaN or infinite loss or gradient.
        RunError: the end of the run could not be saved.
    """
    config = config or TrainingConfig()
    train_rows = tokenized(train_set, tokenizer, mask_prompt, config, "train_set")
    valid_rows = tokenized(valid_set, tokenizer, mask_prompt, config, "valid_set")
    check(train_rows, valid_rows, adapter_weights(model), config)
    if output is not None and adapter_config is None and adapt_result(model) is None:
        raise InputError(
            "the model was not adapted by adapt; pass the content of adapter_config.json as adapter_config"
        )
    loss = loss or new_loss(model, config)
    if isinstance(loss, PreferenceLoss):
        train_rows = choose_layout(loss, train_rows, config)
        valid_rows = in_layout_of(valid_rows, train_rows)
    elif config.packing:
        check_packing(model, loss, padded_length(train_rows))
    run = Run(
        model,
        train_rows,
        valid_rows,
        config,
        optimizer,
        output,
        listeners,
        adapter_config,
        resume,
        resume_anyway,
        stop,
        loss,
    )

    def peak() -> float:
        return peak_bytes or bound_from_shapes(loss, largest_batch(train_rows, config, run.workers))

    with wired_memory(config.wired_limit, peak):
        return run.run()


def new_loss(model: nn.Module, config: TrainingConfig) -> Loss:
    """Return the loss of a run."""
    return PreferenceLoss(model, config) if config.prefers else SupervisedLoss(model)


def tokenized(
    rows: Rows, tokenizer: Any, mask_prompt: bool, config: TrainingConfig, name: str
) -> Sequence[Any]:
    """Return rows as `train` takes them as tokenized sequences.

    Raises:
        InputError: a row cannot be used, or rows are dicts and there is no tokenizer.
    """
    if isinstance(rows, Split):
        if rows.errors:
            raise InputError(f"{name}: {listed(rows.errors)}")
        rows = rows.sequences
    wrong: list[Any] = [row for row in rows if not fits(row, config)]
    if not wrong:
        return rows
    if any(isinstance(row, Example | PreferenceExample) for row in wrong):
        raise InputError(
            f"{name} was not tokenized for train_mode {config.train_mode}; give the rows as dicts with tokenizer=, or "
            f"what nalora_mlx.preview(rows, tokenizer, train_mode={config.train_mode!r}) returns"
        )
    if tokenizer is None or not all(isinstance(row, Mapping) for row in rows):
        raise InputError(
            f"{name} holds {type(wrong[0]).__name__}; give rows as dicts with tokenizer=, or what "
            "nalora_mlx.preview(rows, tokenizer) returns"
        )
    if config.prefers:
        return tokenize_preference_rows(
            wrong, tokenizer, config, mask_prompt, config.max_seq_length, name
        ).sequences
    features = Features(mask_prompt=mask_prompt)
    return tokenize_split(wrong, tokenizer, features, config.max_seq_length, name).sequences


def check(
    train_set: Sequence[TokenizedRow],
    valid_set: Sequence[TokenizedRow],
    weights: dict[str, mx.array],
    config: TrainingConfig,
) -> None:
    """Raise InputError for settings, data and trainable weights that `train` refuses, or that differ among workers."""
    if problems := TrainingConfig.problems(config):
        raise InputError("; ".join(problems))
    if not train_set:
        raise InputError("the training set is empty")
    if config.early_stopping is not None and not valid_set:
        raise InputError("early_stopping needs a validation set")
    if not weights:
        raise InputError("nothing to train: the model is frozen; call adapt first")
    workers().agree(
        {
            "data": (array for row in train_set for array in (row.tokens, row.loss_mask)),
            "weights": (np.array(array.astype(mx.float32)) for array in weights.values()),
            "settings": (repr(getattr(config, f.name)).encode() for f in fields(TrainingConfig)),
        }
    )


def check_packing(model: nn.Module, loss: Loss, length: int) -> None:
    """Raise InputError if rows packed into sequences of this length would affect one another."""
    hidden = loss.head.hidden if loss.head else model
    reason = packed_rows.packing_error(model, hidden, length, loss.training_forms)
    if reason:
        raise InputError(f"packing would mix rows with this model: {reason}; leave --packing out")
