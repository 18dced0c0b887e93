"""The loss of a run's model on its test set."""

import math
from collections.abc import Sequence
from typing import Any

import mlx.nn as nn

from nalora_mlx.adapters.comparison import without_adapters
from nalora_mlx.core.config import RunConfig
from nalora_mlx.core.errors import counted
from nalora_mlx.data.batches import evaluation_batches, evaluation_rows
from nalora_mlx.training.distributed import Workers
from nalora_mlx.training.evaluation import Evaluation, evaluate
from nalora_mlx.training.loss import Loss
from nalora_mlx.training.preferences.loss import PreferenceLoss
from nalora_mlx.training.preferences.reference import Reference, with_log_probabilities
from nalora_mlx.training.trainer import new_loss


def evaluate_test_set(
    model: nn.Module,
    examples: Sequence[Any],
    config: RunConfig,
    loss: Loss | None,
    reference: Reference | None,
    world: Workers,
) -> Evaluation:
    """Return the loss on the test set.

    Args:
        model: trained, or with the adapter to test.
        examples: tokenized rows.
        config: settings of the run.
        loss: of the training; None without one.
        reference: of a preference run's training. None takes the model without its adapters.
        world: the workers.
    """
    rows: Any = evaluation_rows(examples, config.batch_size, config.test_batches, config.seed)
    if config.has_reference:
        if isinstance(loss, PreferenceLoss) and reference is not None:
            with reference.installed():
                rows = with_log_probabilities(loss, rows, config, world)
        else:
            with without_adapters(model):
                rows = with_log_probabilities(PreferenceLoss(model, config), rows, config, world)
    loss = loss or new_loss(model, config)
    batches = evaluation_batches(rows, config.batch_size, -1, config.seed, world.share)
    more = None
    if isinstance(loss, PreferenceLoss):
        more = (reference or Reference(loss, config, world)).window_arrays(batches)
    return evaluate(model, batches, loss=loss, workers=world, more=more)


def describe_test(found: Evaluation) -> str:
    """Return the result on the test set as a line."""
    over = f"over {counted(found.tokens, 'token')}"
    if "accuracy" not in found.measures:
        return f"test loss {found.loss:.4f}, perplexity {math.exp(min(found.loss, 700)):.3f}, {over}"
    margin = found.measures.get("chosen_reward", 0.0) - found.measures.get("rejected_reward", 0.0)
    return (
        f"test loss {found.loss:.4f}, accuracy {found.measures['accuracy']:.3f}, margin {margin:.3f}, {over}"
    )
