"""The exceptions that become one line for a person; every room may use them, and they use none."""

import re
from collections.abc import Sequence

# What mlx says when it gets no memory: on Metal, on CUDA, and on a CPU.
_NO_MEMORY = re.compile(
    r"malloc|unable to allocate|insufficient memory|out of memory|bad_alloc", re.IGNORECASE
)
_LINE = re.compile(r"(\S.*?:\d+): ")  # where a problem is, before what it is
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
    """The first problems and how many more there are, in one line; one that many lines of files have is said once."""
    where: dict[str, list[str]] = {}
    for problem in problems:
        place = _LINE.match(problem)
        where.setdefault(problem[place.end() :] if place else problem, []).extend(
            place.groups() if place else ()
        )
    said = [f"{places(found)}: {what}" if found else what for what, found in where.items()]
    rest = len(said) - SHOWN
    more = f"{separator}and {rest} more" if rest > 0 else ""
    return separator.join(said[:SHOWN]) + more


def places(sources: Sequence[str], most: int = SHOWN) -> str:
    """The first of some places in files and how many more there are: a.jsonl:1, :7, b.jsonl:2 and 12 more."""
    shown: list[str] = []
    file = ""
    for source in sources[:most]:
        before, file = file, source.rpartition(":")[0]
        shown.append(source.removeprefix(file) if file == before else source)
    rest = len(sources) - most
    return ", ".join(shown) + (f" and {rest} more" if rest > 0 else "")


def out_of_memory(error: Exception) -> bool:
    """Whether an exception says that there was no memory left."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)) is not None
    )


def first_line(error: Exception) -> str:
    """The first line of what an exception says, or its name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
