"""What to tell the user when the device fails or runs out of memory during training: last checkpoint and remedy."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nalora_mlx.core.config import RunConfig
from nalora_mlx.core.device_faults import DeviceFault, Saving, describe, find_fault
from nalora_mlx.core.errors import RunError
from nalora_mlx.runs.checkpoints import CHECKPOINTS, steps

SAME_RUN: tuple[Saving, ...] = ("batch", "checkpointing")  # what --resume --resume-anyway can change
SMALLER_MODEL = "a smaller --model"


@contextmanager
def explain_device_faults(
    config: RunConfig, output: Path, quantized: bool, start: Path | None, started: threading.Event
) -> Iterator[None]:
    """Turn a failure of the device into an error that names the last complete checkpoint and what helps.

    Args:
        config: the run's settings.
        output: the run's directory.
        quantized: whether the base model is quantized.
        start: the checkpoint or adapter that the run starts from.
        started: set once the directory is the run's own; before, its files belong to a previous run.

    Raises:
        RunError: in place of the failure.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        fault = find_fault(error)
        if fault is None:
            raise
        complete = list(steps(output / CHECKPOINTS).values()) if started.is_set() else []
        if not complete and config.resume is not None and start is not None:
            complete = [start]
        advice = remedy(fault, config, quantized, complete[-1] if complete else None)
        raise RunError(f"{describe(fault, error)}; {advice}") from error


def remedy(fault: DeviceFault, config: RunConfig, quantized: bool, checkpoint: Path | None) -> str:
    """Return how to continue from the last complete checkpoint, or how to start again without one."""
    flags = {name: flag for name, flag in saving_flags(config, quantized).items() if name in fault.savings}
    any_flag = " or ".join(flags.values())
    same_run = " or ".join(flag for name, flag in flags.items() if name in SAME_RUN)
    if fault.retry and checkpoint is None:
        return fault.remedy + (f", or try {any_flag}" if any_flag else "")
    if fault.retry:
        less = f", or --resume --resume-anyway and {same_run}" if same_run else ""
        return f"{fault.remedy}; {checkpoint} is complete: continue with --resume{less}"
    if checkpoint is None:
        return f"try {any_flag or SMALLER_MODEL}"
    if same_run:
        return f"{checkpoint} is complete: continue with --resume --resume-anyway and {same_run}"
    other_run = " or ".join(flag for name, flag in flags.items() if name != "layers")
    return (
        f"{checkpoint} is complete: start from its adapter with --resume-adapter-file {checkpoint} and "
        f"{other_run or SMALLER_MODEL}"
    )


def saving_flags(config: RunConfig, quantized: bool) -> dict[Saving, str]:
    """Return the flags with which this run would need less, by what they save. Those in effect are left out."""
    flags: dict[Saving, str] = {}
    if config.batch_size > 1:
        flags["batch"] = f"--batch-size {config.batch_size // 2}"
    if not config.grad_checkpoint:
        flags["checkpointing"] = "--grad-checkpoint"
    if config.max_seq_length > 256:
        flags["length"] = f"--max-seq-length {config.max_seq_length // 2}"
    if not quantized and config.fine_tune_type != "full":
        flags["quantization"] = "--quantize 4"
    if config.num_layers < 0 or config.num_layers > 8:
        flags["layers"] = "--num-layers 8"
    return flags
