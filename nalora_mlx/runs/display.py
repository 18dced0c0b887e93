"""Terminal display of a training run: a progress bar with the latest metrics, or plain lines if output is piped."""

import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Table
from rich.text import Text

from nalora_mlx.core.errors import merge_splits
from nalora_mlx.core.paths import as_typed
from nalora_mlx.core.terminal import LastingConsole, has_colors, marked_text
from nalora_mlx.runs.preferences import describe_measures
from nalora_mlx.runs.status import (
    Status,
    before_training,
    duration,
    is_best,
    is_worse_than_before,
    memory_use,
)

SPEED_WINDOW = 3600.0  # seconds of steps from which the time left is estimated; one step may take minutes
SAMPLE_LINES, SAMPLE_CHARACTERS = 6, 400  # of a prompt or an answer that are shown


class TimeLeft(ProgressColumn):
    """The estimated time left; empty before there is an estimate, and at the end."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        """Return the time as text."""
        left = None if task.finished else task.time_remaining
        return Text("" if left is None else f"{duration(left)} left", "cyan")


def default_console() -> Console:
    """Return a console for standard output. A notebook, which keeps all output, gets plain lines without a bar."""
    console = LastingConsole(highlight=False)
    if not console.is_jupyter:
        return console
    return LastingConsole(highlight=False, force_jupyter=False, force_terminal=False)


class Display:
    """A listener of `train` that shows its events, and a context manager that closes the progress bar.

    Set `status.memory_limit` before the run to show memory use relative to a limit.
    """

    def __init__(self, console: Console | None = None, phrase: Callable[[str], str] = str):
        self.phrase = phrase  # rewrites what is printed
        self.console = console or default_console()
        self.progress: Progress | None = None
        self.live: Live | None = None
        self.interactive = self.console.is_terminal and not self.console.is_dumb_terminal
        self.status = Status()
        self.iterations = 0
        self.validated = False
        self.began = time.perf_counter()
        self.preparation = 0.0  # seconds between the display's construction and the start of training

    def __enter__(self) -> "Display":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def _stop(self) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = self.progress = None

    def note(self, text: str) -> None:
        """Print one line above the bar."""
        # If output is piped, lines are not wrapped, so that each stays one record.
        with suppress(OSError):  # the terminal may be closed
            self.console.print(self.phrase(text), markup=False, soft_wrap=not self.interactive)

    def notices(self, texts: Iterable[str]) -> None:
        """Print notices, a line each; those that say the same about several splits become one."""
        for text in merge_splits(texts):
            self.note(f"note: {text}")

    def masks(self, source: str, pieces: Iterable[tuple[str, bool]]) -> None:
        """Print a row with its supervised tokens marked."""
        text = marked_text(source, pieces, has_colors(self.console))
        self.console.print(text, soft_wrap=not self.interactive)

    @contextmanager
    def waiting(self, text: str) -> Iterator[Callable[[str], None]]:
        """Show what takes a while, until it is over. Yields a function that replaces the text."""
        if not self.interactive:
            self.note(text)
            yield lambda _: None
            return
        with self.console.status(text) as status:
            yield status.update

    def sample(self, sample: Mapping[str, Any]) -> None:
        """Show a prompt, its answers before and after training, and the expected one if the last is another.

        Prints nothing if output is piped.
        """
        if not self.interactive:
            return
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim", no_wrap=True)
        table.add_column(overflow="fold")
        ended = {"before": sample.get("before_complete", True), "after": sample["complete"]}
        for name in ("prompt", "before", "after", "expected"):
            if sample[name] is not None and (name != "expected" or sample[name].strip() != sample["after"]):
                text = _opening(sample[name], ended.get(name, True))
                table.add_row(name, Text(text, "bold" if name == "after" else ""))
        with suppress(OSError):
            self.console.print()
            self.console.print(table)

    def next_steps(self, steps: Sequence[tuple[str, Sequence[str]]]) -> None:
        """Print commands to copy, each with a word that says what it is for."""
        width = max((len(name) for name, _ in steps), default=0)
        with suppress(OSError):
            self.console.print("\nnext:")
            for name, words in steps:
                indent = width + 4
                columns = self.console.width - indent if self.interactive else None
                text = f"  {name:<{width}}  " + f"\n{' ' * (indent + 2)}".join(
                    _command_lines(as_typed(words), columns)
                )
                self.console.print(text, markup=False, soft_wrap=True)

    @contextmanager
    def trials(self) -> Iterator[Callable[[str], None]]:
        """Give a function that shows a trial of the memory planner; at the end, show how long the trials took."""
        began, status, shown = time.perf_counter(), self.console.status(""), False

        def show(trial: str) -> None:
            nonlocal shown
            if not shown:
                self.note("measuring memory on a few training steps")
                status.start()
            shown = True
            status.update(f"measuring memory: {trial}")

        try:
            yield show
        finally:
            status.stop()
        if shown:
            self.note(f"measured memory in {time.perf_counter() - began:.0f} s")

    def __call__(self, event: dict[str, Any]) -> None:
        """Show one event."""
        kind = event["event"]
        if kind == "start":
            self.preparation = time.perf_counter() - self.began
            self._start(event["iterations"], event["done"])
        elif kind == "step" and self.progress is not None:
            self.progress.update(self.training, completed=event["step"])
        elif kind == "reference":
            self._reference(event["batch"], event["batches"])
        elif kind == "validating":
            self._validating(event["batch"], event["batches"])
        elif kind == "metrics":
            self._metrics(event)
        elif kind == "notice":
            self.notices([event["text"]])
        elif kind == "end":
            self._stop()  # what follows is printed below the bar
        elif kind == "saved":
            self.note(f"iteration {event['step']}: saved to {event['path']}")

    def _reference(self, batch: int, batches: int) -> None:
        if self.progress is not None:
            self.progress.update(self.reference, completed=batch, total=batches, visible=batch < batches)
        elif batch == 1 < batches:
            self.note(f"computing the log-probabilities of the reference on {batches} batches")

    def _validating(self, batch: int, batches: int) -> None:
        if self.progress is not None:
            self.progress.update(self.validation, completed=batch, total=batches, visible=batch < batches)
        elif batch == 1 < batches and not self.validated:  # the only line until the first validation ends
            self.note(f"validating the model on {batches} batches")

    def _start(self, iterations: int, done: int) -> None:
        self.iterations = iterations
        if not self.interactive:
            return
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None, complete_style="cyan", finished_style="green"),
            MofNCompleteColumn(),
            TimeLeft(),
            console=self.console,
            speed_estimate_period=SPEED_WINDOW,
        )
        self.training = self.progress.add_task("training", total=iterations, completed=done)
        self.reference = self.progress.add_task("reference", total=1, visible=False)
        self.validation = self.progress.add_task("validating", total=1, visible=False)
        self.live = Live(Group(self.progress, self.status), console=self.console, refresh_per_second=4)
        self.live.start()

    def _metrics(self, event: dict[str, Any]) -> None:
        self.status.add(event)
        total = str(self.iterations)
        step = f"iteration {event['step']:>{len(total)}}/{total}"
        loss = ", ".join([f"loss {event['loss']:.4f}", *describe_measures(event)])
        if event["split"] == "valid":
            remark = " (best)" if is_best(event) else ""
            if is_worse_than_before(event):
                remark = f" ({before_training(event)})"
            self.validated = True
            self.note(f"{step}: validation {loss}{remark}, {event['seconds']:.1f} s")
            return
        if self.live is not None:
            return  # the status under the bar shows it
        rate = "" if event["learning_rate"] is None else f", lr {event['learning_rate']:.2e}"
        left = (self.iterations - event["step"]) / event["iterations_per_second"]
        self.note(
            f"{step}: {loss}{rate}, {event['tokens_per_second']:.0f} tokens/s, "
            f"{memory_use(event['peak_memory_gb'], None)}, {duration(left)} left"
        )


def _opening(text: str, ended: bool) -> str:
    """Return the beginning of a text, with dots if that is not all of it."""
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    shown = "\n".join(lines[:SAMPLE_LINES])
    ended = ended and len(lines) <= SAMPLE_LINES
    if len(shown) > SAMPLE_CHARACTERS:
        shown, ended = shown[:SAMPLE_CHARACTERS].rsplit(maxsplit=1)[0], False
    return shown if ended else f"{shown} ..."


def _command_lines(words: Sequence[str], columns: int | None) -> list[str]:
    """Return a command for a shell, continued on further lines, before its flags, if it has too many columns."""
    parts: list[str] = []  # a flag and its value are one part
    for word in map(shlex.quote, words):
        if parts and parts[-1].startswith("-") and " " not in parts[-1] and not word.startswith("-"):
            parts[-1] += f" {word}"
        else:
            parts.append(word)
    lines = parts[:1]
    for part in parts[1:]:
        if columns is None or len(lines[-1]) + len(part) + len("  \\") <= columns:
            lines[-1] += f" {part}"
        else:
            lines.append(part)
    return [f"{line} \\" for line in lines[:-1]] + lines[-1:]
