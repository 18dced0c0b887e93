"""The metrics that a run reports while it trains."""

import math
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim

from nalora_mlx.runs.progress import Progress
from nalora_mlx.training.diagnostics import describe_layers
from nalora_mlx.training.step import TrainingStep


def training_metrics(step: TrainingStep, progress: Progress) -> dict[str, Any]:
    """Return the metrics of training since the last report, and start the next interval."""
    more: dict[str, Any] = {
        "tokens_per_second": progress.loss_tokens / progress.loss_seconds,
        "iterations_per_second": progress.loss_steps / progress.loss_seconds,
    }
    if step.limit is not None:
        more["selection_change"] = step.importance["selection_change"].item()
    progress.start_interval()
    return {
        "step": progress.iteration,
        "loss": math.nan if progress.train_loss is None else progress.train_loss,
        "tokens": progress.tokens,
        **progress.train_measures,
        **more,
        "learning_rate": learning_rate(step.optimizer),
        "gradient_norm": step.health.gradient_norm.item(),
        "skipped": progress.skipped,
        "peak_memory_gb": mx.get_peak_memory() / 1e9,
        "layers": describe_layers(step),
    }


def learning_rate(optimizer: optim.Optimizer) -> float | None:
    """Return the learning rate of the last update; None if it differs among the weights."""
    if getattr(optimizer, "relative_step", False):  # Adafactor computes its own
        return None
    try:
        return float(optimizer.learning_rate)
    except KeyError:
        return None
