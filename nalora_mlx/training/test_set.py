"""The loss of a run's model on its test set."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from nalora_mlx.core import storage
from nalora_mlx.core.config import RunConfig
from nalora_mlx.core.errors import counted
from nalora_mlx.data.batches import evaluation_batches, evaluation_rows
from nalora_mlx.data.tokenization import Split
from nalora_mlx.runs.checkpoints import CHECKPOINTS, REFERENCE_FILE, steps
from nalora_mlx.runs.preferences import describe_measures
from nalora_mlx.training.distributed import Workers
from nalora_mlx.training.evaluation import Evaluation, evaluate
from nalora_mlx.training.loss import Loss
from nalora_mlx.training.preferences.loss import PreferenceLoss
from nalora_mlx.training.preferences.reference import START, Reference, with_log_probabilities
from nalora_mlx.training.trainer import new_loss


def evaluate_test_set(
    model: nn.Module,
    examples: Sequence[Any],
    config: RunConfig,
    loss: Loss | None,
    reference: Reference | None,
    world: Workers,
    known: Sequence[Any] | None = None,
) -> Evaluation:
    """Return the loss on the test set.

    Args:
        model: trained, or with the adapter to test.
        examples: tokenized rows.
        config: settings of the run.
        loss: of the training; None without one.
        reference: of a preference run's training; None without one.
        world: the workers.
        known: what `rows_with_reference` returned before the model was trained or got its adapter.
    """
    rows: Any = evaluation_rows(examples, config.batch_size, config.test_batches, config.seed)
    if config.has_reference:
        if isinstance(loss, PreferenceLoss) and reference is not None and reference.start is not None:
            with reference.installed():
                rows = with_log_probabilities(loss, rows, config, world)
        elif start := _saved_start(model, Path(config.adapter_path or ".").expanduser()):
            tuned = dict(tree_flatten(model.parameters()))
            model.load_weights(list(start.items()), strict=False)
            rows = with_log_probabilities(PreferenceLoss(model, config), rows, config, world)
            model.load_weights([(name, tuned[name]) for name in start], strict=False)
        else:
            rows = known or with_log_probabilities(PreferenceLoss(model, config), rows, config, world)
    loss = loss or new_loss(model, config)
    batches = evaluation_batches(rows, config.batch_size, -1, config.seed, world.share)
    more = None
    if isinstance(loss, PreferenceLoss):
        settings = replace(config, reference="precomputed")  # the rows have it
        more = Reference(loss, settings, world).window_arrays(batches)
    return evaluate(model, batches, loss=loss, workers=world, more=more)


def rows_with_reference(
    model: nn.Module, test_set: Split, config: RunConfig, world: Workers
) -> list[Any] | None:
    """Return the test rows with their log-probabilities under the model as it is; None without a reference."""
    if not config.test or not config.has_reference:
        return None
    rows: Any = evaluation_rows(test_set.sequences, config.batch_size, config.test_batches, config.seed)
    return with_log_probabilities(PreferenceLoss(model, config), rows, config, world)


def _saved_start(model: nn.Module, directory: Path) -> dict[str, mx.array]:
    """Return the parameters of adapters before training, as the last checkpoint has them; none if it does not."""
    found = [directory]
    for run in (directory, directory.parent):  # that of a best adapter
        found += reversed(steps(run / CHECKPOINTS).values())
    file = next((path / REFERENCE_FILE for path in found if (path / REFERENCE_FILE).is_file()), None)
    arrays = storage.read_arrays(file) if file is not None else {}
    start = {name.removeprefix(START): array for name, array in arrays.items() if name.startswith(START)}
    parameters = dict(tree_flatten(model.parameters()))
    fits = all(name in parameters and parameters[name].shape == array.shape for name, array in start.items())
    return start if fits else {}


def describe_test(found: Evaluation) -> str:
    """Return the result on the test set as a line."""
    over = f"over {counted(found.tokens, 'token')}"
    # The loss of preference training is not that of a next token.
    more = describe_measures(found.measures) or [f"perplexity {math.exp(min(found.loss, 700)):.3f}"]
    return ", ".join([f"test loss {found.loss:.4f}", *more, over])
