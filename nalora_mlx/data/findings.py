"""Notices about odd rows: each kind of finding, what a notice says about it, and the remedy."""

from collections import defaultdict
from enum import Enum
from typing import Any

from nalora_mlx.core.errors import places


class Finding(Enum):
    """A kind of odd row. The value is what a notice says about such rows, and the remedy, as format strings."""

    EMPTY_ANSWER = (
        "have an empty answer",
        "the model learns to answer nothing; add the answers or remove the rows",
    )
    UNKNOWN_ROLE = ("have roles like {role!r}", "{known_roles}")
    TRUNCATED = (
        "are longer than {limit} tokens (the longest has {longest}) and were cut",
        "raise --max-seq-length to keep them whole",
    )
    UNSUPERVISED = (
        "have no supervised token and were left out",
        "they have no answer, or the prompt alone fills --max-seq-length",
    )
    REWRITTEN_TURNS = (
        "have earlier turns that the chat template rewrites",
        "only their last assistant turn is trained on",
    )
    NO_END_TOKEN = (
        "do not end in a supervised end-of-sequence token",
        "the model may not learn to stop; use a chat template that writes one",
    )
    IGNORED_TOOLS = (
        "have 'tools' that the chat template leaves out",
        "they are trained on without tools; use a model whose template renders tools, "
        "or put the tools into a system message",
    )
    IGNORED_TOOL_CALLS = (
        "have 'tool_calls' that the chat template leaves out",
        "these turns are trained on without their calls, and are empty if they have no other content; "
        "use a model whose template renders tool calls, or put the calls into 'content'",
    )


class Findings:
    """The odd rows of one split.

    Attributes:
        sources: sources of the rows of each kind, in the order of the rows.
    """

    def __init__(self) -> None:
        self.sources: defaultdict[Finding, list[str]] = defaultdict(list)

    def add(self, kind: Finding, source: str) -> None:
        """Record a row."""
        self.sources[kind].append(source)

    def notices(self, name: str, rows: int, **details: Any) -> list[str]:
        """Return a sentence for each kind found: how many of the split's `rows`, which, and what to do."""
        sentences = []
        for kind in Finding:
            if sources := self.sources[kind]:
                what, remedy = (text.format(**details) for text in kind.value)
                sentences.append(
                    f"{name}: {len(sources)} of {rows} rows {what} ({places(sources)}); {remedy}"
                )
        return sentences
