"""What the terminal shows: a run, with a bar over its last report, or in plain lines; and a page of checks."""

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.table import Table
from rich.text import Text

from nalora_mlx.core.errors import InputError


class LastingConsole(Console):
    """A console that falls silent when nobody reads it any more: a run goes on without its terminal."""

    def on_broken_pipe(self) -> None:
        """Print nothing from now on; what is left in the buffer goes nowhere, or Python would exit with 120 for it."""
        self.quiet = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.file.fileno())
        os.close(nowhere)


def colours(console: Console) -> bool:
    """Whether it shows colours; NO_COLOR leaves only bold and the like."""
    return console.color_system is not None and not console.no_color


def drawable(text: str, otherwise: str) -> str:
    """A text, or another one if the encoding of standard output has no such characters."""
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return otherwise
    return text


def marked_text(source: str, pieces: Iterable[tuple[str, bool]], colours: bool) -> Text:
    """A row's text with what is trained on in green, or between brackets where there are no colours."""
    text = Text(f"{source}\n")
    for piece, supervised in pieces:
        # What a row holds must not steer the terminal.
        safe = "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in piece)
        if supervised and not colours:
            safe = f"{drawable('⟦', '[[')}{safe}{drawable('⟧', ']]')}"
        text.append(safe, "bold green" if supervised else "dim")
    return text


class Page:
    """A page of checks: headings, and lines with a mark before each; counts what was found.

    Attributes:
        findings: what should be better.
        problems: what keeps a run from starting.
    """

    def __init__(self, console: Console):
        self.console = console
        self.findings = self.problems = 0

    @contextmanager
    def section(self, title: str) -> Iterator[None]:
        """Print a heading; input that is refused below it is a problem, and the page goes on."""
        self.console.print(f"\n{title}", style="bold", markup=False)
        try:
            yield
        except InputError as error:
            self.problem(str(error))

    def good(self, text: str) -> None:
        """Something that was checked, and is right."""
        self._line("✓", "green", text)

    def fact(self, text: str) -> None:
        """Something to know."""
        self._line("·", "dim", text)

    def finding(self, text: str) -> None:
        """Something that should be better, and how."""
        self.findings += 1
        self._line("!", "bold yellow", f"finding: {text}")

    def problem(self, text: str) -> None:
        """Something that keeps a run from starting, and what to do."""
        self.problems += 1
        self._line("✗", "bold red", f"finding: {text}")

    def verdict(self) -> None:
        """Say what all came to.

        Raises:
            InputError: there are problems.
        """
        self.console.print()
        if self.problems:
            kept = f"{_count(self.problems)} that keep{'s' if self.problems == 1 else ''} a run from starting"
            others = f"{self.findings or 'no'} other{'' if self.findings == 1 else 's'}"
            self._line("✗", "bold red", f"{kept}, {others}")
            raise InputError(f"{kept}; see above")
        if self.findings:
            self._line("!", "bold yellow", f"{_count(self.findings)}, none that keeps a run from starting")
        else:
            self._line("✓", "green", "no findings")

    def _line(self, mark: str, style: str, text: str) -> None:
        line = Text(f"  {mark} ", style)
        if not self.console.is_terminal:
            self.console.print(line.append(text), soft_wrap=True)
            return
        table = Table.grid()  # what is wrapped hangs under its line
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        table.add_row(line, Text(text))
        self.console.print(table)


def _count(findings: int) -> str:
    return f"{findings} finding{'' if findings == 1 else 's'}"
