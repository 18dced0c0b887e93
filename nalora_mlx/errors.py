"""The exceptions that become one line for a person; every room may use them, and they use none."""

from collections.abc import Sequence

SHOWN = 10  # of a list of problems; the rest is counted


class InputError(ValueError):
    """Bad input: the message says what is wrong, where, and what to do.

    The commands print it as one line and exit with status 2.
    """


class RunError(RuntimeError):
    """A run failed for a reason outside the program: the message says what, and what to do.

    The commands print it as one line and exit with status 1.
    """


def listed(problems: Sequence[str], separator: str = "; ") -> str:
    """The first problems and how many more there are, in one line."""
    rest = len(problems) - SHOWN
    more = f"{separator}and {rest} more" if rest > 0 else ""
    return separator.join(problems[:SHOWN]) + more


def places(sources: Sequence[str]) -> str:
    """The first of some places in files and how many more there are: a.jsonl:1, :7, b.jsonl:2 and 12 more."""
    shown: list[str] = []
    file = ""
    for source in sources[:SHOWN]:
        before, file = file, source.rpartition(":")[0]
        shown.append(source.removeprefix(file) if file == before else source)
    rest = len(sources) - SHOWN
    return ", ".join(shown) + (f" and {rest} more" if rest > 0 else "")


def first_line(error: Exception) -> str:
    """The first line of what an exception says, or its name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
