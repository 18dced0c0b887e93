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
        "raise --max-seq-length to keep them whole{chunk_remedy}",
    )
    LOST_TURNS = (
        "have answers after the first {limit} tokens",
        "these answers were left out; raise --max-seq-length to train on them",
    )
    UNSUPERVISED = (
        "have no supervised token and were left out",
        "they have no answer, or the prompt alone fills --max-seq-length",
    )
    SPLIT_CHATS = (
        "are rendered differently once later turns follow",
        "they became {sequences} sequences, so that each answer follows exactly what the model reads in use "
        "(--last-turn-only trains the last answers only)",
    )
    OPENED_PROMPT = (
        "have answers that do not begin with {detail!r}, which the chat template puts before each answer in use",
        "they are trained after it; {opened_remedy}",
    )
    NO_END_TOKEN = (
        "do not end in a supervised end-of-sequence token",
        "the model may not learn to stop; use a chat template that writes one",
    )
    DROPPED_SYSTEM = (
        "have a system message that the chat template leaves out",
        "put it into the first user message, or use another --chat-template",
    )
    DROPPED_CONTENT = (
        "have content (of role {detail!r}) that the chat template leaves out",
        "it is not trained on; use a role that the template knows, or another --chat-template",
    )
    DROPPED_REASONING = ("have reasoning that the chat template leaves out", "{reasoning_remedy}")
    UNREAD_ARGUMENTS = (
        "have chat_template_kwargs such as {detail!r} that the chat template does not read",
        "they have no effect; remove them, or use another --chat-template",
    )
    CONTROL_TOKENS = (
        "hold control tokens such as {detail!r} in their text",
        "the model reads them as control tokens; remove them (a chat that is rendered already belongs under 'text')",
    )
    DOUBLE_START = (
        "begin with {detail!r}, which the tokenizer adds as well",
        "the second one was removed",
    )
    UNANSWERED = ("end in messages that no answer follows", "nothing is trained on these messages")
    IGNORED_TOOLS = (
        "have 'tools' that the chat template leaves out",
        "they are trained on without tools; use a model whose template renders tools, "
        "or put the tools into a system message",
    )
    IGNORED_TOOL_CALLS = (
        "have 'tool_calls' that the chat template leaves out",
        "turns with content are trained on without their calls, the others are left out; "
        "use a model whose template renders tool calls, or put the calls into 'content'",
    )


class Findings:
    """The odd rows of one split.

    Attributes:
        sources: sources of the rows of each kind, in the order of the rows.
        details: for each kind, what the first such row has, such as the name of a token.
    """

    def __init__(self) -> None:
        self.sources: defaultdict[Finding, list[str]] = defaultdict(list)
        self.details: dict[Finding, str] = {}

    def add(self, kind: Finding, source: str, detail: str = "") -> None:
        """Record a row, once per kind."""
        if self.sources[kind][-1:] != [source]:
            self.sources[kind].append(source)
            self.details.setdefault(kind, detail)

    def notices(self, name: str, rows: int, **details: Any) -> list[str]:
        """Return a sentence for each kind found: how many of the split's `rows`, which, and what to do."""
        sentences = []
        for kind in Finding:
            if sources := self.sources[kind]:
                what, remedy = (text.format(detail=self.details[kind], **details) for text in kind.value)
                sentences.append(
                    f"{name}: {len(sources)} of {rows} rows {what} ({places(sources)}); {remedy}"
                )
        return sentences
