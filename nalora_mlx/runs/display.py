"""Terminal display of a training run: a progress bar with the latest metrics, or plain lines if output is piped."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from nalora_mlx.core.terminal import LastingConsole, has_colors, marked_text
from nalora_mlx.runs.progress import improves

CHART_LENGTH = 24  # losses in the chart
TREND_WINDOW = 5  # reports whose mean is compared with that of the reports before
LEVEL_CHANGE = 0.01  # relative change of the mean up to which the trend is level
NEARLY_FULL = 0.9  # fraction of the memory limit above which memory use is highlighted
SPEED_WINDOW = 3600.0  # seconds of steps from which the time left is estimated; one step may take minutes
BLOCKS = "▁▂▃▄▅▆▇█"


def chart(values: Sequence[float]) -> str:
    """Return numbers as a line of blocks, scaled from minimum to maximum, with gaps for NaN and infinity."""
    known = [value for value in values if math.isfinite(value)]
    low, high = min(known, default=0), max(known, default=0)
    unit = (high - low) / (len(BLOCKS) - 1) or 1
    return "".join(BLOCKS[round((v - low) / unit)] if math.isfinite(v) else " " for v in values)


def trend(values: Sequence[float]) -> str:
    """Return whether the last numbers are falling, rising or level against those before; empty for too few numbers."""
    if len(values) < 2 * TREND_WINDOW or not all(map(math.isfinite, values[-2 * TREND_WINDOW :])):
        return ""
    before, now = sum(values[-2 * TREND_WINDOW : -TREND_WINDOW]), sum(values[-TREND_WINDOW:])
    if abs(now - before) <= LEVEL_CHANGE * abs(before):
        return "level"
    return "falling" if now < before else "rising"


class Status:
    """The latest metrics, shown under the bar; a renderable of rich.

    Args:
        memory_limit: bytes that the run should not exceed; None to show memory use without a limit.
    """

    def __init__(self, memory_limit: int | None = None):
        self.memory_limit = memory_limit
        self.losses: list[float] = []
        self.report: dict[str, Any] = {}
        self.valid: dict[str, Any] = {}
        self.best_step: int | None = None

    def add(self, event: dict[str, Any]) -> None:
        """Add a metrics event."""
        if event["split"] == "valid":
            self.valid = event
            if event["loss"] == event["best_loss"]:
                self.best_step = event["step"]
            return
        self.report = event
        self.losses = [*self.losses, event["loss"]][-max(CHART_LENGTH, 2 * TREND_WINDOW) :]

    def __rich__(self) -> Table:
        """Return the metrics as a table of names and values."""
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim", no_wrap=True)
        table.add_column()
        if self.report:
            loss = Text(f"{self.report['loss']:.4f}  ", "bold")
            loss.append(chart(self.losses[-CHART_LENGTH:]), "cyan")
            direction = trend(self.losses)
            loss.append(f"  {direction}", {"rising": "yellow", "falling": "green"}.get(direction, ""))
            table.add_row("loss", loss)
        if self.valid:
            table.add_row("validation", self._validation())
        if self.report:
            rate = self.report["learning_rate"]
            table.add_row("learning rate", "none" if rate is None else f"{rate:.2e}")
            misalignment = mean_misalignment(self.report)
            if misalignment is not None:
                table.add_row("misalignment", f"{misalignment:.3f}, mean over the layers")
            table.add_row(
                "speed",
                f"{self.report['tokens_per_second']:,.0f} tokens/s, "
                f"{self.report['iterations_per_second']:.2f} iterations/s",
            )
            table.add_row("memory", self._memory(self.report["peak_memory_gb"]))
        return table

    def _validation(self) -> Text:
        text = Text(f"{self.valid['loss']:.4f}", "bold")
        best = self.valid["best_loss"]
        if best is None:  # before the first update
            text.append(f"  at iteration {self.valid['step']}")
        elif is_worse_than_before(self.valid):
            text.append(f"  {before_training(self.valid)}", "yellow")
        elif self.best_step == self.valid["step"]:
            text.append("  the best so far", "green")
        else:
            place = "" if self.best_step is None else f" at iteration {self.best_step}"
            text.append(f"  best {best:.4f}{place}")
        return text

    def _memory(self, peak: float) -> Text:
        if self.memory_limit is None:
            return Text(f"{peak:.2f} GB")
        fraction = peak / (self.memory_limit / 1e9)
        full = fraction >= NEARLY_FULL
        return Text(
            f"{memory_use(peak, self.memory_limit)} ({fraction:.0%}{', nearly full' if full else ''})",
            "bold yellow" if full else "",
        )


def memory_use(peak: float, limit: int | None) -> str:
    """Return peak memory (in GB) and the limit (in bytes), if there is one, as text."""
    return f"{peak:.2f} GB" if limit is None else f"{peak:.2f} of {limit / 1e9:.1f} GB"


def duration(seconds: float) -> str:
    """Return a time in hours, minutes and seconds, for example 1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def mean_misalignment(event: dict[str, Any]) -> float | None:
    """Return the mean selection misalignment over the layers that report it, or None if none does."""
    found = [layer["misalignment"] for layer in event["layers"].values() if "misalignment" in layer]
    return sum(found) / len(found) if found else None


