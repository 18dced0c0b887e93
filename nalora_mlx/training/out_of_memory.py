"""What to do when a run has no memory left."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nalora_mlx.core.config import RunConfig
from nalora_mlx.core.errors import RunError, first_line, out_of_memory
from nalora_mlx.runs.checkpoints import CHECKPOINTS, steps


@contextmanager
def memory_advice(
    config: RunConfig, output: Path, quantized: bool, start: Path | None, begun: threading.Event
) -> Iterator[None]:
    """Say what is on the disk, and which flags save memory, when there is none left.

    Args:
        config: the run's settings.
        output: its directory.
        quantized: whether the model is.
        start: the checkpoint or adapter that it starts from.
        begun: set when the directory is the run's own; what is in it before that is of an earlier one.

    Raises:
        RunError: in the place of the error that says so.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        whole = list(steps(output / CHECKPOINTS).values()) if begun.is_set() else []
        if not whole and config.resume is not None and start is not None:
            whole = [start]
        advice = remedy(config, quantized, whole[-1] if whole else None)
        raise RunError(f"out of memory ({first_line(error)}); {advice}") from error


def remedy(config: RunConfig, quantized: bool, whole: Path | None) -> str:
    """What to do when memory ran out: go on from the last whole checkpoint, as far as its run allows, or start anew."""
    smaller = [
        f"--batch-size {config.batch_size // 2}" if config.batch_size > 1 else "",
        "" if config.grad_checkpoint else "--grad-checkpoint",
    ]
    lighter = [  # with these it is another run
        f"--max-seq-length {config.max_seq_length // 2}" if config.max_seq_length > 256 else "",
        "" if quantized or config.fine_tune_type == "full" else "--quantize 4",
    ]
    fewer = "--num-layers 8" if config.num_layers < 0 or config.num_layers > 8 else ""
    if whole is None:
        return f"what helps: {_either([*smaller, *lighter, fewer])}"
    if any(smaller):
        return f"{whole} is whole: go on with --resume --resume-anyway and {_either(smaller)}"
    return (
        f"{whole} is whole: start from its adapter with --resume-adapter-file {whole} and {_either(lighter)}"
    )


def _either(flags: list[str]) -> str:
    return " or ".join(filter(None, flags)) or "a smaller --model"
