"""Checks of the memory that a run needs: an upper bound at once, or a measurement on a few training steps."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from nalora_mlx.core.config import KTO, ORPO, RunConfig
from nalora_mlx.ops.device_memory import default_budget, device_memory

if TYPE_CHECKING:
    from nalora_mlx.data.preferences import TokenizedRow
    from nalora_mlx.doctor.model import LoadedModel
    from nalora_mlx.doctor.page import Page
    from nalora_mlx.training.memory_model import BatchShape
    from nalora_mlx.training.step import TrainingStep

QUICK_WEIGHTS = 5e9  # bytes of weights that are read for an upper bound, which runs the model on four tokens


def check_memory(
    page: "Page",
    loaded: "LoadedModel | None",
    examples: "list[TokenizedRow] | None",
    config: RunConfig,
    trials: bool,
) -> None:
    """Report the machine's memory, and what the run needs of it.

    Args:
        page: to print on.
        loaded: the model; None without one.
        examples: of the training set; None without data.
        config: settings of the run.
        trials: measure it on a few training steps, instead of an upper bound.
    """
    budget = config.memory_budget or default_budget()
    page.note(f"{device_memory() / 1e9:.1f} GB, of which a run may use {budget / 1e9:.1f} GB")
    if loaded is None:
        return
    if reason := _reason_to_skip(loaded, examples, config, trials):
        page.note(reason)
        return
    if examples is None:
        length = config.max_seq_length
        page.note(f"without --data, all rows are assumed to have {length:,} tokens (--max-seq-length)")
        examples = [_full_row(length, config)] * config.batch_size
    if any(example.images for example in examples):
        page.note("the features of images, which are computed before training, are not counted")
    (_measure if trials else _estimate)(page, loaded, examples, config, budget)


def _reason_to_skip(
    loaded: "LoadedModel", examples: "list[TokenizedRow] | None", config: RunConfig, trials: bool
) -> str | None:
    from nalora_mlx.core.trees import nbytes
    from nalora_mlx.models.loading import is_quantized
    from nalora_mlx.models.vision.model import trains_towers

    if examples == []:
        return "not measured: no row can be trained on"
    if config.fine_tune_type == "full":
        return "not measured: use nalora lora --plan"
    if trains_towers(loaded.model):
        return "not measured with images that go through trained towers: use nalora lora --plan"
    if loaded.slow is not None and is_quantized(loaded.config):
        return "not measured: on this CPU, a training step with quantized weights takes minutes"
    if not trials and nbytes(loaded.model.parameters()) > QUICK_WEIGHTS:
        return "not estimated, which would read all weights; --memory measures what the run needs"
    return None


def _full_row(length: int, config: RunConfig) -> "TokenizedRow":
    from nalora_mlx.data.preferences import PreferenceExample
    from nalora_mlx.data.tokenization import Example

    row = Example(np.ones(length, np.int32), np.arange(length) > 0, "a full row")
    if not config.prefers:
        return row
    if config.train_mode == KTO:
        return PreferenceExample((row,), mismatched=row)
    return PreferenceExample((row, row), sft_mask=row.loss_mask if config.train_mode == ORPO else None)


def _planned(
    loaded: "LoadedModel", examples: "list[TokenizedRow]", config: RunConfig
) -> "tuple[TrainingStep, BatchShape]":
    """Return a training step as the run would take it, and the shape of its largest batch."""
    from nalora_mlx.training.memory_plan import largest_batch, planning_step
    from nalora_mlx.training.optimizers import configured_optimizer
    from nalora_mlx.training.preferences.layout import choose_layout
    from nalora_mlx.training.preferences.loss import PreferenceLoss
    from nalora_mlx.training.trainer import new_loss

    loss = new_loss(loaded.model, config)
    rows: Sequence[Any] = examples
    if isinstance(loss, PreferenceLoss):
        rows = choose_layout(loss, rows, config)
    step = planning_step(loaded.model, config, configured_optimizer(config), loss)
    return step, largest_batch(rows, config)


def _estimate(
    page: "Page", loaded: "LoadedModel", examples: "list[TokenizedRow]", config: RunConfig, budget: int
) -> None:
    """Report an upper bound of the run's memory."""
    with page.working("estimating memory"):
        import mlx.core as mx

        from nalora_mlx.training.memory_plan import upper_bound_bytes

        if loaded.processor is not None:
            mx.eval(loaded.model.parameters())  # MLX cannot trace arrays that are still on disk
        step, shape = _planned(loaded, examples, config)
        bound = upper_bound_bytes(step, shape, config)
    found = f"upper bound {bound / 1e9:.2f} GB for {shape.rows} x {shape.length:,} tokens"
    if bound <= budget:
        page.ok(f"{found}: fits; --memory measures it")
    else:
        known = found if bound < np.inf else "no upper bound is known"
        page.warning(f"{known}: may not fit; --memory measures what the run needs")


def _measure(
    page: "Page", loaded: "LoadedModel", examples: "list[TokenizedRow]", config: RunConfig, budget: int
) -> None:
    """Report the run's memory as measured on a few training steps."""
    page.note("measuring a few training steps, which may take a minute")
    with page.working("preparing training steps") as show:
        import mlx.core as mx

        from nalora_mlx.training.memory_plan import measure

        mx.eval(loaded.model.parameters())  # to measure the steps without the reading of weights
        step, shape = _planned(loaded, examples, config)
        found = measure(step, shape, config, budget, show)
    first, *others = (line.removeprefix("memory: ") for line in found.lines())
    if found.fits:
        page.ok(first)
    else:
        page.warning(f"{first}; what would fit: {' or '.join(found.remedies())}")
    for line in others:
        page.note(line.removeprefix("note: "))
