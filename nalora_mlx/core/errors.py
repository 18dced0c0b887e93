"""Exceptions that the commands print as one line, and helpers that shorten messages."""

import re
from collections.abc import Iterable, Sequence

_SOURCE = re.compile(r"(\S.*?:\d+): ")  # file:line at the start of a problem
_PLACES = r" \(([^()]*:\d[^()]*)\)"
_SPLIT_NOTICE = re.compile(
    rf"(train|valid|test): (?:([\d,]+ (?:of [\d,]+ )?rows?) \w+ )?(.*?)(?:{_PLACES})?(; .*|)"
)
MAX_SHOWN = 10  # items of a list; the others are only counted


class InputError(ValueError):
    """Bad input. The message says what is wrong, where, and what to do.

    The commands print it as one line and exit with status 2.
    """


class RunError(RuntimeError):
    """A run failed for a reason outside the program. The message says why, and what to do.

    The commands print it as one line and exit with status 1.
    """


def listed(problems: Sequence[str], separator: str = "; ") -> str:
    """Join problems into one line; merge problems that differ only in file:line, and count those beyond MAX_SHOWN."""
    return separator.join(merged(problems))


def merged(problems: Sequence[str], most: int = MAX_SHOWN) -> list[str]:
    """Merge problems that differ only in file:line, and count places and problems beyond `most`."""
    sources_of: dict[str, list[str]] = {}  # sources by problem
    for problem in problems:
        match = _SOURCE.match(problem)
        what = problem[match.end() :] if match else problem
        sources_of.setdefault(what, []).extend(match.groups() if match else ())
    texts = [f"{places(sources, most)}: {what}" if sources else what for what, sources in sources_of.items()]
    rest = len(texts) - most
    return texts[:most] + ([f"and {rest} more"] if rest > 0 else [])


def places(sources: Sequence[str], most: int = MAX_SHOWN) -> str:
    """Join places in files, and count those beyond `most`: "a.jsonl:1, :7, b.jsonl:2 and 12 more"."""
    shown: list[str] = []
    file = ""
    for source in sources[:most]:
        before, file = file, source.rpartition(":")[0]
        shown.append(source.removeprefix(file) if file == before else source)
    rest = len(sources) - most
    return ", ".join(shown) + (f" and {rest} more" if rest > 0 else "")


def merge_splits(notices: Iterable[str]) -> list[str]:
    """Merge notices that say the same about several splits; the later ones only add their split, rows and places.

    A notice of a split is "train: 3 of 320 rows have ... (places); what to do", where the number of rows and the places
    may be missing. Other texts are unchanged.
    """
    found: dict[object, tuple[str, list[str]]] = {}
    for number, notice in enumerate(notices):
        match = _SPLIT_NOTICE.fullmatch(notice)
        if match is None:
            found[number] = (notice, [])
            continue
        split, rows, what, where, remedy = match.groups()
        same = re.sub(r"\d[\d,]*", "0", re.sub(_PLACES, "", what)).replace(" was ", " were ")
        first = found.setdefault((rows is None, same, remedy), (notice, []))
        if first[0] is not notice:
            first[1].append(split + (f": {rows}" if rows else "") + (f" ({where})" if where else ""))
    return [f"{notice}; also {', '.join(others)}" if others else notice for notice, others in found.values()]


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: "1 row", "1,000 rows"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or its class name if the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
