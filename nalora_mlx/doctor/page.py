"""The page that `nalora doctor` prints: sections of checks, each with a level and, where there is one, a remedy."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.table import Table
from rich.text import Text

from nalora_mlx.core.errors import InputError, RunError, counted
from nalora_mlx.core.notices import Note
from nalora_mlx.core.terminal import drawable

LABEL_WIDTH = 9  # of the column with the titles of the sections


class Page:
    """A page of checks. Each has a level: ok, note, warning, problem, or failure (of this program).

    On a terminal, what to do about a warning or a problem has its own line. Elsewhere each check is one line.

    Attributes:
        warnings: number of results that could be better.
        failures: number of checks of this program that failed on this machine; runs can start all the same.
        problems: number of results that keep a run from starting.
    """

    def __init__(self, console: Console):
        self.console = console
        self.warnings = self.failures = self.problems = 0
        self._title = ""  # until the first line of the section shows it

    @contextmanager
    def section(self, title: str) -> Iterator[None]:
        """Name the section of the next lines. An InputError in it is printed as a problem and ends the section."""
        self._title = title
        try:
            yield
        except InputError as error:
            self.problem(str(error))

    @contextmanager
    def working(self, doing: str) -> Iterator[Callable[[str], None]]:
        """Show on a terminal what is being done; the function that it yields replaces the text."""
        with self.console.status(doing) as status:
            yield status.update

    def ok(self, text: str) -> None:
        """Print a check that passed."""
        self._line(drawable("✓", "+"), "green", text)

    def note(self, text: str) -> None:
        """Print information."""
        self._line(drawable("·", "-"), "dim", text)

    def warning(self, text: str) -> None:
        """Print what could be better, and what to do about it after the last semicolon."""
        self.warnings += 1
        self._line("!", "bold yellow", text, has_remedy=True)

    def notice(self, text: str) -> None:
        """Print a notice at its level: see `Note`."""
        (self.note if isinstance(text, Note) else self.warning)(text)

    def failure(self, text: str) -> None:
        """Print what this program computes wrongly on this machine, and what to do."""
        self.failures += 1
        self._line(drawable("✗", "x"), "bold red", text, has_remedy=True)

    def problem(self, text: str) -> None:
        """Print what keeps a run from starting, and what to do."""
        self.problems += 1
        self._line(drawable("✗", "x"), "bold red", text, has_remedy=True)

    def plain(self, text: Text) -> None:
        """Print text without a mark."""
        self._line(" ", "", text)

    def verdict(self, next_step: str | None = None) -> None:
        """Print how many warnings, failures and problems there are.

        Args:
            next_step: what to do if the run can start.

        Raises:
            RunError: there are failures.
            InputError: there are problems, and no failures.
        """
        self.console.print()
        self._title = ""
        serious = []
        if self.failures:
            serious.append(counted(self.failures, "failed check"))
        if self.problems:
            keeps = "keeps" if self.problems == 1 else "keep"
            serious.append(f"{counted(self.problems, 'problem')} that {keeps} a run from starting")
        if serious:
            text = " and ".join(serious)
            others = f", and {counted(self.warnings, 'warning')}" if self.warnings else ""
            self._line(drawable("✗", "x"), "bold red", text + others)
            raise (RunError if self.failures else InputError)(f"{text}; see above")
        then = f": {next_step}" if next_step else ""
        if self.warnings:
            self._line("!", "bold yellow", f"{counted(self.warnings, 'warning')}, no problem{then}")
        else:
            self._line(drawable("✓", "+"), "green", f"{'ready' if then else 'no problem, no warning'}{then}")

    def _line(self, mark: str, style: str, text: str | Text, has_remedy: bool = False) -> None:
        title, self._title = self._title, ""
        content = Text(text) if isinstance(text, str) else text
        if not self.console.is_terminal:
            indent = Text(f"{title:<{LABEL_WIDTH}}{mark} ")
            for line in content.split("\n", allow_blank=True):
                self.console.print(indent + line, soft_wrap=True)
                indent = Text(" " * (LABEL_WIDTH + 2))
            return
        what, _, remedy = content.plain.rpartition("; ") if has_remedy else ("", "", "")
        if what:
            content = Text.assemble(what, "\n", (f"{drawable('→', '->')} ", style), remedy)
        table = Table.grid()  # indents wrapped lines
        table.add_column(width=LABEL_WIDTH, no_wrap=True, style="bold")
        table.add_column(width=2, no_wrap=True)
        table.add_column(overflow="fold")
        table.add_row(title, Text(mark, style), content)
        self.console.print(table)
