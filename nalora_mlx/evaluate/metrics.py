"""Metrics of a generated answer: is it the expected one, how much do they have in common, has it the right form?

Texts are compared by their words, in every script: a character of a script without spaces is a word of its own.
Sources: exact match and token F1 as in SQuAD (Rajpurkar et al. 2016), ROUGE-L as in Lin 2004.
"""

import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nalora_mlx.core.errors import InputError, listed
from nalora_mlx.core.parsing import meant_value, nearest
from nalora_mlx.evaluate.json_schema import load_schema
from nalora_mlx.evaluate.last_number import SPACELESS, is_number, last_number

__all__ = [
    "BUILT_IN",
    "Metric",
    "MetricError",
    "choose_metrics",
    "default_metrics",
    "regex_metric",
    "schema_metric",
]

SHORT = 5  # words up to which an expected answer may be part of a sentence
TOLERANCE = 1e-6  # relative difference up to which two numbers are equal, unless both are whole


class MetricError(InputError):
    """A metric cannot be computed for a row. The message names the row."""


@dataclass(frozen=True)
class Metric:
    """A metric of answers.

    Attributes:
        name: what the user writes.
        title: what a table shows.
        needs_expected: whether it compares with the expected answer.
        is_binary: whether an answer is either right or wrong, 1 or 0.
        score: (answer, expected answer, row) -> value. Those of this module are from 0 to 1, and 1 is best. Of the row
            they read only "source", for messages. It raises MetricError if the value is unknown.
    """

    name: str
    title: str
    needs_expected: bool
    is_binary: bool
    score: Callable[[str, str, Mapping[str, Any]], float]


# --- words --------------------------------------------------------------------------------------------------

_IS_SPACELESS = re.compile(f"[{SPACELESS}]")
_ARTICLES = {"a", "an", "the"}


class _Characters(dict[int, str]):
    """A table for `str.translate`: what becomes of a character. Entries are computed when they are needed."""

    def __init__(self, punctuation: str | None) -> None:
        self.punctuation = punctuation  # what replaces it; None keeps it

    def __missing__(self, code: int) -> str:
        self[code] = text = self._replacement(chr(code))
        return text

    def _replacement(self, character: str) -> str:
        category = unicodedata.category(character)
        if category == "Cf":
            return ""  # invisible: joiners, marks of direction, soft hyphens
        if category == "Cc":
            return " "
        # Of the symbols, only those of ASCII are punctuation, as in SQuAD's evaluation. Others have a meaning: 5 €, ♥.
        if category[0] == "P" or (category[0] == "S" and character.isascii()):
            if self.punctuation is None:
                return character
            return " " if character == "\u2014" else self.punctuation  # an em dash stands between words
        return f" {character} " if _IS_SPACELESS.match(character) else character


_WITHOUT_PUNCTUATION, _WITH_PUNCTUATION, _SPLIT_AT_PUNCTUATION = map(_Characters, ("", None, " "))


def _words(text: str, characters: _Characters) -> list[str]:
    """Return the words of a text without differences of case and of compatible characters (ﬁ, １, é in two codes)."""
    return unicodedata.normalize("NFKC", text).casefold().translate(characters).split()


def _normalized(answer: str, expected: str) -> tuple[list[str], list[str]]:
    """Return the words of two texts without punctuation and English articles.

    Where one of the texts would be left without words, articles stay in both, or else punctuation too: the answer "A"
    may be the first of four choices, and "+" is not "-".
    """
    pair = [_words(text, _WITHOUT_PUNCTUATION) for text in (answer, expected)]
    without_articles = [[word for word in words if word not in _ARTICLES] for words in pair]
    if all(without_articles):
        pair = without_articles
    elif not all(pair):
        pair = [_words(text, _WITH_PUNCTUATION) for text in (answer, expected)]
    return pair[0], pair[1]


# --- comparisons of texts -----------------------------------------------------------------------------------


def _exact(answer: str, expected: str, row: Mapping[str, Any]) -> float:
    return float(answer.strip() == expected.strip())


def _equal_words(answer: str, expected: str, row: Mapping[str, Any]) -> float:
    words, other = _normalized(answer, expected)
    return float(words == other)


def _contains(answer: str, expected: str, row: Mapping[str, Any]) -> float:
    """Return 1 if the words of the expected answer follow one another in the answer. Only "" contains ""."""
    words, wanted = _normalized(answer, expected)
    if not words or not wanted:
        return float(words == wanted)
    return float(f" {' '.join(wanted)} " in f" {' '.join(words)} ")


def _token_f1(answer: str, expected: str, row: Mapping[str, Any]) -> float:
    words, other = _normalized(answer, expected)
    return _f_measure((Counter(words) & Counter(other)).total(), words, other)


def _rouge_l(answer: str, expected: str, row: Mapping[str, Any]) -> float:
    words, other = (_words(text, _SPLIT_AT_PUNCTUATION) for text in (answer, expected))
    if not words and not other:  # nothing but punctuation
        return float(answer.split() == expected.split())
    return _f_measure(_common_subsequence(words, other), words, other)


def _f_measure(common: int, words: Sequence[str], other: Sequence[str]) -> float:
    """Return the harmonic mean of precision and recall; 1 for two texts without words."""
    total = len(words) + len(other)
    return 2 * common / total if total else 1.0


