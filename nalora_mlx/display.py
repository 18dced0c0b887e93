"""What the terminal shows of a run: a bar and a line per report; plain lines where output is no terminal."""

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Display:
    """Shows the events of `train`; usable as a listener. Use it as a context manager, so that the bar is closed."""

    def __init__(self, console: Console | None = None):
        self.console = console or Console(highlight=False)
        self.progress: Progress | None = None
        self.iterations = 0
        self.last_valid: float | None = None

    def __enter__(self) -> "Display":
        return self

    def __exit__(self, *_: object) -> None:
        if self.progress is not None:
            self.progress.stop()
            self.progress = None

    def note(self, text: str) -> None:
        """Print one line above the bar."""
        # Not wrapped where output is piped: a line there is a record.
        self.console.print(text, markup=False, soft_wrap=not self.console.is_terminal)

    def __call__(self, event: dict[str, Any]) -> None:
        """Show one event."""
        kind = event["event"]
        if kind == "start":
            self._start(event["iterations"])
        elif kind == "step" and self.progress is not None:
            self.progress.update(self.training, completed=event["step"])
        elif kind == "validating" and self.progress is not None:
            done = event["batch"] == event["batches"]
            self.progress.update(
                self.validation, completed=event["batch"], total=event["batches"], visible=not done
            )
        elif kind == "metrics":
            self._metrics(event)
        elif kind == "saved":
            self.note(f"iteration {event['step']}: saved to {event['path']}")

    def _start(self, iterations: int) -> None:
        self.iterations = iterations
        if not self.console.is_terminal:
            return
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"),
            console=self.console,
        )
        self.training = self.progress.add_task("training", total=iterations, status="")
        self.validation = self.progress.add_task("validating", total=1, status="", visible=False)
        self.progress.start()

    def _metrics(self, event: dict[str, Any]) -> None:
        step = f"iteration {event['step']:>{len(str(self.iterations))}}"
        if event["split"] == "valid":
            best = " (best)" if event["best_loss"] == event["loss"] else ""
            change = "" if self.last_valid is None else f", {event['loss'] - self.last_valid:+.4f}"
            self.last_valid = event["loss"]
            self.note(f"{step}: validation loss {event['loss']:.4f}{change}{best}, {event['seconds']:.1f} s")
            return
        rate = "-" if event["learning_rate"] is None else f"{event['learning_rate']:.2e}"
        line = (
            f"{step}: loss {event['loss']:.4f}, lr {rate}, {event['iterations_per_second']:.2f} it/s, "
            f"{event['tokens_per_second']:.0f} tokens/s, {event['tokens']} tokens, "
            f"peak {event['peak_memory_gb']:.2f} GB"
        )
        found = [layer["misalignment"] for layer in event["layers"].values() if "misalignment" in layer]
        if found:
            line += f", misalignment {sum(found) / len(found):.3f}"
        self.note(line)
        if self.progress is not None:
            self.progress.update(self.training, status=f"loss {event['loss']:.3f}")