def is_worse_than_before(event: dict[str, Any]) -> bool:
    """Return whether a validation is not better than the one before training."""
    return event["step"] > 0 and not improves(event["loss"], event.get("first_loss"))


def before_training(event: dict[str, Any]) -> str:
    """Say that a validation loss was lower before training."""
    return f"not better than before training, {event['first_loss']:.4f}"


class Display:
    """A listener of `train` that shows its events, and a context manager that closes the progress bar.

    Set `status.memory_limit` before the run to show memory use relative to a limit.
    """

    def __init__(self, console: Console | None = None):
        self.console = console or LastingConsole(highlight=False)
        self.progress: Progress | None = None
        self.live: Live | None = None
        self.interactive = self.console.is_terminal and not self.console.is_dumb_terminal
        self.status = Status()
        self.iterations = 0
        self.last_valid: float | None = None
        self.began = time.perf_counter()
        self.preparation = 0.0  # seconds between the display's construction and the start of training

    def __enter__(self) -> "Display":
        return self

    def __exit__(self, *_: object) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = self.progress = None

    def note(self, text: str) -> None:
        """Print one line above the bar."""
        # If output is piped, lines are not wrapped, so that each stays one record.
        with suppress(OSError):  # the terminal may be closed
            self.console.print(text, markup=False, soft_wrap=not self.interactive)

    def notices(self, texts: Iterable[str]) -> None:
        """Print notices, a line each."""
        for text in texts:
            self.note(f"note: {text}")

    def masks(self, source: str, pieces: Iterable[tuple[str, bool]]) -> None:
        """Print a row with its supervised tokens marked."""
        text = marked_text(source, pieces, has_colors(self.console))
        self.console.print(text, soft_wrap=not self.interactive)

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
        elif kind == "validating":
            self._validating(event["batch"], event["batches"])
        elif kind == "metrics":
            self._metrics(event)
        elif kind == "notice":
            self.notices([event["text"]])
        elif kind == "saved":
            self.note(f"iteration {event['step']}: saved to {event['path']}")

    def _validating(self, batch: int, batches: int) -> None:
        if self.progress is not None:
            self.progress.update(self.validation, completed=batch, total=batches, visible=batch < batches)
        elif (
            batch == 1 < batches and self.last_valid is None
        ):  # the only line until the first validation ends
            self.note(f"validating the model on {batches} batches")

    def _start(self, iterations: int, done: int) -> None:
        self.iterations = iterations
        if not self.interactive:
            return
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=self.console,
            speed_estimate_period=SPEED_WINDOW,
        )
        self.training = self.progress.add_task("training", total=iterations, completed=done)
        self.validation = self.progress.add_task("validating", total=1, visible=False)
        self.live = Live(Group(self.progress, self.status), console=self.console, refresh_per_second=4)
        self.live.start()

    def _metrics(self, event: dict[str, Any]) -> None:
        self.status.add(event)
        step = f"iteration {event['step']:>{len(str(self.iterations))}}"
        if event["split"] == "valid":
            best = " (best)" if event["best_loss"] == event["loss"] else ""
            if is_worse_than_before(event):
                best = f" ({before_training(event)})"
            change = "" if self.last_valid is None else f", {event['loss'] - self.last_valid:+.4f}"
            self.last_valid = event["loss"]
            self.note(f"{step}: validation loss {event['loss']:.4f}{change}{best}, {event['seconds']:.1f} s")
            return
        if self.live is not None:
            return  # the status under the bar shows it
        rate = "-" if event["learning_rate"] is None else f"{event['learning_rate']:.2e}"
        misalignment = mean_misalignment(event)
        left = (self.iterations - event["step"]) / event["iterations_per_second"]
        self.note(
            f"{step}: loss {event['loss']:.4f}, lr {rate}, "
            f"{event['iterations_per_second']:.2f} it/s, {event['tokens_per_second']:.0f} tokens/s, "
            f"{event['tokens']} tokens, peak {memory_use(event['peak_memory_gb'], self.status.memory_limit)}"
            + ("" if misalignment is None else f", misalignment {misalignment:.3f}")
            + f", {event['step'] / self.iterations:.0%} done, {duration(left)} left"
        )
