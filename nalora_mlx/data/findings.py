"""Notices about odd rows: each kind of finding, what a notice says about it, and the remedy."""

from collections import defaultdict
from enum import Enum
from typing import Any

from nalora_mlx.core.errors import counted, places
from nalora_mlx.core.notices import Note


class Finding(Enum):
    """A kind of odd row. The value is what a notice says about such rows, and the remedy, as format strings."""

    EMPTY_ANSWER = (
        "have an empty answer",
        "the model learns to answer nothing; add the answers or remove the rows",
    )
    UNKNOWN_ROLE = ("have roles like {role!r}", "{known_roles}")
    NO_IMAGE = (
        "have the text '<image>', but no image",
        "the model reads it as text; add the images, or remove it",
    )
    ANIMATED = ("have images of several frames or pages", "the first one is used")
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
        "there is no answer, or the prompt alone fills --max-seq-length",
    )
    SAME_ANSWERS = (
        "have answers that do not differ within {limit} tokens and were left out",
        "raise --max-seq-length, or shorten the prompts",
    )
    SAME_RENDERING = (
        "have answers that are the same once the chat template has rendered them and were left out",
        "they differ only in what it drops, such as reasoning or white space; remove the rows, or correct them",
    )
    SPLIT_ANSWERS = (
        "have answers of several turns that are rendered differently once later turns follow and were left out",
        "let the chats part at their last answer, or use a --chat-template that keeps earlier turns as they are",
    )
    SPLIT_CHATS = (
        "are rendered differently once later turns follow",
        "this gives {sequences} sequences, so that each answer follows exactly what the model reads in use "
        "(--last-turn-only trains the last answers only)",
    )
    OPENED_PROMPT = (
        "have answers that do not begin with {detail!r}, which the chat template puts before each answer in use",
        "training puts it there too; {opened_remedy}",
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
        "training leaves them out too; use a model whose template renders tools, "
        "or put the tools into a system message",
    )
    IGNORED_TOOL_CALLS = (
        "have 'tool_calls' that the chat template leaves out",
        "turns with content are trained on without their calls, the others are left out; "
        "use a model whose template renders tool calls, or put the calls into 'content'",
    )


# Kinds that are handled as they should be.
NOTES = {
    Finding.ANIMATED,
    Finding.SPLIT_CHATS,
    Finding.OPENED_PROMPT,
    Finding.DOUBLE_START,
    Finding.UNANSWERED,
}
SINGULAR = {  # of the verbs that begin what is said
    "have": "has",
    "are": "is",
    "do": "does",
    "hold": "holds",
    "begin": "begins",
    "end": "ends",
}


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
        """Return a sentence for each kind found: how many of the split's `rows`, which, and what to do.

        Those that ask for nothing are of type `Note`.
        """
        sentences = []
        for kind in Finding:
            if sources := self.sources[kind]:
                what, remedy = kind.value
                what = what if len(sources) > 1 else _singular(what)
                what, remedy = (part.format(detail=self.details[kind], **details) for part in (what, remedy))
                text = (
                    f"{name}: {len(sources)} of {counted(rows, 'row')} {what} ({places(sources)}); {remedy}"
                )
                sentences.append(Note(text) if kind in NOTES else text)
        return sentences


def _singular(what: str) -> str:
    verb, rest = what.split(" ", 1)
    return f"{SINGULAR[verb]} {rest}".replace(" and were ", " and was ")
