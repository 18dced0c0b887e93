"""Terminal output: a console that survives the loss of its terminal, and marked tokens."""

import os
import sys
from collections.abc import Iterable

from rich.console import Console
from rich.text import Text


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