def _common_subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    """Return the length of the longest common subsequence.

    Take the length as a function of the first i words of `one`, for the words of `other` so far. From i to i + 1 it
    grows by 0 or 1; bit i of `row` is 0 where it grows. The next word of `other` moves each growth back to its first
    occurrence since the growth before. The carries of one sum do so everywhere at once.
    Source: Hyyrö, "Bit-parallel LCS-length computation revisited", 2004.
    """
    places: dict[str, int] = {}
    for i, word in enumerate(one):
        places[word] = places.get(word, 0) | 1 << i
    full = row = (1 << len(one)) - 1
    for word in other:
        found = row & places.get(word, 0)
        row = ((row + found) | (row - found)) & full
    return len(one) - row.bit_count()


def _equal_numbers(answer: str, expected: str, row: Mapping[str, Any]) -> float:
    wanted = last_number(expected)
    if wanted is None:
        where = f"{row['source']}: " if row.get("source") else ""
        shown = expected if len(expected) <= 40 else expected[:37] + "..."
        raise MetricError(
            f"{where}the expected answer {shown!r} has no number, which the metric 'number' compares; leave it out"
        )
    number = last_number(answer)
    if number is None:
        return 0.0
    if number.is_integer() and wanted.is_integer():
        return float(number == wanted)
    return float(math.isclose(number, wanted, rel_tol=TOLERANCE))


# --- forms --------------------------------------------------------------------------------------------------

_FENCE = re.compile(r"\s*```[ \t]*(?:json)?[ \t]*\n(.*)\n?[ \t]*```\s*", re.DOTALL | re.IGNORECASE)


def _json_value(text: str) -> Any:
    """Return the value of an answer in JSON, which may stand in a code block of Markdown; ValueError if it is none."""
    fenced = _FENCE.fullmatch(text)

    def reject(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(fenced[1] if fenced else text, parse_constant=reject)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _is_json(answer: str, expected: str, row: Mapping[str, Any]) -> float:
    try:
        _json_value(answer)
    except ValueError:
        return 0.0
    return 1.0


BUILT_IN: dict[str, Metric] = {
    name: Metric(name, title, needs_expected, is_binary, score)
    for name, title, needs_expected, is_binary, score in (
        ("exact", "exact match", True, True, _exact),
        ("normalized", "normalized match", True, True, _equal_words),
        ("contains", "contains the answer", True, True, _contains),
        ("f1", "token F1", True, False, _token_f1),
        ("rouge-l", "ROUGE-L", True, False, _rouge_l),
        ("number", "same number", True, True, _equal_numbers),
        ("json", "valid JSON", False, True, _is_json),
    )
}


def choose_metrics(names: Sequence[str]) -> list[Metric]:
    """Return the built-in metrics of these names, each once, in their order.

    Raises:
        InputError: names that no metric has, with the nearest name.
    """
    unknown = [
        f"{name!r} is no metric{meant_value('metric', name, BUILT_IN) or nearest(name, BUILT_IN)}"
        for name in dict.fromkeys(names)
        if name not in BUILT_IN
    ]
    if unknown:
        raise InputError(listed(unknown))
    return [BUILT_IN[name] for name in dict.fromkeys(names)]


def default_metrics(expected: Sequence[str]) -> list[str]:
    """Return the names of the metrics that suit these expected answers, the most telling first; none for no answers.

    Always exact, f1 and rouge-l. Before them json if all answers are JSON objects or arrays, and number if each is a
    number or has one after "####". After them contains if none has more than SHORT words.
    """
    if not expected:
        return []
    names = ["exact", "f1", "rouge-l"]
    if all(is_number(text) or ("####" in text and last_number(text) is not None) for text in expected):
        names.insert(0, "number")
    if all(map(_is_container, expected)):
        names.insert(0, "json")
    if all(len(_words(text, _SPLIT_AT_PUNCTUATION)) <= SHORT for text in expected):
        names.append("contains")
    return names


def _is_container(text: str) -> bool:
    try:
        return isinstance(_json_value(text), dict | list)
    except ValueError:
        return False


# --- forms that the user describes --------------------------------------------------------------------------


def regex_metric(pattern: str) -> Metric:
    """Return the metric "regex": does the whole answer, without white space at its ends, match a pattern?

    The pattern is one of Python's `re`; "(?s)" at its start lets a dot match line breaks. Some patterns, like "(a+)+b",
    take very long for some answers: nothing guards against them.

    Raises:
        InputError: the pattern is invalid.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        place = "" if error.pos is None else f" at character {error.pos + 1}"
        raise InputError(f"the pattern {pattern!r} is no regular expression: {error.msg}{place}") from None
    except (OverflowError, RecursionError) as error:
        raise InputError(f"the pattern {pattern!r} is no regular expression: {error}") from None

    def score(answer: str, expected: str, row: Mapping[str, Any]) -> float:
        return float(compiled.fullmatch(answer.strip()) is not None)

    return Metric("regex", "matches the pattern", False, True, score)


def schema_metric(path: Path) -> Metric:
    """Return the metric "json-schema": is the answer JSON that is valid by the schema in a file?

    For drafts, references and errors, see `load_schema`.
    """
    is_valid = load_schema(path)

    def score(answer: str, expected: str, row: Mapping[str, Any]) -> float:
        try:
            return float(is_valid(_json_value(answer)))
        except ValueError as error:
            if isinstance(error, InputError):
                raise
            return 0.0

    return Metric("json-schema", "valid by the schema", False, True, score)
