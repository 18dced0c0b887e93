"""Stop words: the text of an answer ends before the first of them."""

from collections.abc import Sequence
from typing import Any


class AnswerText:
    """The text of one answer, from its tokens, up to the first stop word.

    The stop word that is complete first ends the answer; of several that end with the same character, the longest. The
    result does not depend on how the tokens cut the text.

    Args:
        detokenizer: a streaming detokenizer of mlx-lm that has seen no token.
        stop_words: not empty, and none of them is empty.

    Attributes:
        ended: whether a stop word was found.
    """

    def __init__(self, detokenizer: Any, stop_words: Sequence[str]):
        self._detokenizer = detokenizer
        self._stop_words = stop_words
        self._pending = ""  # the last characters, which may be the beginning of a stop word
        self.ended = False

    def add(self, token: int) -> str:
        """Add a token; return the text that is certain now and was not returned before."""
        self._detokenizer.add_token(token)
        return self._append(self._detokenizer.last_segment)

    def finish(self) -> str:
        """Return the rest of the text, after the last token of an answer without a stop word."""
        self._detokenizer.finalize()
        text = self._append(self._detokenizer.last_segment)
        rest, self._pending = self._pending, ""
        return text + rest

    def _append(self, segment: str) -> str:
        text = self._pending + segment
        found = [(text.find(word) + len(word), text.find(word)) for word in self._stop_words if word in text]
        if found:
            self.ended, self._pending = True, ""
            return text[: min(found)[1]]
        begun = max(_overlap(text, word) for word in self._stop_words)
        self._pending = text[len(text) - begun :]
        return text[: len(text) - begun]


def _overlap(text: str, word: str) -> int:
    """Return the length of the longest end of the text that a word begins with."""
    lengths = range(min(len(text), len(word) - 1), 0, -1)
    return next((length for length in lengths if word.startswith(text[len(text) - length :])), 0)


class StopWords:
    """Decides after each token whether an answer ends: at an end token, or when its text has a stop word.

    It takes the place of mlx-lm's `StopSequences`, which compares tokens: it misses a stop word that an answer cuts
    into other tokens than the word alone.
    """

    def __init__(self, tokenizer: Any, stop_words: Sequence[str]):
        self.tokenizer = tokenizer
        self.stop_words = stop_words

    def matcher(self) -> "StopMatcher":
        """Return the matcher of a new answer."""
        return StopMatcher(self.tokenizer, self.stop_words)


class StopMatcher:
    """See `StopWords`; for one answer."""

    def __init__(self, tokenizer: Any, stop_words: Sequence[str]):
        self._end_tokens = tokenizer.eos_token_ids
        self._text = AnswerText(tokenizer.detokenizer, stop_words)

    def advance(self, token: int) -> bool:
        """Add a token; return whether the answer ends with it."""
        if token in self._end_tokens:
            return True
        self._text.add(token)
        return self._text.ended
