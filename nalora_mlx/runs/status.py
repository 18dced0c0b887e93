"""The latest metrics of a training run in a few lines, for a terminal."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from nalora_mlx.core.terminal import drawable
from nalora_mlx.runs.preferences import describe_measures

TREND_WINDOW = 5  # reports whose mean is compared with that of the reports before
LEVEL_CHANGE = 0.01  # relative change of the mean up to which the trend is level
NEARLY_FULL = 0.9  # fraction of the memory limit above which memory use is highlighted
BLOCKS = "▁▂▃▄▅▆▇█"
ASCII_BLOCKS = "_.,-=+*#"
FLATTEST = 1e-4  # of the largest value: what is smaller is drawn as large as this
BESIDE = 47  # columns beside the sparkline: name, loss, trend and first loss
SHORTEST, LONGEST = 8, 60  # columns of the sparkline


def sparkline(values: Sequence[float], width: int) -> str:
    """Return numbers as a line of blocks on a log scale, with gaps for NaN and infinity.

    More numbers than `width` are averaged in that many groups, so that the line always shows all of them.
    """
    groups = min(len(values), width)
    edges = [i * len(values) // groups for i in range(groups + 1)] if groups else [0]
    means = []
    for start, end in itertools.pairwise(edges):
        finite = [value for value in values[start:end] if math.isfinite(value)]
        means.append(sum(finite) / len(finite) if finite else math.nan)
    floor = FLATTEST * max((mean for mean in means if mean > 0), default=1)
    logs = [math.log(max(mean, floor)) for mean in means]  # that of NaN is NaN
    known = [log for log in logs if math.isfinite(log)]
    low, high = min(known, default=0), max(known, default=0)
    blocks = drawable(BLOCKS, ASCII_BLOCKS)
    unit = (high - low) / (len(blocks) - 1) or 1
    return "".join(blocks[round((log - low) / unit)] if math.isfinite(log) else " " for log in logs)


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
        self.losses: list[float] = []  # of all reports
        self.report: dict[str, Any] = {}
        self.valid: dict[str, Any] = {}
        self.best_step: int | None = None

    def add(self, event: dict[str, Any]) -> None:
        """Add a metrics event."""
        if event["split"] == "valid":
            self.valid = event
            if is_best(event):
                self.best_step = event["step"]
            return
        self.report = event
        self.losses.append(event["loss"])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Give the metrics as a table of names and values."""
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim", no_wrap=True)
        table.add_column()
        if self.report:
            table.add_row("loss", self._loss(min(max(options.max_width - BESIDE, SHORTEST), LONGEST)))
            if measures := describe_measures(self.report):
                table.add_row("", ", ".join(measures))
        if self.valid:
            table.add_row("validation", self._validation())
            if "accuracy" in self.valid:
                table.add_row(
                    "", ", ".join([f"loss {self.valid['loss']:.4f}", *describe_measures(self.valid)[1:]])
                )
        if self.report:
            rate = self.report["learning_rate"]
            table.add_row("learning rate", "none" if rate is None else f"{rate:.2e}")
            table.add_row("speed", speed(self.report))
            table.add_row("memory", self._memory(self.report["peak_memory_gb"]))
        yield table

    def _loss(self, width: int) -> Text:
        text = Text(f"{self.report['loss']:.4f}  ", "bold", no_wrap=True)
        text.append(sparkline(self.losses, width), "not bold cyan")
        if direction := trend(self.losses):
            text.append(f"  {direction}", {"rising": "yellow", "falling": "green"}.get(direction, ""))
        if len(self.losses) > 1:
            text.append(f"  from {self.losses[0]:.4f}", "not bold dim")
        return text

    def _validation(self) -> Text:
        """Say how the last validation compares: by its accuracy in preference training, else by its loss."""
        key, digits = ("accuracy", 2) if "accuracy" in self.valid else ("loss", 4)
        value, best, first = (self.valid.get(name) for name in (key, f"best_{key}", f"first_{key}"))
        text = Text(f"{'accuracy ' if key == 'accuracy' else ''}{value:.{digits}f}  ", "bold")
        if best is None:
            text.append("before training", "not bold")
        elif is_worse_than_before(self.valid):
            text.append(before_training(self.valid), "yellow")
        elif self.best_step == self.valid["step"]:
            text.append("the best so far", "green")
            if first is not None:
                text.append(f"  from {first:.{digits}f}", "not bold dim")
        else:
            place = "" if self.best_step is None else f" at iteration {self.best_step}"
            text.append(f"best {best:.{digits}f}{place}", "not bold")
        return text

    def _memory(self, peak: float) -> Text:
        if self.memory_limit is None:
            return Text(memory_use(peak, None))
        fraction = peak / (self.memory_limit / 1e9)
        full = fraction >= NEARLY_FULL
        return Text(
            f"{memory_use(peak, self.memory_limit)} ({fraction:.0%}{', nearly full' if full else ''})",
            "bold yellow" if full else "",
        )


def speed(event: dict[str, Any]) -> str:
    """Return how fast a run trains, as text."""
    rate = event["iterations_per_second"]
    pace = f"{rate:.2f} iterations/s" if rate >= 1 else f"{1 / rate:.1f} s per iteration"
    return f"{event['tokens_per_second']:,.0f} tokens/s, {pace}"


def memory_use(peak: float, limit: int | None) -> str:
    """Return peak memory (in GB) and the limit (in bytes), if there is one, as text."""
    return f"{peak:.2f} GB" if limit is None else f"{peak:.2f} of {limit / 1e9:.1f} GB"


def improves(
    loss: float,
    before: float | None,
    accuracy: float | None = None,
    accuracy_before: float | None = None,
) -> bool:
    """Return whether a validation is better than that before training; any is better than a NaN.

    A higher accuracy is better, if there is one. Among equal ones, and without one, a lower loss is.
    """
    if before is None or math.isnan(loss):
        return before is None
    if accuracy is not None and accuracy_before is not None and accuracy != accuracy_before:
        return accuracy > accuracy_before
    return loss < before


def duration(seconds: float) -> str:
    """Return a time in hours, minutes and seconds, for example 1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def is_best(event: dict[str, Any]) -> bool:
    """Return whether a validation is the best of its run so far."""
    return event["loss"] == event["best_loss"] and event.get("accuracy") == event.get("best_accuracy")


def is_worse_than_before(event: dict[str, Any]) -> bool:
    """Return whether a validation is not better than the one before training."""
    accuracies = event.get("accuracy"), event.get("first_accuracy")
    return event["step"] > 0 and not improves(event["loss"], event.get("first_loss"), *accuracies)


def before_training(event: dict[str, Any]) -> str:
    """Say that a validation was better before training, and by what."""
    before = f"{event['first_loss']:.4f}"
    if event.get("first_accuracy") is not None:
        differs = event["accuracy"] != event["first_accuracy"]
        before = f"accuracy {event['first_accuracy']:.2f}" if differs else f"loss {before}"
    return f"not better than before training, {before}"
