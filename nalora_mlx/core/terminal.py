"""Terminal output: a console that survives the loss of its terminal, marked tokens, and the page of `nalora doctor`."""

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.table import Table
from rich.text import Text

from nalora_mlx.core.errors import InputError, RunError


class LastingConsole(Console):
    """A console that becomes quiet when its output is closed, so that a run outlives its terminal."""

    def on_broken_pipe(self) -> None:
        """Print nothing from now on."""
        self.quiet = True
        # Python flushes its buffer on exit, and would exit with status 120 if that failed.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.file.fileno())
        os.close(null)


def has_colors(console: Console) -> bool:
    """Return whether a console shows colors. With NO_COLOR it shows only styles such as bold."""
    return console.color_system is not None and not console.no_color


def drawable(text: str, fallback: str) -> str:
    """Return a text, or the fallback if standard output cannot encode the text."""
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return fallback
    return text


def marked_text(source: str, pieces: Iterable[tuple[str, bool]], colors: bool) -> Text:
    """Return a row's text with its supervised tokens marked, in green or, without colors, in brackets.

    Args:
        source: file and line of the row.
        pieces: parts of the text, and whether they are supervised.
        colors: whether the terminal shows colors.
    """
    text = Text(f"{source}\n")
    for piece, supervised in pieces:
        # Escape control characters, which could change the state of the terminal.
        safe = "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in piece)
        if supervised and not colors:
            safe = f"{drawable('⟦', '[[')}{safe}{drawable('⟧', ']]')}"
        text.append(safe, "bold green" if supervised else "dim")
    return text


class Page:
    """A page of checks, in sections. Counts findings, failures and problems.

    Attributes:
        findings: number of results that could be better.
        failures: number of checks of this program that failed on this machine; runs can start all the same.
        problems: number of results that prevent a run from starting.
    """

    def __init__(self, console: Console):
        self.console = console
        self.findings = self.failures = self.problems = 0

    @contextmanager
    def section(self, title: str) -> Iterator[None]:
        """Print a heading. An InputError in the section is printed as a problem and ends the section."""
        self.console.print(f"\n{title}", style="bold", markup=False)
        try:
            yield
        except InputError as error:
            self.problem(str(error))

    def good(self, text: str) -> None:
        """Print a check that passed."""
        self._line("✓", "green", text)

    def fact(self, text: str) -> None:
        """Print information."""
        self._line("·", "dim", text)

    def finding(self, text: str) -> None:
        """Print what could be better, and how to improve it."""
        self.findings += 1
        self._line("!", "bold yellow", f"finding: {text}")

    def failure(self, text: str) -> None:
        """Print what this program computes wrongly on this machine, and what follows from it."""
        self.failures += 1
        self._line("✗", "bold red", f"finding: {text}")

    def problem(self, text: str) -> None:
        """Print what prevents a run from starting, and what to do."""
        self.problems += 1
        self._line("✗", "bold red", f"finding: {text}")

    def verdict(self) -> None:
        """Print the number of findings.

        Raises:
            RunError: there are failures.
            InputError: there are problems, and no failures.
        """
        self.console.print()
        serious = []
        if self.failures:
            serious.append(f"{self.failures} failed check{'s' * (self.failures > 1)}")
        if self.problems:
            keep = "keeps" if self.problems == 1 else "keep"
            serious.append(f"{_count(self.problems)} that {keep} a run from starting")
        if serious:
            text = " and ".join(serious)
            self._line("✗", "bold red", f"{text}, {self.findings or 'no'} other{'s' * (self.findings != 1)}")
            raise (RunError if self.failures else InputError)(f"{text}; see above")
        if self.findings:
            self._line("!", "bold yellow", f"{_count(self.findings)}, none that keeps a run from starting")
        else:
            self._line("✓", "green", "no findings")

    def _line(self, mark: str, style: str, text: str) -> None:
        prefix = Text(f"  {mark} ", style)
        if not self.console.is_terminal:
            self.console.print(prefix.append(text), soft_wrap=True)
            return
        table = Table.grid()  # indents wrapped lines
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        table.add_row(prefix, Text(text))
        self.console.print(table)


def _count(findings: int) -> str:
    return f"{findings} finding{'' if findings == 1 else 's'}"
