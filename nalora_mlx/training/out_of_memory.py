"""What to tell the user when a run is out of memory."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nalora_mlx.core.config import RunConfig
from nalora_mlx.core.errors import RunError, first_line, is_out_of_memory
from nalora_mlx.runs.checkpoints import CHECKPOINTS, steps


@contextmanager
def explain_out_of_memory(
    config: RunConfig, output: Path, quantized: bool, start: Path | None, started: threading.Event
) -> Iterator[None]:
    """Turn an out-of-memory error into one that names the last complete checkpoint and the flags that save memory.

    Args:
        config: the run's settings.
        output: the run's directory.
        quantized: whether the base model is quantized.
        start: the checkpoint or adapter that the run starts from.
        started: set once the directory is the run's own; before, its files belong to a previous run.

    Raises:
        RunError: in place of the out-of-memory error.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        complete = list(steps(output / CHECKPOINTS).values()) if started.is_set() else []
        if not complete and config.resume is not None and start is not None:
            complete = [start]
        advice = remedy(config, quantized, complete[-1] if complete else None)
        raise RunError(f"out of memory ({first_line(error)}); {advice}") from error


def remedy(config: RunConfig, quantized: bool, checkpoint: Path | None) -> str:
    """Return how to continue from the last complete checkpoint, or how to start again without one."""
    same_run = [
        f"--batch-size {config.batch_size // 2}" if config.batch_size > 1 else "",
        "" if config.grad_checkpoint else "--grad-checkpoint",
    ]
    other_run = [
        f"--max-seq-length {config.max_seq_length // 2}" if config.max_seq_length > 256 else "",
        "" if quantized or config.fine_tune_type == "full" else "--quantize 4",
    ]
    fewer_layers = "--num-layers 8" if config.num_layers < 0 or config.num_layers > 8 else ""
    if checkpoint is None:
        return f"try {_either([*same_run, *other_run, fewer_layers])}"
    if any(same_run):
        return f"{checkpoint} is complete: continue with --resume --resume-anyway and {_either(same_run)}"
    return (
        f"{checkpoint} is complete: start from its adapter with --resume-adapter-file {checkpoint} and "
        f"{_either(other_run)}"
    )


def _either(flags: list[str]) -> str:
    return " or ".join(filter(None, flags)) or "a smaller --model"
