"""Encoding of rendered chats: the tokens of whole texts, at the cost of encoding each message once."""

import re
from functools import lru_cache
from typing import Any

CACHED_PIECES = 8192
COMPARED = 64  # texts whose tokens are compared with the tokenizer's own
ANCHORS = ("\n", "x", ":")  # text before a piece that must not be encoded as the beginning of a text


class TextEncoder:
    """Encodes texts as the tokenizer does, without adding special tokens.

    A chat is rendered once per assistant turn, so most of its text is encoded many times. Tokenizers split a text at
    their control tokens (such as <|im_start|>) before anything else, and encode what is between them independently:

    1. Split the text at control tokens.
    2. Encode each piece together with the control token before it, and keep the result for the next rendering.

    The first texts are compared with the tokenizer's own tokens. If they differ, texts are encoded as a whole.

    Attributes:
        end_tokens: ids of the tokens that end generation.
        end_texts: these tokens as texts.
        control_texts: texts of the control tokens.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        ends = getattr(tokenizer, "eos_token_ids", None)  # in mlx-lm's wrapper; transformers returns the one
        self.end_tokens: set[int] = set(ends or ()) if not isinstance(ends, int) else {ends}
        self.end_tokens |= {tokenizer.eos_token_id} - {None}
        added = list((getattr(tokenizer, "added_tokens_decoder", None) or {}).values())
        self.end_texts = {str(text) for text in tokenizer.convert_ids_to_tokens(sorted(self.end_tokens))}
        self.control_texts = {token.content for token in added if token.special} | self.end_texts
        self._added = _any_of({token.content for token in added} | self.end_texts)
        # Tokens that are found in normalized text, or that absorb the white space before them, stay within pieces.
        self._boundaries = _any_of(
            {token.content for token in added if not (token.normalized or token.lstrip or token.single_word)}
        )
        self._encode_piece = lru_cache(CACHED_PIECES)(self._encode_uncached)
        self._to_compare = COMPARED

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text."""
        if self._boundaries is None:
            return list(self._encode_piece(text))
        first, *rest = self._boundaries.split(text)
        tokens = list(self._encode_piece(first)) if first else []
        for boundary, piece in zip(rest[::2], rest[1::2], strict=True):
            tokens += self._encode_piece(boundary + piece)
        if self._to_compare:
            self._to_compare -= 1
            if tokens != (whole := list(self._encode_uncached(text))):
                self._boundaries = None
                return whole
        return tokens

    def encode_after(self, context: str, rest: str) -> tuple[list[int], list[int]]:
        """Return the tokens of `context` as they are without `rest`, and those of `rest` that continue them.

        If a token of the joint text spans both, `rest` is encoded by itself.
        """
        before, whole = self.encode(context), self.encode(context + rest)
        if whole[: len(before)] == before:
            return before, whole[len(before) :]
        for anchor in ANCHORS:
            prefix, joined = self.encode(anchor), self.encode(anchor + rest)
            if joined[: len(prefix)] == prefix:
                return before, joined[len(prefix) :]
        return before, self.encode(rest)

    def split(self, text: str) -> list[str]:
        """Split a text at its added tokens: text, token, text, and so on. The texts may be empty."""
        return self._added.split(text) if self._added else [text]

    def _encode_uncached(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))


def _any_of(texts: set[str]) -> re.Pattern[str] | None:
    """Return a pattern that matches the longest of some texts, as a group."""
    longest_first = sorted(filter(None, texts), key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})") if longest_first else None
