"""How a signal ends a training: the first one finishes the update and saves, the second ends the process at once."""

import shlex
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nalora_mlx.core.config import RunConfig
from nalora_mlx.core.paths import nalora_command
from nalora_mlx.core.signals import SIGNALS, StopRequest, stoppable
from nalora_mlx.runs.checkpoints import CHECKPOINTS, steps
from nalora_mlx.runs.display import Display


@contextmanager
def interruptible(output: Path, display: Display) -> Iterator[StopRequest]:
    """Let a first signal finish the update and save, and a second one end the process at once.

    Only the main thread receives signals; in another one, the request is never made.
    """
    if threading.current_thread() is not threading.main_thread():
        yield StopRequest()
        return

    def first(number: int) -> None:
        display.note(f"{SIGNALS[number]}: finishing this update and saving; once more ends the run at once")

    def second(number: int) -> None:
        found = list(steps(output / CHECKPOINTS))
        saved = "nothing was saved"
        if found:
            saved = f"the checkpoint of iteration {found[-1]} is complete; {how_to_continue(output)}"
        print(f"nalora lora: {SIGNALS[number]}: ended at once; {saved}", file=sys.stderr)

    with stoppable(first, second) as stop:
        yield stop


def how_to_continue(output: Path) -> str:
    """Return the command that continues a run, as the end of a sentence."""
    path = "" if str(output) == RunConfig().adapter_path else f" --adapter-path {shlex.quote(str(output))}"
    return f"{nalora_command()} lora --resume{path} continues from there"
