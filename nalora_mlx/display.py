"""What the terminal shows of a run: a bar and a line per report; plain lines where output is no terminal."""

import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
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
from rich.text import Text

RECENT = 24  # losses in the little chart
TREND = 5  # reports whose mean is compared with that of as many before
LEVEL = 0.01  # a smaller share of change is none
FULL = 0.9  # of the memory: from here it is marked
BLOCKS = "▁▂▃▄▅▆▇█"


class LastingConsole(Console):
    """A console that falls silent when nobody reads it any more: a run goes on without its terminal."""

    def on_broken_pipe(self) -> None:
        """Print nothing from now on."""
        self.quiet = True


def marked_text(source: str, pieces: Iterable[tuple[str, bool]], colours: bool) -> Text:
    """A row's text with what is trained on in green, or between brackets where there are no colours."""
    text = Text(f"{source}\n")
    for piece, supervised in pieces:
        # What a row holds must not steer the terminal.
        safe = "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in piece)
        if supervised and not colours:
            safe = f"⟦{safe}⟧"
        text.append(safe, "bold green" if supervised else "dim")
    return text


def chart(values: Sequence[float]) -> str:
    """Numbers as a line of blocks, the lowest and the highest of them at its ends; a gap where one is not finite."""
    known = [value for value in values if math.isfinite(value)]
    low, high = min(known, default=0), max(known, default=0)
    unit = (high - low) / (len(BLOCKS) - 1) or 1
    return "".join(BLOCKS[round((v - low) / unit)] if math.isfinite(v) else " " for v in values)


def trend(values: Sequence[float]) -> str:
    """Whether the last numbers fall or rise against those before; nothing while there are too few."""
    if len(values) < 2 * TREND or not all(map(math.isfinite, values[-2 * TREND :])):
        return ""
    before, now = sum(values[-2 * TREND : -TREND]), sum(values[-TREND:])
    if abs(now - before) <= LEVEL * abs(before):
        return "level"
    return "falling" if now < before else "rising"


class Status:
    """What is under the bar: the last report, and how it compares; a renderable of rich.

    Args:
        memory_limit: bytes that the run should stay within; None leaves them out.
    """

    def __init__(self, memory_limit: int | None = None):
        self.memory_limit = memory_limit
        self.losses: list[float] = []
        self.report: dict[str, Any] = {}
        self.valid: dict[str, Any] = {}
        self.best_step: int | None = None

    def add(self, event: dict[str, Any]) -> None:
        """Take a metrics event."""
        if event["split"] == "valid":
            self.valid = event
            if event["loss"] == event["best_loss"]:
                self.best_step = event["step"]
            return
        self.report = event
        self.losses = [*self.losses, event["loss"]][-max(RECENT, 2 * TREND) :]

    def __rich__(self) -> Text:
        """Make the lines: loss and validation, then speed and memory."""
        text = Text()
        if self.report:
            text.append(f"loss {self.report['loss']:.4f} ", "bold")
            text.append(chart(self.losses[-RECENT:]), "cyan")
            text.append(f" {trend(self.losses)}".rstrip())
        if self.valid:
            text.append("   " if text else "")
            text.append(f"validation {self.valid['loss']:.4f}", "bold")
            if self.valid["best_loss"] is not None:
                place = "" if self.best_step is None else f" at {self.best_step}"
                style = "green" if self.best_step == self.valid["step"] else ""
                text.append(f", best {self.valid['best_loss']:.4f}{place}", style)
        if self.report:
            rate = self.report["learning_rate"]
            text.append(f"\n{self.report['tokens_per_second']:,.0f} tokens/s   ")
            text.append_text(self._memory(self.report["peak_memory_gb"]))
            text.append("" if rate is None else f"   learning rate {rate:.2e}")
            found = mean_misalignment(self.report)
            text.append("" if found is None else f"   misalignment {found:.3f}")
        return text

    def _memory(self, peak: float) -> Text:
        if self.memory_limit is None:
            return Text(f"memory {peak:.2f} GB")
        limit = self.memory_limit / 1e9
        share = peak / limit
        return Text(
            f"memory {peak:.2f} of {limit:.1f} GB ({share:.0%})", "bold yellow" if share >= FULL else ""
        )


def mean_misalignment(event: dict[str, Any]) -> float | None:
    """Mean selection misalignment of the layers that have one."""
    found = [layer["misalignment"] for layer in event["layers"].values() if "misalignment" in layer]
    return sum(found) / len(found) if found else None


class Display:
    """Shows the events of `train`; usable as a listener. Use it as a context manager, so that the bar is closed.

    Set `status.memory_limit` before the run to show its memory against that.
    """

    def __init__(self, console: Console | None = None):
        self.console = console or LastingConsole(highlight=False)
        self.progress: Progress | None = None
        self.live: Live | None = None
        self.status = Status()
        self.iterations = 0
        self.last_valid: float | None = None

    def __enter__(self) -> "Display":
        return self

    def __exit__(self, *_: object) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = self.progress = None

    def note(self, text: str) -> None:
        """Print one line above the bar."""
        # Not wrapped where output is piped: a line there is a record.
        with suppress(OSError):  # the terminal is gone; the run goes on
            self.console.print(text, markup=False, soft_wrap=not self.console.is_terminal)

    def masks(self, source: str, pieces: Iterable[tuple[str, bool]]) -> None:
        """Print a row with what is trained on marked."""
        text = marked_text(source, pieces, self.console.color_system is not None)
        self.console.print(text, soft_wrap=not self.console.is_terminal)

    def __call__(self, event: dict[str, Any]) -> None:
        """Show one event."""
        kind = event["event"]
        if kind == "start":
            self._start(event["iterations"], event["done"])
        elif kind == "step" and self.progress is not None:
            self.progress.update(self.training, completed=event["step"])
        elif kind == "validating" and self.progress is not None:
            done = event["batch"] == event["batches"]
            self.progress.update(
                self.validation, completed=event["batch"], total=event["batches"], visible=not done
            )
        elif kind == "metrics":
            self._metrics(event)
        elif kind == "notice":
            self.note(f"note: {event['text']}")
        elif kind == "saved":
            self.note(f"iteration {event['step']}: saved to {event['path']}")

    def _start(self, iterations: int, done: int) -> None:
        self.iterations = iterations
        if not self.console.is_terminal:
            return
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=self.console,
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
            change = "" if self.last_valid is None else f", {event['loss'] - self.last_valid:+.4f}"
            self.last_valid = event["loss"]
            self.note(f"{step}: validation loss {event['loss']:.4f}{change}{best}, {event['seconds']:.1f} s")
            return
        if self.live is not None:
            return  # it is under the bar
        rate = "-" if event["learning_rate"] is None else f"{event['learning_rate']:.2e}"
        line = (
            f"{step}: loss {event['loss']:.4f}, lr {rate}, {event['iterations_per_second']:.2f} it/s, "
            f"{event['tokens_per_second']:.0f} tokens/s, {event['tokens']} tokens, "
            f"peak {event['peak_memory_gb']:.2f} GB"
        )
        found = mean_misalignment(event)
        self.note(line if found is None else f"{line}, misalignment {found:.3f}")
